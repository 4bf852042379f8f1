"""Writes the README's figures from the committed results, so that no figure is typed by hand.

python benchmarks/figures.py           writes them between README.md's markers
python benchmarks/figures.py --check   exits with 1 if they are not what the results say
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->\n", "<!-- end of figures -->\n"
AUTHORS = "Conv2d (authors)"


def load(folder: Path) -> tuple[dict, list[dict]]:
    """The machine, and all rows of a folder's reports."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return reports[0]["machine"], [row for report in reports for row in report["rows"]]


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
            "GPU",
            "tokens/s of LLaVA-1.5-7B with SP cropping / without (the paper: 0.988)",
            "at least 0.99",
            with_tokens(gpu, "SP cropping + DFI"),
        ),
        (
            "GPU",
            "tokens/s of LLaVA-1.5-7B with SP pooling / without (the paper: 0.977)",
            "at least 0.99",
            with_tokens(gpu, "SP pooling + DFI"),
        ),
    ]
    return rows


def figures() -> str:
    """The README's table."""
    machine, cpu = load(RESULTS / "cpu")
    gpu = [row for folder in sorted(RESULTS.iterdir()) if folder.name != "cpu" for row in load(folder)[1]]
    lines = [
        f"Measured on: {machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['date']}; "
        "a shared machine, whose bandwidth changes from minute to minute, so that a share of the limit can pass 100%.",
        "",
        "| where | what | target | measured |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in targets(cpu, gpu)),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = before + BEGIN + "\n" + figures() + "\n" + END + after
    if sys.argv[1:] == ["--check"]:
        return int(written != text)
    README.write_text(written)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
