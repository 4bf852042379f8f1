"""Reports as files, two of them side by side, and as pictures; what a damaged file or a missing library is told."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from spatial_tokens.bench import console, plots
from spatial_tokens.bench.comparison import Row
from spatial_tokens.bench.plots import exponent
from spatial_tokens.bench.report import Report, paired_rows, read_report, settings_of
from spatial_tokens.errors import MissingExtraError, SpatialTokensError

MACHINE = {"device": "a CPU", "cores": 2, "versions": {"torch": "2.9"}, "date": "2025-01-02"}
GOOD = {
    "format": 1,
    "command": "spatial-tokens bench",
    "machine": MACHINE,
    "rows": [
        {"suite": "s", "subject": "t", "implementation": "i", "setting": {"batch": 1}, "values": {"ms": 2.0}, "failure": None}
    ],
}

names = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    Row, names, names, names, st.dictionaries(names, names | st.integers(0, 2**40), max_size=3),
    st.dictionaries(names, numbers, max_size=4), st.none() | names,
)  # fmt: skip


def row(ms=1.0, suite="s", subject="t", implementation="i", failure=None, **setting):
    return Row(suite, subject, implementation, setting, {} if failure else {"ms": ms}, failure)


def standard(text):
    """The value of JSON text, which may hold nothing that JSON does not have."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(st.lists(rows, max_size=4), names)
@settings(max_examples=40)
def test_what_is_written_is_read(tmp_path_factory, found, command):
    path = tmp_path_factory.mktemp("reports") / "report.json"
    report = Report(command, MACHINE, found)
    report.write(path)
    assert standard(path.read_text()).keys() == {"format", "command", "machine", "rows"}
    assert read_report(path) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_leaves_the_file_json(tmp_path, value):
    """Refused or left out, as its author likes; but other programs read these files."""
    found = Row("s", "t", "i", {}, {"ms": 1.0, "share_of_limit": value})
    try:
        Report("c", MACHINE, [found]).write(tmp_path / "report.json")
    except SpatialTokensError:
        return
    standard((tmp_path / "report.json").read_text())
    assert read_report(tmp_path / "report.json").rows[0].values["ms"] == 1.0


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    Report("before", MACHINE, [row()]).write(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SpatialTokensError, match="No space left"):
            Report("after", MACHINE, [row()]).write(path)
    assert read_report(path).command == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def message_of(path):
    with pytest.raises(SpatialTokensError) as caught:
        paired_rows(read_report(path), read_report(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("not json", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "no benchmark report of format 1: found 'list'"),
        ("null", "no benchmark report"),
        ("3", "no benchmark report"),
        ("{}", "no benchmark report of format 1: found None"),
        ('{"format": 2}', "found 2"),
        ('{"format": "1"}', "found '1'"),
        ('{"format": [[1]]}', "no benchmark report"),
        ('{"format": 1}', "damaged"),
        ('{"format": ' + "9" * 5000 + "}", ""),
        ('{"format": 1, "rows": ' + "9" * 5000 + "}", ""),
    ],
)
def test_what_is_no_report(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    assert message in message_of(tmp_path / "x.json")


def changed(place, value):
    """GOOD with another value at a place; without it where the value is `...`."""
    content = json.loads(json.dumps(GOOD))
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


ROW = ("rows", 0)
PLACES = [("command",), ("machine",), ("rows",), ROW, *[(*ROW, name) for name in GOOD["rows"][0]]]


@pytest.mark.parametrize("place", [place for place in PLACES if place != ROW], ids=str)
def test_a_missing_key(tmp_path, place):
    (tmp_path / "x.json").write_text(json.dumps(changed(place, ...)))
    assert "damaged" in message_of(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(place, value) for place in (("machine",), ("rows",), ROW) for value in (None, 3, "x", ["x"], [[]])],
        *[((*ROW, name), value) for name in ("setting", "values") for value in (None, 3, "x", ["x"])],
        ((*ROW, "setting"), {"batch": [1]}),
        ((*ROW, "setting"), {"batch": {}}),
        ((*ROW, "values"), {"ms": "fast"}),
        ((*ROW, "values"), {"ms": "two\nlines"}),
        ((*ROW, "values"), {"ms": None}),
        ((*ROW, "values"), {"ms": [1]}),
        ((*ROW, "values"), {"ms": 10**400}),
        ((*ROW, "values"), {"ms": 0}),
        ((*ROW, "values"), {"ms": -1}),
        ((*ROW, "values"), {"ms": float("nan")}),
        ((*ROW, "values"), {"ms": float("inf")}),
        ((*ROW, "failure"), 3),
        ((*ROW, "failure"), ["x"]),
    ],
    ids=str,
)
def test_a_wrong_type(tmp_path, place, value):
    (tmp_path / "x.json").write_text(json.dumps(changed(place, value)))
    message_of(tmp_path / "x.json")


