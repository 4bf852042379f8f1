"""Comparisons of made-up candidates: what is timed, what is not and why, and the figures that follow from the times."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens.bench import measure, runner
from spatial_tokens.bench.comparison import Candidate, Comparison
from spatial_tokens.bench.measure import Times, peak_bytes, side_by_side
from spatial_tokens.bench.runner import run_comparison
from spatial_tokens.errors import SpatialTokensError
from tests.bench.tiny import CPU

NAN, INF = float("nan"), float("inf")
EXPECTED = torch.arange(1.0, 7.0).view(2, 3)


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # a fifth of a second each, with all that pytest keeps


@pytest.fixture
def runs(monkeypatch):
    """The names of the candidates, each as often as it was timed."""
    timed = []
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: (timed.append(work()), 1.0)[1])
    return timed


def named(name, result):
    """An candidate whose timed work gives its name, checked by the result."""
    tensors = result if isinstance(result, list) else [result]
    return lambda: Candidate(lambda: name, lambda outcome: tensors)


def comparison(candidates, **fields):
    return Comparison("suite", "subject", {"dtype": "float32"}, candidates, **fields)


def run(candidates, peak=None, **fields):
    return {row.implementation: row for row in run_comparison(comparison(candidates, **fields), CPU, peak)}


def rising(*errors):
    def build():
        raise errors[0]

    return build


@pytest.mark.parametrize(
    "result",
    [
        EXPECTED * 1.001,
        EXPECTED * NAN,
        EXPECTED * INF,
        EXPECTED.where(EXPECTED < 6, NAN),
        torch.zeros(2, 3),
        -EXPECTED,
        EXPECTED.flip(0),
    ],
)
def test_a_wrong_result_is_a_failed_row_and_is_never_timed(runs, result):
    rows = run({"right": named("right", EXPECTED), "wrong": named("wrong", result)}, reference="right")
    assert rows["wrong"].failure.startswith("wrong: off by ")
    assert rows["wrong"].values == {}
    assert rows["right"].failure is None
    assert set(runs) == {"right"}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [NAN, INF, 100.0])
def test_one_wrong_tensor_of_several_is_enough(runs, position, value):
    three = [EXPECTED.clone() for _ in range(3)]
    three[position] = three[position].index_fill(0, torch.tensor([0]), value)
    rows = run({"right": named("right", [EXPECTED] * 3), "wrong": named("wrong", three)}, reference="right")
    assert rows["wrong"].failure.startswith("wrong: off by ")
    assert set(runs) == {"right"}


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (torch.ones(2, 3), torch.ones(3)),  # these would be equal once broadcast
        (torch.ones(2, 3), torch.ones(1, 2, 3)),
        (torch.ones(2, 1), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.tensor(1.0)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2, 3), [torch.ones(2, 3), torch.ones(2, 3)]),
        ([torch.ones(2, 3)] * 2, torch.ones(2, 3)),
        (torch.ones(2, 3), []),
    ],
)
def test_another_shape_or_number_of_tensors_is_a_failed_row(runs, expected, found):
    rows = run({"right": named("right", expected), "wrong": named("wrong", found)}, reference="right")
    assert rows["wrong"].failure
    assert "\n" not in rows["wrong"].failure
    assert rows["right"].failure is None
    assert set(runs) == {"right"}


def test_within_the_tolerance_is_right_and_the_error_is_told(runs):
    candidates = {"right": named("right", EXPECTED), "near": named("near", EXPECTED * 1.005), "far": named("far", EXPECTED * 1.02)}
    rows = run(candidates, reference="right", tolerance=1e-2)
    assert rows["near"].failure is None
    assert rows["near"].values["error"] == pytest.approx(0.005, rel=1e-3)
    assert "error" not in rows["right"].values
    assert rows["far"].failure == "wrong: off by 2.0e-02 of the reference's norm"


def test_zeros_that_agree_are_right(runs):
    zeros = torch.zeros(2, 3)
    rows = run({"right": named("right", [EXPECTED, zeros]), "same": named("same", [EXPECTED, zeros])}, reference="right")
    assert rows["same"].failure is None


@pytest.mark.parametrize(("second", "wrong"), [(EXPECTED, False), (EXPECTED * 2, True)])
def test_an_entry_that_shares_some_tensors_with_the_reference_is_held_to_those(runs, second, wrong):
    def some():
        return Candidate(lambda: "some", lambda outcome: [EXPECTED, second], num_compared=2)

    rows = run({"right": named("right", [EXPECTED, EXPECTED, torch.ones(5)]), "some": some}, reference="right")
    assert bool(rows["some"].failure) == wrong
    fewer = run({"right": named("right", [EXPECTED]), "some": some}, reference="right")
    assert fewer["some"].failure.startswith("SpatialTokensError: wrong: gave ")


def test_without_a_reference_nothing_is_checked(runs):
    rows = run({"a": named("a", EXPECTED), "b": named("b", torch.ones(7))})
    assert all(row.failure is None and "error" not in row.values for row in rows.values())
    assert runs == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("a tensor\nis\nwrong"), "RuntimeError: a tensor"),
        (SpatialTokensError("no such backend"), "SpatialTokensError: no such backend"),
        (ZeroDivisionError(), "ZeroDivisionError: ZeroDivisionError"),
        (AssertionError("\n\n"), "AssertionError: AssertionError"),
        (KeyError("x"), "KeyError: 'x'"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "out of memory"),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * 146}"),
    ],
)
@pytest.mark.parametrize("when", ["built", "run", "checked"])
def test_what_an_entry_raises_is_its_rows_to_tell(runs, error, line, when):
    def fail(*_):
        raise error

    bad = {"built": fail, "run": lambda: Candidate(fail), "checked": lambda: Candidate(lambda: "bad", fail)}[when]
    rows = run({"first": named("first", EXPECTED), "bad": bad, "last": named("last", EXPECTED)}, reference="first")
    assert rows["bad"].failure == line
    assert rows["bad"].values == {}
    assert rows["first"].failure is rows["last"].failure is None
    assert set(runs) == {"first", "last"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_let_through(error):
    with pytest.raises(error):
        run({"bad": rising(error())})


def test_a_reference_that_fails_leaves_nothing_to_check_against(runs):
    built = []

    def other():
        built.append("other")
        return named("other", EXPECTED)()

    rows = run({"other": other, "naive": rising(RuntimeError("broken"))}, reference="naive", baseline="other")
    assert rows["naive"].failure == "RuntimeError: broken"
    assert rows["other"].failure == "not checked, as naive failed"
    assert built == runs == []


def test_an_entry_that_fails_while_it_is_timed(monkeypatch):
    left = [1]

    def work():
        if not left:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return left.pop()

    rows = run({"a": lambda: Candidate(work), "b": named("b", EXPECTED), "c": rising(ValueError("c's own"))})
    assert rows["a"].failure == "out of memory"
    assert rows["c"].failure == "ValueError: c's own"
    assert all(row.values == {} for row in rows.values() if row.failure)


def test_more_memory_than_there_is_is_not_tried(monkeypatch):
    monkeypatch.setattr(runner, "free_memory", lambda device: 3 * 2**30)
    rows = run({"a": rising(AssertionError("built")), "b": rising(AssertionError("built"))}, memory=5 * 2**30)
    assert {row.failure for row in rows.values()} == {"needs about 5.0 GiB, 3.0 GiB are free"}
    assert run({"a": named("a", EXPECTED)}, memory=3 * 2**30)["a"].failure is None
    monkeypatch.setattr(runner, "free_memory", lambda device: None)
    assert run({"a": named("a", EXPECTED)}, memory=2**60)["a"].failure is None


def test_rows_come_in_the_entries_order_whatever_is_checked_first(runs):
    candidates = {
        "last": named("last", EXPECTED),
        "bad": rising(ValueError("x")),
        "reference": named("reference", EXPECTED),
        "wrong": named("wrong", -EXPECTED),
        "first": named("first", EXPECTED),
    }
    rows = run_comparison(comparison(candidates, reference="reference"), CPU, None)
    assert [row.implementation for row in rows] == list(candidates)
    assert all(
        row.suite == "suite" and row.setting == {"dtype": "float32"} for row in run_comparison(comparison(candidates), CPU, None)
    )


@pytest.fixture
def clock(monkeypatch):
    """Every work says how long it takes; reading the weights takes half a second."""

    def seconds(work, device):
        taken = work()
        return taken if isinstance(taken, float) else 0.5

    monkeypatch.setattr(measure, "seconds_of", seconds)


def taking(seconds, **fields):
    return lambda: Candidate(lambda: seconds, lambda outcome: [EXPECTED], **fields)


def test_ratio_finish_and_values(clock):
    candidates = {
        "slow": taking(2.0),
        "fast": taking(0.25, values={"parameters": 7}, finish=lambda seconds: {"tokens_per_s": 10 / seconds}),
    }
    rows = run(candidates, baseline="slow", reference="slow")
    assert rows["slow"].values["ratio"] == 1
    assert rows["fast"].values["ratio"] == 8
    assert rows["fast"].values["tokens_per_s"] == 40
    assert rows["fast"].values["parameters"] == 7
    assert [rows["fast"].values[name] for name in ("ms", "p20_ms", "p80_ms", "rounds")] == [250, 250, 250, 2]


def test_no_ratio_without_its_baseline(clock):
    assert "ratio" not in run({"a": taking(1.0)})["a"].values
    assert "ratio" not in run({"a": taking(1.0), "b": rising(ValueError("x"))}, baseline="b")["a"].values


@pytest.mark.parametrize(
    ("num_bytes", "num_flops", "limit"),
    [(4000, 0, 2.5), (1600, 10, 1.0), (1600, 300, 3.0), (0, 0, 0.0)],  # 800 bytes in 0.5 s; 100 operations a second
)
def test_the_limit_is_the_slower_of_moving_and_doing(clock, num_bytes, num_flops, limit):
    weights = [torch.randn(10, 10), torch.randn(10, 10)]
    fields = {"num_bytes": num_bytes, "num_flops": num_flops, "weights": lambda: weights}
    rows = run({"a": taking(4.0), "b": taking(8.0)}, peak=100.0, **fields)
    assert rows["a"].values["read_gb_per_s"] == pytest.approx(1600e-9)
    assert rows["a"].values["limit_ms"] == pytest.approx(1000 * limit)
    assert rows["a"].values["share_of_limit"] == pytest.approx(limit / 4)
    assert rows["b"].values["share_of_limit"] == pytest.approx(limit / 8)
    assert set(rows) == {"a", "b"}  # what reads the weights is no competitor


def test_an_entry_with_less_to_do_has_a_limit_of_its_own(clock):
    fields = {"num_bytes": 1600, "num_flops": 10, "weights": lambda: [torch.randn(10, 40)]}
    rows = run({"all": taking(4.0), "less": taking(0.5, work=(160, 20))}, peak=100.0, **fields)
    assert rows["all"].values["share_of_limit"] == pytest.approx(0.5 / 4)
    assert rows["less"].values["share_of_limit"] == pytest.approx(0.2 / 0.5)


@pytest.mark.parametrize(("peak", "weights"), [(None, [torch.randn(2, 2)]), (1.0, [])])
def test_no_limit_without_a_peak_or_weights(clock, peak, weights):
    values = run({"a": taking(1.0)}, peak=peak, weights=lambda: weights, num_bytes=8, num_flops=8)["a"].values
    assert not {"limit_ms", "share_of_limit", "read_gb_per_s"} & values.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5)])
def test_weights_of_any_dtype_and_shape_can_be_read(dtype, shape):
    values = run({"a": named("a", EXPECTED)}, peak=1.0, weights=lambda: [torch.randn(shape).to(dtype)])["a"].values
    assert values["read_gb_per_s"] > 0


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=60), st.sampled_from([0.2, 0.5, 0.8]))
def test_quantiles_are_numpys(seconds, share):
    assert Times(tuple(seconds)).quantile(share) == pytest.approx(np.quantile(seconds, share), rel=1e-12)
    assert Times(tuple(seconds)).median == pytest.approx(np.median(seconds), rel=1e-12)


def test_works_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 3)
    order = []
    times = side_by_side({name: lambda name=name: order.append(name) for name in "abc"}, CPU, budget=0)
    assert order == list("abc") * 3
    assert [len(times[name].seconds) for name in "abc"] == [3, 3, 3]


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (4.5, 5), (100.0, 7)])  # a second each round
def test_rounds_end_with_the_budget_but_not_before_the_least(monkeypatch, budget, rounds):
    now = [0.0]
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 7)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += 1

    times = side_by_side({"a": work}, CPU, budget)
    assert times["a"].seconds == (1.0,) * rounds


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [(0, (2, 2, 2)), (8, (2, 2, 5)), (18, (2, 4, 4)), (300, (3, 3, 3))],  # two rounds take 200, 8 and 2 seconds
)
def test_the_slowest_stop_after_the_least_rounds_and_the_others_go_on(monkeypatch, budget, rounds):
    now = [0.0]
    monkeypatch.setattr(measure, "MOST_ROUNDS", 5)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    times = side_by_side({"a": taking(100), "b": taking(4), "c": taking(1)}, CPU, budget)
    assert tuple(len(times[name].seconds) for name in "abc") == rounds


def test_what_is_to_be_in_the_cache_runs_once_more_untimed(monkeypatch):
    order, timed = [], []
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: (timed.append(work()), 1.0)[1])
    side_by_side({name: lambda name=name: (order.append(name), name)[1] for name in "ab"}, CPU, budget=0, in_cache=["b"])
    assert order == list("abb") * 2
    assert timed == list("ab") * 2


def test_seconds_are_seconds():
    assert 0.02 <= measure.seconds_of(lambda: measure.time.sleep(0.02), CPU) < 0.2


LARGE = 64 * 2**20


def alone():
    return torch.ones(LARGE // 4).sum()


def given_back():
    return torch.ones(LARGE // 4)


def nested():
    return [torch.ones(LARGE // 8), (torch.ones(LARGE // 8), "no tensor")]


def two_and_one_kept():
    return torch.ones(LARGE // 4) + 1


@pytest.mark.parametrize(
    ("work", "expected"), [(alone, LARGE), (given_back, 0), (nested, 0), (two_and_one_kept, LARGE), (lambda: None, 0)]
)
def test_peak_memory_is_what_is_allocated_but_not_the_result(work, expected):
    found = peak_bytes(work, CPU)
    if found is None:
        pytest.skip("the system does not say")
    assert math.isclose(found, expected, rel_tol=0.2, abs_tol=4 * 2**20)


def test_an_earlier_peak_is_forgotten():
    alone()
    found = peak_bytes(lambda: torch.ones(2**20), CPU)
    assert found is None or found < 8 * 2**20


def test_peak_memory_is_left_out_where_the_system_does_not_say(monkeypatch, clock):
    monkeypatch.setattr(runner, "peak_bytes", lambda work, device: None)
    assert "peak_mib" not in run({"a": taking(1.0)})["a"].values


def test_cudnn_is_put_back():
    before = torch.backends.cudnn.benchmark
    inside = []

    def fail():
        with runner.cudnn_benchmark():
            inside.append(torch.backends.cudnn.benchmark)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert inside == [True]
    assert torch.backends.cudnn.benchmark == before
