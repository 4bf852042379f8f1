"""Writes the figures of the README, the docs and the operators' READMEs from the committed results: none is typed by hand.

python benchmarks/figures.py           writes them between each page's markers
python benchmarks/figures.py --check   exits with 1 if they are not what the results say
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # in place of this folder

from benchmarks import stage_memory
from benchmarks.spatial_vqa import dense_or_factorized, tables

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->\n", "<!-- end of figures -->\n"
AUTHORS = "Conv2d (authors)"


def load(folder: Path, *suites: str) -> tuple[dict | None, list[dict]]:
    """The machine of a folder's first report, and the rows of all, of these suites."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem in suites]
    return reports[0]["machine"] if reports else None, [row for report in reports for row in report["rows"]]


def pick(rows: list[dict], subject: str, implementation: str, **setting) -> dict | None:
    """The values of the one row that fits, if it was timed."""
    for row in rows:
        fits = all(row["setting"].get(name) == value for name, value in setting.items())
        if fits and row["subject"] == subject and row["implementation"] == implementation and row["values"]:
            return row["values"]
    return None


def faster(rows, subject, dtype, batch, direction="forward", ours="gemm") -> str:
    mine = pick(rows, subject, ours, dtype=dtype, batch=batch, **{"pass": direction})
    if mine is None or "ratio" not in mine:
        return "not measured"
    at_limit = mine["ratio"] / mine["share_of_limit"]
    return f"1/{mine['ratio']:.1f} (the limit of that moment: 1/{at_limit:.1f})"


def share(rows, subject, dtype, batch, ours="gemm") -> str:
    mine = pick(rows, subject, ours, dtype=dtype, batch=batch, **{"pass": "forward"})
    return "not measured" if mine is None or "share_of_limit" not in mine else f"{mine['share_of_limit']:.0%}"


def memory(rows, subject, dtype, batch, ours="gemm") -> str:
    mine = pick(rows, subject, ours, dtype=dtype, batch=batch, **{"pass": "forward"})
    theirs = pick(rows, subject, AUTHORS, dtype=dtype, batch=batch, **{"pass": "forward"})
    if mine is None or theirs is None or not theirs.get("peak_mib"):
        return "not measured"
    return f"{mine['peak_mib'] / theirs['peak_mib']:.1%} ({mine['peak_mib']:.0f} of {theirs['peak_mib']:.0f} MiB)"


def with_tokens(rows, implementation) -> str:
    row = next((row for row in rows if row["suite"] == "llm" and row["implementation"] == implementation and row["values"]), None)
    return "not measured" if row is None else f"{row['values']['ratio']:.3f} ({row['subject']})"


def targets(cpu: list[dict], gpu: list[dict]) -> list[tuple[str, str, str, str]]:
    crop, both = "tokens, cropping", "forward + backward"
    rows = [
        (
            "CPU",
            f"extractor, batch {batch}, {dtype}: time / authors' convolutions",
            f"at most 1/{most}",
            faster(cpu, crop, dtype, batch),
        )
        for batch, most in ((1, 25), (8, 10))
        for dtype in ("float32", "bfloat16")
    ]
    rows += [
        (
            "CPU",
            f"projector, forward + backward, batch 8, {dtype}: time / with authors' convolutions",
            "at most 1/5",
            faster(cpu, "projector", dtype, 8, both),
        )
        for dtype in ("float32", "bfloat16")
    ]
    rows += [
        ("CPU", f"extractor, batch 1, {dtype}: share of measured read bandwidth", "at least 85%", share(cpu, crop, dtype, 1))
        for dtype in ("float32", "bfloat16")
    ]
    rows += [
        ("CPU", f"extractor, batch 8, {dtype}: peak memory / authors'", "at most 10%", memory(cpu, crop, dtype, 8))
        for dtype in ("float32", "bfloat16")
    ]
    rows += [
        (
            "H100",
            f"extractor, batch {batch}, bfloat16: share of measured read bandwidth",
            "at least 90%",
            share(gpu, crop, "bfloat16", batch, "triton"),
        )
        for batch in (1, 8, 32)
    ]
    rows += [
        (
            "H100",
            "extractor, batch 512, bfloat16: share of measured matrix peak",
            "at least 70%",
            share(gpu, crop, "bfloat16", 512, "triton"),
        ),
        (
            "H100",
            "projector, forward + backward, batch 32, bfloat16: time / with authors' convolutions",
            "at most 1/10",
            faster(gpu, "projector", "bfloat16", 32, both, "triton"),
        ),
        (
            "H100",
            "tokens/s of LLaVA-1.5-7B with SP cropping / without (the paper: 0.988)",
            "at least 0.99",
            with_tokens(gpu, "SP cropping + DFI"),
        ),
        (
            "H100",
            "tokens/s of LLaVA-1.5-7B with SP pooling / without (the paper: 0.977)",
            "at least 0.99",
            with_tokens(gpu, "SP pooling + DFI"),
        ),
    ]
    return rows