def test_what_is_no_file(tmp_path):
    assert "No such file" in message_of(tmp_path / "missing.json")
    assert "Is a directory" in message_of(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    assert "cannot read" in message_of(tmp_path / "x.json")


def fails_in_one_line(path):
    """The report, if there is one and it can be compared."""
    caught = None
    try:
        report = read_report(path)
        pairs = paired_rows(report, report)
    except SpatialTokensError as error:
        caught = str(error)
    if caught is not None:
        assert len(caught.splitlines()) == 1
        return None
    assert all(isinstance(ratio, float) for _, _, ratio in pairs)
    return report


@given(st.binary(max_size=60), st.integers(0, 300), st.booleans())
@example(b"\xed\xa0\x80", 40, True)
@settings(max_examples=150)
def test_fuzzed_bytes(tmp_path_factory, noise, place, replace):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    text = json.dumps(GOOD).encode()
    path.write_bytes(text[:place] + noise + text[place + (len(noise) if replace else 0) :])
    fails_in_one_line(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names, lambda inner: st.lists(inner) | st.dictionaries(names, inner)
)


@given(st.sampled_from(PLACES), json_values)
@settings(max_examples=150)
def test_fuzzed_values(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(changed(place, value)))
    if report := fails_in_one_line(path):
        assert isinstance(report.machine, dict)
        assert isinstance(report.command, str)


# Comparison


def test_comparison_is_the_seconds_time_over_the_firsts():
    before = Report("", MACHINE, [row(2.0, batch=1), row(4.0, batch=2), row(1.0, batch=3), row(failure="x", batch=4)])
    after = Report("", MACHINE, [row(2.0, batch=2), row(3.0, batch=1), row(failure="x", batch=3), row(9.0, batch=4), row(1.0)])
    pairs = paired_rows(before, after)
    assert [(a.setting, b.setting, ratio) for a, b, ratio in pairs] == [
        ({"batch": 2}, {"batch": 2}, 0.5),
        ({"batch": 1}, {"batch": 1}, 1.5),
    ]


@pytest.mark.parametrize("other", [{"suite": "x"}, {"subject": "x"}, {"implementation": "x"}, {"batch": 2}, {"dtype": "x"}])
def test_rows_of_anything_else_are_not_the_same(other):
    with pytest.raises(SpatialTokensError, match="no timed row in common"):
        paired_rows(Report("", {}, [row(batch=1)]), Report("", {}, [row(**{"batch": 1, **other})]))


def test_the_order_of_settings_does_not_matter():
    first, second = row(1.0, batch=1, dtype="a"), row(2.0, dtype="a", batch=1)
    assert paired_rows(Report("", {}, [first]), Report("", {}, [second])) == [(first, second, 2.0)]


def test_empty_reports_have_nothing_in_common():
    with pytest.raises(SpatialTokensError, match="no timed row in common"):
        paired_rows(Report("", {}), Report("", {}))


def test_settings_in_the_order_in_which_they_come():
    assert settings_of([row(b=1, a=2), row(c=3, a=1)]) == ["b", "a", "c"]


# The fitted exponent

positive = st.floats(1e-3, 1e6)


@given(st.lists(st.tuples(st.integers(1, 5000), positive), min_size=2, max_size=12, unique_by=lambda point: point[0]))
def test_exponent_is_polyfits_slope(points):
    expected = np.polyfit(*np.log(np.array(points)).T, 1)[0]
    assert exponent(points) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.floats(-3, 3), positive, st.lists(st.integers(1, 5000), min_size=2, max_size=9, unique=True))
def test_exponent_of_a_power(power, factor, sizes):
    assert exponent([(size, factor * size**power) for size in sizes]) == pytest.approx(power, abs=1e-6)


