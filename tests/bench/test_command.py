"""`spatial-tokens bench` as a user meets it: tables, files, and one line on every mistake, before any work."""

import json
import os
import re
import sys
import weakref
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from spatial_tokens import SpatialTokensError
from spatial_tokens.bench import command, console
from spatial_tokens.bench.comparison import Candidate, Comparison, Row
from spatial_tokens.bench.names import MINUTES
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.report import Report, read_report
from spatial_tokens.bench.suites import SUITES
from spatial_tokens.cli import main
from tests.bench.tiny import COLLECT, TINY, shrink

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr("spatial_tokens.cli.bench.Options", partial(Options, config=TINY))


def run(capsys, *arguments, code=0):
    """Runs the command in this process: what it printed, and one line of error if it should fail."""
    try:
        given = main(["bench", *map(str, arguments)])
    except SystemExit as exit_:
        given = exit_.code
    printed = capsys.readouterr()
    assert given == code, printed.err
    if code == 2:
        assert printed.err.count("\n") == 1, printed.err
        assert printed.err.startswith("spatial-tokens")
        return printed.err
    return printed.out


@pytest.fixture
def nothing_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(command, "run_comparison", fail)
    for suite in SUITES:
        monkeypatch.setitem(SUITES, suite, fail)


def made_up(monkeypatch, **suites):
    """In the place of all suites: each a function of its options that gives comparisons."""
    for suite in list(SUITES):
        monkeypatch.delitem(SUITES, suite)
    for suite, comparisons in suites.items():
        monkeypatch.setitem(SUITES, suite, comparisons)


def comparison(suite, name="a", work=lambda: torch.ones(1), **setting):
    return Comparison(suite, "subject", {"dtype": "float32", **setting}, {name: lambda: Candidate(work)})


def no_such_gpu(*_):
    raise AssertionError("Torch not compiled with CUDA enabled")


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_shown_written_and_drawn(capsys, tmp_path, suite):
    if suite in ("llm", "projectors"):
        pytest.importorskip("transformers")
    arguments = ["--suite", suite, "--dtype", "float32", "--batch", 2, "--device", "cpu"]
    printed = run(capsys, *arguments, "--json", tmp_path / "r.json", "--plots", tmp_path / "plots")
    assert f"{suite}: " in printed
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    assert printed.endswith(f"wrote {tmp_path / 'plots' / f'{suite}.png'}\nwrote {tmp_path / 'r.json'}\n")
    report = read_report(tmp_path / "r.json")
    assert report.command == f"spatial-tokens bench --suite {suite} --device cpu --dtype float32 --batch 2"
    assert report.machine.keys() >= {"device", "cores", "threads", "python", "versions", "date"}
    assert {row.suite for row in report.rows} == {suite}
    assert {row.setting.get("dtype", "float32") for row in report.rows} == {"float32"}
    assert all(f"{row.values['ms']:.3g}" in printed for row in report.rows if row.values.get("ms", 1e9) < 999)
    assert Image.open(tmp_path / "plots" / f"{suite}.png").format == "PNG"
    assert {path.name for path in tmp_path.rglob("*")} == {"r.json", "plots", f"{suite}.png"}


def test_without_a_suite_all_run_one_after_another(capsys, tmp_path, monkeypatch):
    made_up(monkeypatch, one=lambda options: iter([comparison("one")]), two=lambda options: iter([comparison("two")]))
    run(capsys, "--json", tmp_path / "r.json")
    assert [row.suite for row in read_report(tmp_path / "r.json").rows] == ["one", "two"]