def front_page() -> str:
    """The README's table: dense and factorized kernels beside the authors' convolutions, all of one run."""
    machine, rows = load(RESULTS / "cpu", "factorized")
    config = stage_memory.DENSE
    sizes = [(each.costs()[0].parameters, each.num_parameters) for each in (config, replace(config, rank=128))]
    subjects = (
        ("the authors' convolutions", AUTHORS, sizes[0]), ("the same kernels here (`llava-sp-cropping`)", "dense", sizes[0]),
        ("factorized kernels (the same preset with `rank=128`)", "factorized", sizes[1]),
    )  # fmt: skip
    lines = []
    for name, implementation, (extractor, whole) in subjects:
        found = [
            pick(rows, "tokens, cropping", implementation, dtype=dtype, batch=batch, **{"pass": "forward"})
            for batch in (1, 8) for dtype in ("float32", "bfloat16")
        ]  # fmt: skip
        times = ["not measured" if values is None else milliseconds(values["ms"]) for values in found]
        lines.append((name, f"{extractor / 1e6:.1f} M", f"{whole / 1e6:.1f} M", *times))
    head = (
        f"Milliseconds per call of the extractor (six tokens from 24 x 24 patches of CLIP-L's width), {machine['device']}, "
        f"{machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date']}. LLaVA-1.5's own projector, which is "
        "part of each whole projector, has 21.0 M parameters."
    )
    columns = [
        "", "parameters of the extractor", "of the whole projector", "1 image, float32", "1 image, bfloat16", "8 images, float32",
        "8 images, bfloat16",
    ]  # fmt: skip
    return head + "\n\n" + table(columns, lines)


def against_targets() -> str:
    """What was aimed at, and what was measured."""
    machine, cpu = load(RESULTS / "cpu", "kernels")
    gpu = [row for folder in sorted(RESULTS.iterdir()) if "h100" in folder.name for row in load(folder, "kernels", "llm")[1]]
    head = (
        f"Measured on: {machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date']}; "
        "a shared machine, whose bandwidth changes from minute to minute, so that a share of the limit can pass 100%."
    )
    return head + "\n\n" + table(["where", "what", "target", "measured"], targets(cpu, gpu))


def operators(*subjects: str) -> str:
    """What the kernels suite found of one operator: our default backend, beside its limit and the authors' convolutions."""
    machine, rows = load(RESULTS / "cpu", "kernels")
    lines = []
    for row in rows:
        if row["subject"] in subjects and row["implementation"] == "gemm" and row["values"]:
            setting, values = row["setting"], row["values"]
            limit = f"{values['share_of_limit']:.0%}" if "share_of_limit" in values else ""
            against = f"{values['ratio']:.1f}x" if "ratio" in values else ""
            lines.append(
                (row["subject"], setting["pass"], setting["dtype"], setting["batch"], f"{values['ms']:.3g}", limit, against)
            )
    others = "naive is the other" if subjects == ("integrator",) else "Conv2d as the authors wrote it is the other"
    head = f"`gemm` on {machine['device']}, {machine['cores']} cores, {machine['date']}; in the last column {others}."
    return head + "\n\n" + table(["", "pass", "dtype", "batch", "ms", "of limit", "faster"], lines)


def projectors() -> str:
    """What the projectors and llm suites found; and whether one thread ranks the projectors alike."""
    (machine, of_projectors), (llm_machine, of_llm) = (load(RESULTS / "cpu", name) for name in ("projectors", "llm"))
    rows = of_projectors + of_llm
    _, alone = load(RESULTS / "cpu", "projectors_one_thread")
    lines, seen = [], set()
    for row in rows:
        name, setting, values = row["implementation"], row["setting"], row["values"]
        if row["suite"] == "projectors" and values and (name, setting["dtype"]) not in seen:
            seen.add((name, setting["dtype"]))
            figures = (f"{values['tokens']:.0f}", f"{values['parameters'] / 1e6:.1f} M", f"{values['gflop_per_image']:.1f}")
            again = pick(alone, row["subject"], name, **setting)
            ratios = ("not measured" if found is None else f"{1 / found['ratio']:.2f}" for found in (values, again))
            lines.append((name, setting["dtype"], *figures, *ratios, f"{values['peak_mib']:.0f}"))
    text = f"{machine_line(machine)}.\n\n" + table(
        ["projector, one image", "dtype", "tokens", "parameters", "GFLOP", "time / LLaVA MLP's", "on one thread", "peak MiB"], lines
    )
    models = [
        (row["subject"], row["implementation"], f"{row['values']['image_tokens']:.0f}", f"{row['values']['tokens_per_s']:.2f}",
         f"{row['values']['ratio']:.3f}")
        for row in rows if row["suite"] == "llm" and row["values"]
    ]  # fmt: skip
    return f"{text}\n{machine_line(llm_machine)}.\n\n" + table(
        ["language model", "projector", "image tokens", "tokens/s", "speed / LLaVA-1.5's"], models
    )