@given(st.integers(1, 5000) | positive, st.lists(positive, max_size=12))
def test_one_size_has_no_exponent(size, times):
    assert exponent([(size, seconds) for seconds in times]) is None


def test_what_has_no_logarithm_is_passed_over():
    points = [(1, 2.0), (2, 4.0), (4, 8.0)]
    assert exponent([(0, 3.0), (3, 0.0), (-1, 5.0), *points, (8, -1.0)]) == pytest.approx(1)
    assert exponent([(1, 0.0), (2, 0.0)]) is None
    assert exponent(iter(points)) == pytest.approx(1)


# Figures in cells


def test_each_cell_says_what_its_heading_says():
    values = {
        "ms": 1.5, "p20_ms": 1.25, "p80_ms": 2.5, "ratio": 4.0, "share_of_limit": 0.87, "gb_per_s": 18.94, "tflop_per_s": 0.0421,
        "tokens": 144, "image_tokens": 582, "tokens_per_s": 1530, "parameters": 24800, "gflop_per_image": 2.45, "peak_mib": 1234.4,
        "held_mib": 480.6,
    }  # fmt: skip
    assert {heading: cell(values) for heading, cell in console.COLUMNS.items()} == {
        "ms": "1.5", "p20-p80": "1.25-2.5", "faster": "4.00x", "of limit": "87%", "GB/s": "18.9", "TFLOP/s": "0.0421",
        "tokens": "144", "image tokens": "582", "tokens/s": "1.53k", "params": "24.8k", "FLOP": "2.45G", "held MiB": "481",
        "peak MiB": "1,234",
    }  # fmt: skip


@given(st.floats(1e-4, 1e7))
def test_milliseconds_are_never_in_scientific_notation(ms):
    values = {"ms": ms, "p20_ms": ms, "p80_ms": ms}
    for heading in ("ms", "p20-p80"):
        assert "e+" not in console.COLUMNS[heading](values)


@given(st.floats(1, 1e14))
@example(999.7)
@example(999_999.0)
def test_short_numbers_are_numbers(number):
    text = console._short(number)
    assert "e+" not in text
    size = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}.get(text[-1])
    assert float(text[:-1] if size else text) * (size or 1) == pytest.approx(number, rel=6e-3)


@pytest.mark.parametrize(
    ("number", "text"), [(923550208, "924M"), (28.3e6, "28.3M"), (5, "5"), (1.5e12, "1.5T"), (7090000, "7.09M")]
)
def test_short(number, text):
    assert console._short(number) == text


# Pictures


def suite_rows(suite):
    if suite == "scaling":
        return [
            Row("scaling", subject, name, {"pass": "forward", "dtype": dtype, subject: n}, {"ms": 0.1 * n**power, "peak_mib": n})
            for subject, more in (("batch", 0), ("grid", 1)) for dtype in ("float32", "bfloat16") for n in (1, 4, 16)
            for name, power in (("SP", 1 + more), ("SP, factorized", 2 + more))
        ]  # fmt: skip
    return [
        Row(suite, subject, name, {"dtype": "float32", "batch": batch}, {"ms": batch * 1.5, "p20_ms": 1.0, "p80_ms": 2.0})
        for subject in ("one", "two") for batch in (1, 8) for name in ("naive", "gemm")
    ]  # fmt: skip


SUITE_NAMES = ("limits", "kernels", "projectors", "llm", "scaling")