def test_without_options_the_suite_chooses(capsys, monkeypatch):
    seen = []
    made_up(monkeypatch, one=lambda options: (seen.append(options), iter([comparison("one")]))[1])
    run(capsys)
    assert seen[0].dtypes == ("float32", "bfloat16")
    assert seen[0].batches == ()
    assert seen[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_random_state_is_left_alone(capsys, monkeypatch):
    made_up(monkeypatch, one=lambda options: iter([comparison("one", work=lambda: torch.rand(3))]))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(capsys)
    assert torch.equal(torch.rand(4), expected)


def test_a_contest_is_gone_before_the_next_is_made(capsys, monkeypatch):
    """At the paper's size each holds gigabytes."""
    made, alive = [], []

    def make():
        COLLECT()
        alive.append([reference for reference in made if reference() is not None])
        weight = torch.ones(4, 4)
        made.append(weakref.ref(weight))
        return weight

    def holding(number):
        shared = cache(make)
        candidates = {"a": lambda: Candidate(lambda: shared().sum())}
        return Comparison("one", "subject", {"batch": number}, candidates, weights=lambda: [shared()])

    made_up(monkeypatch, one=lambda options: map(holding, range(3)))
    run(capsys)
    assert alive == [[]] * 3


# Tables

WIDE = {
    "ms": 1234.5678, "p20_ms": 1200.1, "p80_ms": 1300.9, "ratio": 0.372, "share_of_limit": 0.87, "gb_per_s": 123.45,
    "tflop_per_s": 0.4567, "tokens": 582, "image_tokens": 582, "tokens_per_s": 123456, "parameters": 923550208,
    "gflop_per_image": 31.4, "peak_mib": 12345,
}  # fmt: skip
KERNEL = ["ms", "p20_ms", "p80_ms", "ratio", "share_of_limit", "peak_mib"]
PROJECTOR = [name for name in WIDE if name not in ("gb_per_s", "tflop_per_s", "image_tokens", "share_of_limit")]


def table(capsys, monkeypatch, rows, width):
    monkeypatch.setenv("COLUMNS", str(width))
    from rich.console import Console

    Console(width=width).print(console.subject_table(rows))
    return capsys.readouterr().out


def lines(printed):
    return [line.rstrip() for line in printed.splitlines()]


@pytest.mark.parametrize("width", [80, 100, 160, 200])
@pytest.mark.parametrize("names", [KERNEL, PROJECTOR], ids=["kernels", "projectors"])
def test_no_figure_is_cut(capsys, monkeypatch, width, names):
    values = {name: WIDE[name] for name in names}
    rows = [Row("s", "t", name, {"dtype": "bfloat16", "batch": 1}, values) for name in ("LLaVA MLP", "Q-Former")]
    printed = table(capsys, monkeypatch, rows, width)
    assert "…" not in printed
    assert "..." not in printed
    cells = [cell for heading in console.COLUMNS if (cell := console._cell(rows[0], heading))]
    shown = [line for line in lines(printed) if all(cell in line for cell in cells)]
    assert len(shown) == 2
    assert all(len(line) <= width for line in lines(printed))


@pytest.mark.parametrize("width", [80, 100])
def test_short_names_stay_whole_in_a_usual_terminal(capsys, monkeypatch, width):
    values = {name: value for name, value in WIDE.items() if name in PROJECTOR} | {"ms": 12.3, "p20_ms": 12.1, "p80_ms": 12.9}
    rows = [Row("s", "t", name, {"dtype": "bfloat16", "batch": 1}, values) for name in ("LLaVA MLP", "Q-Former")]
    printed = table(capsys, monkeypatch, rows, width)
    assert "LLaVA MLP" in printed
    assert "Q-Former" in printed


@pytest.mark.parametrize("width", [80, 200])
def test_tables_of_a_whole_run_fit_the_terminal(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    printed = run(capsys, "--suite", "kernels", "--dtype", "float32", "--batch", 1)
    assert "…" not in printed
    assert all(len(line) <= width for line in lines(printed)[2:])
    assert re.search(r"gemm +[\d.]+ +[\d.]+-[\d.]+ +[\d.]+x", printed)


def test_a_failed_row_says_so_and_why(capsys, monkeypatch):
    rows = [
        Row("s", "t", "good", {"batch": 1}, {"ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}),
        Row("s", "t", "[bold]bad[/bold]", {"batch": 1}, {}, "RuntimeError: [red]x[/red]"),
    ]
    printed = table(capsys, monkeypatch, rows, 100)
    assert re.search(r"^ +\[bold\]bad\[/bold\] +failed *$", printed, re.MULTILINE)
    assert "batch 1: [bold]bad[/bold] failed: RuntimeError: [red]x[/red]" in printed


def test_a_table_of_failures_alone(capsys, monkeypatch):
    printed = table(capsys, monkeypatch, [Row("s", "t", "a", {"batch": 1}, {}, "out of memory")], 80)
    assert "failed" in printed
    assert "out of memory" in printed


def test_a_failure_is_shown_and_the_rest_goes_on(capsys, tmp_path, monkeypatch):
    def fail():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    made_up(monkeypatch, one=lambda options: iter([comparison("one", "bad", fail), comparison("one", "good", batch=2)]))
    printed = run(capsys, "--json", tmp_path / "r.json")
    assert "bad failed: out of memory" in printed
    assert [row.failure for row in read_report(tmp_path / "r.json").rows] == ["out of memory", None]


def test_where_nothing_could_be_run_it_says_so(capsys, monkeypatch):
    def fail():
        raise RuntimeError("x")

    made_up(monkeypatch, one=lambda options: iter([comparison("one", "bad", fail)]))
    assert "nothing could be run" in run(capsys, code=2)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nonsense"), "invalid choice: 'nonsense'"),
        (("--suite", ""), "invalid choice: ''"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--device", "xpu"), "'xpu'"),
        (("--device", "meta"), "the benchmarks run on cpu and cuda, got 'meta'"),
        (("--device", "banana"), "cannot use the device 'banana'"),
        (("--device", "cpu:x"), "cannot use the device 'cpu:x'"),
        (("--device", ""), "cannot use the device ''"),
        (("--device", "cuda:99"), "cannot use the device 'cuda:99'"),
        (("--batch", "0"), "must be a positive integer, got '0'"),
        (("--batch", "-1"), "must be a positive integer, got '-1'"),
        (("--batch", "x"), "must be a positive integer, got 'x'"),
        (("--batch", "1.5"), "must be a positive integer, got '1.5'"),
        (("--batch", ""), "must be a positive integer, got ''"),
        (("--batch", "²"), "must be a positive integer, got '²'"),
        (("--nonsense",), "--help"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("compare",), "A.json, B.json"),
        (("compare", "a.json"), "B.json"),
        (("--json",), "expected one argument"),
    ],
)
def test_mistakes(capsys, nothing_runs, arguments, message):
    assert message in run(capsys, *arguments, code=2)


def test_cuda_where_there_is_none(capsys, nothing_runs, monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch, "empty", no_such_gpu)
    assert "cannot use the device 'cuda': " in run(capsys, "--device", "cuda", code=2)


@pytest.mark.parametrize("suite", ["kernels", "projectors", "scaling", "llm"])
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB"),
    ],
    ids=["cuda", "cpu"],
)
def test_no_memory_for_the_features(capsys, monkeypatch, suite, error):
    """As with `--batch 1000000000`: each shape is a failed row, or the whole is one line; never a traceback."""
    if suite in ("llm", "projectors"):
        pytest.importorskip("transformers")

    features = Options.features

    def out(options, *arguments):
        if options.device.type == "meta":
            return features(options, *arguments)
        raise error

    monkeypatch.setattr(Options, "features", out)
    try:
        code = main(["bench", "--suite", suite, "--dtype", "float32", "--batch", "2"])
    except type(error):
        pytest.fail("a traceback")
    printed = capsys.readouterr()
    assert code == 2 or "failed" in printed.out
    assert len(printed.err.splitlines()) == (1 if code == 2 else 0)


BAD_FILES = ["", ".", "/", "missing/r.json", "folder", "a\0b", "x" * 300, "file/r.json"]


@pytest.mark.parametrize("path", BAD_FILES, ids=repr)
def test_a_report_that_cannot_be_written_is_known_before_any_work(capsys, nothing_runs, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    message = run(capsys, "--json", path, code=2)
    assert ("cannot" if path else "--json must be a path, got an empty string") in message
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("path", ["", "file", "file/plots", "a\0b", "x" * 300, "/proc"], ids=repr)
def test_pictures_that_cannot_be_written_are_known_before_any_work(capsys, nothing_runs, tmp_path, monkeypatch, path):
    if path == "/proc" and not os.path.isdir(path):
        pytest.skip("no folder that is there and takes no file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert ("cannot" if path else "--plots must be a path, got an empty string") in run(capsys, "--plots", path, code=2)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [("--plots", "file"), ("--device", "banana"), ("--suite", "nonsense")])
def test_a_mistake_leaves_an_earlier_report_alone(capsys, nothing_runs, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    Report("earlier", {"device": "x"}).write("r.json")
    run(capsys, "--json", "r.json", *arguments, code=2)
    assert read_report("r.json").command == "earlier"


@pytest.mark.parametrize("library", ["rich", "matplotlib"])
def test_a_missing_library_is_known_before_any_work(capsys, nothing_runs, tmp_path, monkeypatch, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    message = run(capsys, "--plots", tmp_path / "plots", "--json", tmp_path / "r.json", code=2)
    assert "spatial-tokens[bench]" in message
    assert not (tmp_path / "r.json").exists()


# Cut short


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupt_keeps_the_finished_suites(capsys, tmp_path, monkeypatch):
    made_up(
        monkeypatch,
        one=lambda options: iter([comparison("one", "a"), comparison("one", "b", batch=2)]),
        two=lambda options: iter([comparison("two", "c"), comparison("two", "d", interrupted, batch=2)]),
        three=lambda options: iter([comparison("three", "e")]),
    )
    printed = run(capsys, "--json", tmp_path / "r.json", "--plots", tmp_path / "plots", code=130)
    assert [row.implementation for row in read_report(tmp_path / "r.json").rows][:2] == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["one.png", "two.png"]
    assert "one: subject" in printed
    assert "two: subject" in printed  # what it had of the second is shown too
    assert "three" not in printed


def test_an_interrupt_before_the_first_row_leaves_what_was_there(capsys, tmp_path, monkeypatch):
    made_up(monkeypatch, one=lambda options: iter([comparison("one", "a", interrupted)]))
    path = tmp_path / "r.json"
    run(capsys, "--json", path, code=130)
    assert not path.exists() or read_report(path).rows == []
    Report("earlier", {"device": "x"}).write(path)
    run(capsys, "--json", path, code=130)
    assert read_report(path).command == "earlier"


# Comparison


def written(path, *times, device="a CPU"):
    rows = [Row("kernels", "tokens, cropping", f"[{n}]", {"pass": "forward", "batch": n}, {"ms": ms}) for n, ms in enumerate(times)]
    Report("c", {"device": device, "date": "2025-01-02"}, rows).write(path)
    return path


@pytest.mark.parametrize("width", [80, 200])
def test_compare(capsys, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    before = written(tmp_path / "a.json", 2.0, 4.0, 1.0, device="a CPU")
    after = written(tmp_path / "b.json", 3.0, 1.0, device="a GPU")
    printed = run(capsys, "compare", before, after)
    assert "before: a CPU, 2025-01-02, 3 rows" in printed
    assert "after: a GPU, 2025-01-02, 2 rows" in printed
    assert re.search(r" 2 +3 +1\.50", printed)
    assert re.search(r" 4 +1 +0\.25", printed)
    assert all(len(line) <= width for line in lines(printed))
    assert "…" not in printed


def test_compare_slow_rows_in_plain_figures(capsys, tmp_path):
    printed = run(capsys, "compare", written(tmp_path / "a.json", 12345.6), written(tmp_path / "b.json", 2345.6))
    assert "e+" not in printed


def test_compare_what_was_measured(capsys, tmp_path):
    for name in ("a.json", "b.json"):
        run(capsys, "--suite", "limits", "--dtype", "float32", "--json", tmp_path / name)
    printed = run(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert len(re.findall(r"\d\.\d\d *$", printed, re.MULTILINE)) == 3


def test_compare_mistakes(capsys, tmp_path):
    good = written(tmp_path / "good.json", 1.0)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"a": 1}')
    Report("c", {}, []).write(tmp_path / "empty.json")
    for name, message in [
        ("bad.json", "is not JSON"),
        ("odd.json", "no benchmark report"),
        ("empty.json", "no timed row in common"),
        ("missing.json", "No such file"),
        (".", "Is a directory"),
        ("a\0b", "cannot read"),
    ]:
        assert message in run(capsys, "compare", good, tmp_path / name, code=2)
        assert message in run(capsys, "compare", tmp_path / name, good, code=2)


def test_compare_text_that_a_terminal_cannot_show(capsys, tmp_path):
    """JSON can say what UTF-8 cannot."""
    path = written(tmp_path / "a.json", 1.0)
    path.write_text(path.read_text().replace("tokens, cropping", "\\ud800"))
    try:
        code = main(["bench", "compare", str(path), str(path)])
    except UnicodeEncodeError:
        pytest.fail("a traceback")
    assert code in (0, 2)
    capsys.readouterr()


def test_help_has_an_example_and_the_suites(capsys):
    printed = run(capsys, "--help")
    assert "example:\n  spatial-tokens bench " in printed
    assert "spatial-tokens bench compare" in printed
    assert all(suite in printed for suite in SUITES)
    assert all(name in printed for name in ("--suite", "--device", "--dtype", "--batch", "--json", "--plots"))
    said = re.search(r"estimated minutes on two CPU cores: (.*); in all (\d+)", " ".join(printed.split()))
    assert [each.split()[0] for each in said[1].split(", ")] == list(SUITES)
    assert sum(int(each.split()[1]) for each in said[1].split(", ")) == int(said[2])


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_not_said_to_take_less_time_than_its_rows_did(suite):
    rows = read_report(RESULTS / f"{suite}.json").rows
    milliseconds = sum(row.values["ms"] * row.values["rounds"] for row in rows if not row.failure)
    assert milliseconds / 60_000 < MINUTES[suite]


def test_running_from_python_raises_one_of_ours(tmp_path):
    with pytest.raises(SpatialTokensError, match="cannot write"):
        command.run(Options(torch.device("cpu"), config=TINY), ["limits"], "c", str(tmp_path), None)


def test_the_report_is_json_after_every_suite(capsys, tmp_path, monkeypatch):
    seen = []

    def second(options):
        seen.append(json.loads((tmp_path / "r.json").read_text()))
        yield comparison("two")

    made_up(monkeypatch, one=lambda options: iter([comparison("one")]), two=second)
    run(capsys, "--json", tmp_path / "r.json")
    assert len(seen[0]["rows"]) == 1