def factorized() -> str:
    """What the factorized suite found, and what is computed of it."""
    machine, rows = load(RESULTS / "cpu", "factorized")
    where = "nothing is measured yet"
    if machine is not None:
        where = machine_line(machine)
    times = f"The extractor with factorized kernels (`rank=128`, 3 x 3 cosines) at the paper's size; {where}."
    steps = (
        "A training step of the whole projector: forward, backward, AdamW. Held: weights and moments; the peak above it: gradients "
        "and what the passes need."
    )
    stages = (
        "Computed, not measured: GiB that each of 8 GPUs holds of LLaVA-1.5 7B in the paper's two stages, without activations: all "
        "weights in bfloat16 and, of what trains, its eighth of gradients (2 bytes) and AdamW (12 bytes), as ZeRO stage 2 shares "
        "them out. In stage 2 the LoRA trains too."
    )
    columns = ["dtype", "batch", "kernels", "parameters", "ms", "held MiB", "peak MiB above it"]
    tables = [
        (times, table(["what", "target", "measured"], factorized_targets(rows))),
        (steps, table(columns, training_steps(rows) or [("not measured", *[""] * 6)])),
        (stages, table(stage_memory.COLUMNS, stage_memory.lines())),
    ]
    return "\n".join(f"{head}\n\n{body}" for head, body in tables)


def factorized_targets(rows: list[dict]) -> list[tuple[str, str, str]]:
    configs = stage_memory.DENSE, replace(stage_memory.DENSE, rank=128)
    dense, small = ({cost.part: cost.parameters for cost in config.costs()} for config in configs)
    of_both = sum(count for part, count in small.items() if "head" not in part)
    dtypes = ("float32", "bfloat16")
    return [
        ("parameters of the extractor / dense (counted)", "at most 1/200", f"1/{dense['extractor'] / small['extractor']:.0f}"),
        ("parameters of extractor and integrator (counted)", "at most 6 M", f"{of_both / 1e6:.2f} M"),
        *(
            (f"batch {batch}, {dtype}: time / dense", f"at most 1/{most}", quicker(rows, "dense", dtype, batch))
            for batch, most in ((1, 60), (8, 30)) for dtype in dtypes
        ),
        (
            "batch 8, bfloat16, forward + backward: time / dense", "at most 1/30",
            quicker(rows, "dense", "bfloat16", 8, "forward + backward"),
        ),
        *(
            (f"batch {batch}, {dtype}: time / authors' convolutions", f"at most 1/{most}", quicker(rows, AUTHORS, dtype, batch))
            for batch, most in ((1, 2000), (8, 400)) for dtype in dtypes
        ),
    ]  # fmt: skip


def quicker(rows, other, dtype, batch, direction="forward") -> str:
    """The time of factorized kernels over that of others: after those have filled the caches, and after a run of their own."""
    setting = {"dtype": dtype, "batch": batch, "pass": direction}
    found = [pick(rows, "tokens, cropping", name, **setting) for name in ("factorized", "factorized, in cache", other)]
    if None in found:
        return "not measured"
    ours, again, theirs = (values["ms"] for values in found)
    return f"1/{theirs / ours:.0f} ({milliseconds(ours)} of {milliseconds(theirs)} ms; in cache 1/{theirs / again:.0f})"