def colors(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 150
        return len(picture.convert("RGB").getcolors(picture.width * picture.height))


def test_each_suite_is_a_picture_and_nothing_else_is_touched(tmp_path):
    folder = tmp_path / "new" / "plots"
    folder.mkdir(parents=True)
    for name in ("kernels.png", "mine.png", "notes.txt"):
        (folder / name).write_bytes(b"mine")
    report = Report("c", MACHINE, [row for suite in SUITE_NAMES for row in suite_rows(suite)])
    paths = plots.draw(report, str(folder))
    assert paths == [str(folder / f"{suite}.png") for suite in SUITE_NAMES]
    assert all(colors(path) > 10 for path in paths)
    assert {path.name for path in folder.iterdir()} == {Path(path).name for path in paths} | {"mine.png", "notes.txt"}
    assert (folder / "mine.png").read_bytes() == (folder / "notes.txt").read_bytes() == b"mine"


def test_a_suite_that_failed_has_no_picture(tmp_path):
    report = Report("c", MACHINE, [row(suite="kernels", failure="out of memory"), *suite_rows("limits")])
    assert plots.draw(report, str(tmp_path)) == [str(tmp_path / "limits.png")]
    assert plots.draw(Report("c", {}), str(tmp_path)) == []


@pytest.mark.parametrize("strange", [{"peak_mib": 0.0}, {"peak_mib": -1.0}, {}])
def test_scaling_without_all_its_figures(tmp_path, strange):
    found = [Row("scaling", "batch", "SP", {"dtype": "a", "batch": 1}, {"ms": 1.0, **strange})]
    assert colors(plots.draw(Report("c", MACHINE, found), str(tmp_path))[0]) > 10


def figure_of(suite):
    return plots._scaling(suite_rows(suite)) if suite == "scaling" else plots._times(suite_rows(suite))


def test_scaling_with_a_size_that_failed():
    found = suite_rows("scaling")
    found[2] = Row("scaling", "batch", "SP", found[2].setting, failure="no memory")
    assert len(plots._scaling(found).axes[0].lines[0].get_xdata()) == 2


def test_scaling_names_its_axes_units_and_exponents():
    axes = figure_of("scaling").axes
    assert [axis.get_xlabel() for axis in axes] == ["batch", "grid"] * 2
    assert [axis.get_ylabel().split()[0] for axis in axes] == ["milliseconds"] * 2 + ["peak"] * 2
    assert {axis.get_xscale() for axis in axes} == {axis.get_yscale() for axis in axes} == {"log"}
    assert [[text.get_text() for text in axis.get_legend().get_texts()] for axis in axes[:2]] == [
        [f"SP, float32: {subject}^{power}.00", f"SP, factorized, float32: {subject}^{power + 1}.00",
         f"SP, bfloat16: {subject}^{power}.00", f"SP, factorized, bfloat16: {subject}^{power + 1}.00"]
        for subject, power in (("batch", 1), ("grid", 2))
    ]  # fmt: skip


def test_points_name_their_rows_times_and_unit():
    axes = figure_of("kernels").axes
    assert [axis.get_title(loc="left") for axis in axes] == [f"float32, batch {n} (milliseconds)" for n in (1, 8)]
    expected = [f"{subject}: {name}" for subject in ("one", "two") for name in ("naive", "gemm")]
    assert all([text.get_text() for text in axis.get_yticklabels()] == expected for axis in axes)
    assert [line.get_xdata()[0] for line in axes[1].lines] == [12.0] * 4
    assert [text.get_text().strip() for text in axes[1].texts] == ["12"] * 4


def test_a_failure_is_a_line_that_says_so():
    found = suite_rows("kernels")
    found[0] = Row("kernels", "one", "naive", found[0].setting, failure="no memory")
    first, second = plots._times(found).axes
    assert [text.get_text().strip() for text in first.texts] == ["failed", "1.5", "1.5", "1.5"]
    assert len(first.lines) == 3
    assert len(second.lines) == 4


def test_a_baseline_is_drawn_once():
    setting = {"dtype": "float32", "batch": 1}
    found = [Row("projectors", x, name, setting, {"ms": 2.0}) for x in ("A", "B") for name in ("base", x)]
    (axis,) = plots._times(found).axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["base", "A", "B"]


def test_pictures_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpatialTokensError, match="cannot make the directory"):
        plots.draw(Report("c", MACHINE, [row()]), str(tmp_path / "file"))
    (tmp_path / "s.png").mkdir()
    with pytest.raises(SpatialTokensError, match="cannot write"):
        plots.draw(Report("c", MACHINE, [row()]), str(tmp_path))


def without(monkeypatch, library):
    for name in list(sys.modules):
        if name.split(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


def test_missing_libraries_name_the_extra(monkeypatch, tmp_path):
    for library, use in (
        ("matplotlib", lambda: plots.draw(Report("c", {}, [row()]), str(tmp_path))),
        ("rich", console.require_rich),
    ):
        with monkeypatch.context() as patch:
            without(patch, library)
            with pytest.raises(MissingExtraError) as caught:
                use()
        assert str(caught.value) == f"{library} is not installed; run: pip install 'spatial-tokens[bench]'"