def milliseconds(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def training_steps(rows: list[dict]) -> list[tuple]:
    found = []
    for row in rows:
        setting, values = row["setting"], row["values"]
        if row["subject"] == "training step" and values:
            size, peak = (
                f"{values['parameters'] / 1e6:.1f} M",
                f"{values['peak_mib']:.0f}" if "peak_mib" in values else "not measured",
            )
            what = (setting["dtype"], setting["batch"], row["implementation"])
            found.append((*what, size, f"{values['ms']:.0f}", f"{values['held_mib']:.0f}", peak))
    return found


def scale_out() -> str:
    """What each process held, from least to most, for each engine and number of processes."""
    report = json.loads((RESULTS / "cpu" / "scale_out.json").read_text())
    machine, held = report["machine"], {}
    for row in report["rows"]:
        held.setdefault((row["implementation"], row["setting"]["processes"]), []).append(row["values"])
    names = ("parameters_mib", "gradients_mib", "optimizer_mib", "peak_mib")
    lines = [(*key, *(span([values[name] for values in ranks if name in values]) for name in names)) for key, ranks in held.items()]
    head = (
        "MiB a process, after a step of AdamW in float32, all widths a quarter of the paper's "
        f"({machine['parameters'] / 1e6:.1f} M weights, a sixteenth). "
        f"{machine['device']}, torch {machine['versions']['torch']}, {machine['date']}."
    )
    return head + "\n\n" + table(["engine", "processes", "weights", "gradients", "optimizer", "peak, building included"], lines)


def exported() -> str:
    """The whole projector as each program, beside itself in eager torch."""
    machine, rows = load(RESULTS / "cpu", "export")
    lines = []
    for row in rows:
        if row["subject"] == "program" and row["values"] and row["implementation"] != "eager":
            setting = row["setting"]
            eager = pick(rows, "program", "eager", **setting)
            cost = (milliseconds(eager["ms"]), milliseconds(row["values"]["ms"]), f"{row['values']['ratio']:.2f}")
            lines.append((setting["kernels"], setting["batch"], row["implementation"], *cost))
    head = f"All widths half the paper's, float32; {machine_line(machine)}."
    return head + "\n\n" + table(["kernels", "batch", "program", "eager, ms", "program, ms", "times as fast"], lines)


def int8() -> str:
    """The extractor with kernels in 8 bits beside plain ones, neither compiled, and compiled."""
    machine, rows = load(RESULTS / "cpu", "export")
    lines = []
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            found = [
                pick(rows, "extractor", name, kernels="dense", dtype=dtype, batch=batch)
                for name in ("eager", "int8", "int8, compiled")
            ]
            lines.append((dtype, batch, *(milliseconds(values["ms"]) for values in found)))
    head = f"The extractor with dense kernels, milliseconds, all widths half the paper's; {machine_line(machine)}."
    return head + "\n\n" + table(["dtype", "batch", "plain kernels", "int8", "int8, `torch.compile`"], lines)


def served() -> str:
    """Requests per second and time to first token with spatial tokens, over those without."""
    report = json.loads((RESULTS / "cpu" / "serving.json").read_text())
    settings, lines = report["settings"], []
    for name in ("requests/s", "time to first token, s"):
        without = median(report[name]["rounds"]["without"])
        for kernels, ratio in report[name]["ratio"].items():
            figures = (f"{without:.3f}", f"{median(report[name]['rounds'][kernels]):.3f}")
            lines.append((name, kernels, *figures, f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"))
    head = (
        f"vLLM {report['vllm']}, {settings['dtype']}, {settings['requests']} requests at once with an image and "
        f"{settings['tokens']} answered tokens each, {settings['rounds']} rounds; {machine_line(report['machine'])}."
    )
    return head + "\n\n" + table(["", "kernels", "without", "with", "ratio of medians (95 %)"], lines)


def machine_line(machine: dict) -> str:
    return f"{machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date']}"


def span(figures: list[float]) -> str:
    if not figures:
        return "not measured"
    least, most = (f"{figure:.0f}" for figure in (min(figures), max(figures)))
    return least if least == most else f"{least} to {most}"


def table(columns: list[str], rows: list[tuple]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines) + "\n"


OPERATORS = ROOT / "src" / "spatial_tokens" / "ops"
PAGES = {
    ROOT / "README.md": front_page,
    ROOT / "docs" / "benchmarks.md": lambda: "\n".join([against_targets(), projectors(), factorized()]),
    ROOT / "docs" / "scale-out.md": scale_out,
    ROOT / "docs" / "export.md": exported,
    ROOT / "docs" / "compression.md": int8,
    ROOT / "docs" / "serving.md": served,
    ROOT / "docs" / "evidence-tables.md": tables.designs_page,
    ROOT / "docs" / "evidence-settings.md": tables.settings_page,
    ROOT / "docs" / "evidence.md": tables.front_page,
    ROOT / "docs" / "dense-or-factorized.md": dense_or_factorized.page,
    OPERATORS / "window_linear" / "README.md": partial(operators, "tokens, cropping", "detail map"),
    OPERATORS / "integrate" / "README.md": partial(operators, "integrator"),
    OPERATORS / "pyramid" / "README.md": partial(operators, "tokens, pooling"),
}


def main() -> int:
    stale = 0
    for page, make in PAGES.items():
        text = page.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        written = before + BEGIN + "\n" + make() + "\n" + END + after
        stale |= written != text
        if sys.argv[1:] != ["--check"]:
            page.write_text(written)
    if sys.argv[1:] != ["--check"]:
        from benchmarks.spatial_vqa.pictures import draw

        draw()
    return int(stale) if sys.argv[1:] == ["--check"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
