"""The command: it goes on where it stopped, and its tables say what its runs say."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from math import gamma, pi, sqrt
from random import Random
from statistics import mean, stdev

import numpy as np
import pytest
import torch

pytest.importorskip("torch", minversion="2.9")  # Muon
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from benchmarks.spatial_vqa import dense_or_factorized, run, tables, tasks
from benchmarks.spatial_vqa.designs import (
    BINS,
    CROPPING,
    DESIGNS,
    DETAIL,
    FACTORIZED,
    FACTORIZED_POOLING,
    MAIN,
    MLP,
    PLACES,
    POOLING,
)
from benchmarks.spatial_vqa.encoder import as_pixels, rolled_features_of
from benchmarks.spatial_vqa.estimates import STUDENT, accuracy, chance, difference, estimate, sampling_error
from benchmarks.spatial_vqa.optimization import Pretraining
from benchmarks.spatial_vqa.plans import LONG, LONGER, MEDIUM, MORE_SCENES, PLANS, Compression, Job, Plan
from benchmarks.spatial_vqa.results import COMMITTED, Results, committed
from benchmarks.spatial_vqa.splits import examples, pictures
from benchmarks.spatial_vqa.training import KernelRate, Schedule
from benchmarks.spatial_vqa.words import questions_of
from spatial_tokens import SpatialTokensError
from spatial_tokens.demo.questions import CATEGORIES, KINDS
from spatial_tokens.storage.files import read_tensors

SHORT = Schedule(scenes=8, steps=(1, 2), curve=2)


def tiny(*jobs, steps=2):
    return Plan(
        name="quick", vision=Pretraining(8, steps, 4, 1e-3), language=Pretraining(8, steps, 4, 1e-3),
        held_out={"validation": 4, "test": 6, "hard": 6}, jobs=jobs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder after one run of two, and what it held then."""
    work = tmp_path_factory.mktemp("work")
    patch = pytest.MonkeyPatch()
    first, second = Job(MLP.name, 0, SHORT), Job(DETAIL[0].name, 1, SHORT, 0.25, rolled=True)
    try:
        patch.setitem(PLANS, "quick", tiny(first, Job(MLP.name, 1, SHORT, rolled=True)))
        command = ["--quick", "--work", str(work), "--workers", "1"]
        run.main([*command])
        before = {path.name: path.stat().st_mtime_ns for path in (work / "quick").rglob("*.*") if path.name != "results.json"}
        assert json.loads((work / "quick" / "results.json").read_text())["minutes"] > 0
        patch.setitem(PLANS, "quick", tiny(first, second))
        run.main(command)
        return work / "quick", before
    finally:
        patch.undo()


def test_nothing_is_done_twice(work):
    folder, before = work
    after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != "results.json"}
    kept = {name: when for name, when in before.items() if name != "made_from.json"}
    assert kept.items() <= after.items()
    assert len(after) == len(before) + 1


def test_results_are_the_plans_runs(work):
    told = json.loads((work[0] / "results.json").read_text())
    assert [(each["design"], each["seed"], each["scale"], each["rolled"]) for each in told["runs"]] == [
        ("MLP", 0, 1.0, False), (DETAIL[0].name, 1, 0.25, True),
    ]  # fmt: skip
    assert told["planned"] == 2
    for each in told["runs"]:
        assert {kind: asked for kind, (_, asked) in each["test"].items()} == dict.fromkeys(KINDS, 6)
        assert [point["step"] for point in each["curve"]] == [1, 2]
        assert each["seconds"] > 0
    (path,) = (work[0] / "runs").glob("SFE*_rolled_1.json")
    attention = json.loads(path.read_text())["attention"]
    for kind, each in told["runs"][1]["attention"].items():
        assert each["max_over_min"] >= 1
        found = attention[kind].pop("map")
        assert each == attention[kind]  # maps are of the first seed alone
        assert len(found) == 6
        assert all(sum(row) == pytest.approx(1, abs=2e-3) for row in found)
    assert told["pretrained"]["encoder"]["seconds"] > 0
    assert told["pretrained"]["from_words"]["test"].keys() == set(KINDS)


def test_what_was_found_is_shown_at_the_end(work, monkeypatch, capsys):
    monkeypatch.setitem(PLANS, "quick", tiny(Job(MLP.name, 0, SHORT), Job(MLP.name, 1, SHORT)))
    monkeypatch.setenv("COLUMNS", "100")
    run.main(["--quick", "--work", str(work[0].parent), "--minutes", "0"])
    shown = capsys.readouterr().out
    told = json.loads((work[0] / "results.json").read_text())
    (row,) = (line.split() for line in shown.splitlines() if line.split()[:1] == ["MLP"])
    assert row == ["MLP", "1", *(f"{accuracy(told['runs'][0][split]):.1f}" for split in ("test", "hard"))]
    assert "95 % interval" in shown
    assert f"1 of 2 runs are in {work[0] / 'results.json'}" in shown.replace("\n", "")
    assert "minutes" not in told  # the first command was another


def test_a_stop_before_the_encoder_is_there_is_no_error(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PLANS, "quick", tiny(Job(MLP.name, 0, SHORT)))
    (tmp_path / "quick").mkdir()
    for path in work[0].glob("language_model.*"):
        shutil.copy(path, tmp_path / "quick")
    run.main(["--quick", "--work", str(tmp_path), "--minutes", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 runs are done"
    assert not (tmp_path / "quick" / "results.json").exists()


def test_another_encoder_is_refused(work, monkeypatch):
    monkeypatch.setitem(PLANS, "quick", tiny(Job(MLP.name, 0, SHORT), steps=3))
    with pytest.raises(SpatialTokensError, match="another plan"):
        run.main(["--quick", "--work", str(work[0].parent)])


@pytest.mark.parametrize("words", [[], ["--quick", "--full"], ["--quick", "--workers", "two"]])
def test_wrong_words_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run.main(words)
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_is_named(work, tmp_path):
    folder = shutil.copytree(work[0], tmp_path / "quick")
    damaged = next((folder / "runs").glob("*.json"))
    damaged.write_text(damaged.read_text()[:-9])
    plan = tiny(Job(MLP.name, 0, SHORT), Job(DETAIL[0].name, 1, SHORT, 0.25, rolled=True))
    with pytest.raises(SpatialTokensError, match=rf"{re.escape(str(damaged))} is damaged .*delete it"):
        run.collect(plan, folder)
    with pytest.raises(SpatialTokensError, match="is damaged"):  # before other runs begin
        run.run_plan(tiny(Job(MLP.name, 7, SHORT)), folder, workers=1, until=float("inf"))
    assert not list((folder / "runs").glob("MLP*_7.json"))


def test_figures_that_were_deleted_are_made_again(work, tmp_path):
    folder = shutil.copytree(work[0], tmp_path / "quick")
    (folder / "language_model.json").unlink()
    tasks.make_language_model(tiny(), folder)
    assert json.loads((folder / "language_model.json").read_text()).keys() == {"seconds", "right"}
    assert (folder / "language_model.safetensors").read_bytes() == (work[0] / "language_model.safetensors").read_bytes()


def killed(*_):
    os._exit(1)


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "make_language_model", killed)
    with pytest.raises(SpatialTokensError, match=r"was killed.*fewer --workers"):
        run.run_plan(tiny(), tmp_path, workers=1, until=float("inf"))


def test_without_a_terminal_progress_is_lines(work, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(work[0], tmp_path / "quick")
    job = Job(MLP.name, 7, SHORT)
    run.run_plan(tiny(job), folder, workers=1, until=float("inf"))
    told = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if job.name in line and line[2] == ":"]
    assert told == [f"{job.name}: 1 of 3", f"{job.name}: 3 of 3"]


def test_a_plan_goes_on_in_anothers_folder_and_compresses_what_it_kept(work, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(work[0], tmp_path / "quick")
    job = Job(CROPPING.name, 0, SHORT, rolled=True, kernel_rate=KernelRate(0.1))
    plan = replace(tiny(job, Compression(job, 3, 4, tuning=1)), name="factorized", folder="quick")
    monkeypatch.setitem(PLANS, "factorized", plan)
    monkeypatch.setitem(PLANS, "quick", tiny(Job(MLP.name, 0, SHORT)))  # the command's other plans do not matter
    command = ["--factorized", "--work", str(tmp_path), "--workers", "1"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    run.main(command)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before
    assert "2 of 2 runs" in capsys.readouterr().out
    told = json.loads((tmp_path / "factorized" / "results.json").read_text())
    (one,), (small,) = told["runs"], told["compressions"]
    assert one["kernel_rate"] == asdict(job.kernel_rate)
    assert one["kernel_parameters"] == sum(128 * 64 * k * k for k in (2, 4, 6, 8, 10, 12)) == small["dense_kernel_parameters"]
    assert small["kernel_parameters"] == 128 * 4 + (4 + 5 * 9) * 4 * 64
    assert not {"strangers", "attention", "steps"} & one.keys()
    assert len(one["curve"]) == 1
    for name in ("compressed", "tuned", "dense_tuned"):
        assert {kind: asked for kind, (_, asked) in small[name]["hard"].items()} == dict.fromkeys(KINDS, 6)
    tasks.model_file(folder, job).unlink()  # then it is trained again, and no other is
    assert [run.is_done(each, plan, folder) for each in plan.jobs] == [False, True]


def test_features_and_rolled_ones_are_kept_apart(work):
    kept = {rolled: tasks.load_material(work[0], rolled, tiny().language) for rolled in (False, True)}
    for rolled, name in ((False, "features"), (True, "rolled_features")):
        for split, tensor in read_tensors(work[0] / f"{name}.safetensors").items():
            assert torch.equal(kept[rolled][split].features, tensor)
    assert not torch.equal(kept[False]["test"].features, kept[True]["test"].features)


def test_a_run_on_more_scenes_has_those_of_the_others_too(work, tmp_path):
    folder = shutil.copytree(work[0], tmp_path / "quick")
    plan = tiny(Job(MLP.name, 0, SHORT), Job(MLP.name, 0, replace(SHORT, scenes=12), rolled=True))
    assert [plan.takes_more(job) for job in plan.runs] == [False, True]
    before = {path.name: path.read_bytes() for path in folder.glob("*features.safetensors")}
    tasks.make_features(plan, folder)
    added = {path.name for path in folder.glob("*features.safetensors")} - before.keys()
    assert added == {"more_rolled_features.safetensors"}
    assert all((folder / name).read_bytes() == held for name, held in before.items())
    usual, more = (tasks.load_material(folder, True, plan.language, each) for each in (False, True))
    assert torch.equal(more["train"].features[:8], usual["train"].features)
    assert more["train"].features.shape == (12, 1 + 144, 128)
    assert more["train"].questions == [questions_of(each.questions) for each in examples("train", 12)]
    for split in ("validation", "test", "hard"):
        assert torch.equal(more[split].features, usual[split].features)
    encoder, scene = tasks.load_encoder(folder), examples("train", 9)[8:]
    random = Random(tasks.PRETRAINING_SEED)  # the same draws of shifts
    seen = rolled_features_of(encoder, as_pixels(torch.from_numpy(pictures(scene))), random)
    torch.testing.assert_close(more["train"].features[8:9].float(), seen, rtol=1e-2, atol=1e-2)
    grown = tiny(*plan.jobs, Job(MLP.name, 0, replace(SHORT, scenes=14), rolled=True))
    tasks.make_features(grown, folder)
    assert len(read_tensors(folder / "more_rolled_features.safetensors")["train"]) == 14 - 8


def test_pretraining_has_scenes_of_its_own():
    asked = [each.scene for split in run.SPLITS for each in examples(split, 20)]
    assert not any(each.scene in asked for split in ("train", "told") for each in examples(split, 20, tasks.PRETRAINING_SEED))


@pytest.mark.parametrize("missing", ["timm", "rich"])
def test_a_missing_extra_is_named(missing):
    without = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path({run.__file__!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", without, "--quick"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.search(rf"run.py: error: .*{missing}.*pip install -e '.\[timm,train,bench\]'", ended.stderr)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("words", "said"), [("--workers 0", "at least 1, got 0"), ("--minutes nan", "not be negative, got nan")])
def test_what_makes_no_sense_is_refused(words, said, tmp_path):
    with pytest.raises(SpatialTokensError, match=said):
        run.main(["--quick", *words.split(), "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_plans_are_what_the_comparison_asks_for():
    full, factorized = PLANS["full"], PLANS["factorized"]
    for plan in PLANS.values():
        assert len({job.name for job in plan.jobs}) == len(plan.jobs)
    for design in MAIN:
        seeds = {job.seed for job in full.runs if job.design == design.name and job.scale == design.scale and not job.rolled}
        assert {0, 1, 2} <= seeds
    assert {job.design for job in (*full.runs, *factorized.runs)} == set(DESIGNS)
    usual = {"trial": 200, "quick": 4000, "full": 5000, "factorized": 5000}  # what the features in a work folder are made of
    assert {name: plan.scenes["train"] for name, plan in PLANS.items()} == usual
    for plan in PLANS.values():
        beside = full.runs if plan.folder else ()
        baseline = {
            (job.seed, job.schedule, job.rolled) for job in (*plan.runs, *beside) if job.design == MLP.name and job.scale == 1
        }
        for job in plan.runs:
            assert (job.seed, job.schedule, job.rolled) in baseline  # equal data, in the same order, and steps


def test_dense_and_factorized_designs_are_tried_at_the_same_rates():
    full, factorized = PLANS["full"], PLANS["factorized"]
    assert (factorized.vision, factorized.language, factorized.scenes) == (full.vision, full.language, full.scenes)
    tried = {}
    for job in (*full.runs, *factorized.runs):
        if job.scale == 1:
            tried.setdefault((job.rolled, job.schedule, job.design), set()).add((job.seed, job.kernel_rate))
    for rolled, schedule, rates in ((True, MEDIUM, 7), (True, LONGER, 4), (False, LONG, 4)):
        alike = [tried[rolled, schedule, each.name] for each in (CROPPING, POOLING, FACTORIZED, FACTORIZED_POOLING, BINS, PLACES)]
        for each in alike:
            assert {rate for seed, rate in each if seed < 3} == {rate for _, rate in each}
            assert each >= {(seed, rate) for seed in range(3) for _, rate in each}
            assert {rate for _, rate in each} == {rate for _, rate in alike[0]}
            assert len({rate for _, rate in each}) == rates


def test_a_rate_is_in_the_name_where_it_is_not_the_common_one():
    job = Job(MLP.name, 0, SHORT)
    assert job.name == "MLP_8_1+2_1_0"
    assert replace(job, kernel_rate=KernelRate(0.03)).name == "MLP_8_1+2_1_kernels0.03_0"
    assert replace(job, rolled=True, kernel_rate=KernelRate(by_fan_in=True)).name == "MLP_8_1+2_1_kernels1-by-fan-in_rolled_0"


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.303 * stdev([1.0, 2.0, 4.0]) / sqrt(3))
    assert not found.is_sure
    assert estimate([1.0, 1.1, 0.9]).is_sure
    assert not estimate([5.0]).is_sure
    assert estimate([5.0]).half == float("inf")
    for freedom, point in enumerate(STUDENT, 1):
        t = np.linspace(0, point, 100_001)
        density = (
            gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2)) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        )
        assert np.trapezoid(density, t) == pytest.approx(0.475, abs=2e-5)


def test_the_draw_of_questions_moves_a_mean_as_far_as_it_is_said_to():
    drawn = np.random.RandomState(0)
    counts = {kind: [80 - 10 * i, 100 + 50 * i] for i, kind in enumerate(KINDS)}
    right = {kind: drawn.binomial(asked, right / asked, 100_000) for kind, (right, asked) in counts.items()}
    kinds = [[kind for kind in KINDS if KINDS[kind].category == category] for category in CATEGORIES]
    means = sum(sum(right[kind] for kind in each) / sum(counts[kind][1] for kind in each) for each in kinds) / len(CATEGORIES)
    assert sampling_error(counts) == pytest.approx(1.96 * 100 * means.std(), rel=0.02)


def test_runs_of_other_settings_are_kept_apart():
    long, few, more = ({"scenes": scenes, "steps": [2, steps]} for scenes, steps in ((8, 4), (2, 4), (8, 9)))
    told = [(MLP.name, 0, long, False), (MLP.name, 0, few, False), (MLP.name, 1, more, False), (MLP.name, 2, long, True)]
    told_of = {"scale": 1.0, "curve": [{"validation": counts(50)}]}
    runs = [dict(zip(("design", "seed", "schedule", "rolled"), each, strict=True), **told_of) for each in told]
    results = Results({"runs": [*runs, {**runs[0], "seed": 5, "scale": 0.25}]})
    assert results.runs(MLP.name) == {0: runs[0]}
    assert results.runs(MLP.name, scenes=2) == {0: runs[1]}
    assert results.runs(MLP.name, tuning=9) == {1: runs[2]}
    assert results.runs(MLP.name, rolled=True) == {2: runs[3]}
    assert results.runs(MLP.name, rolled=True, tuning=9) == {}
    assert results.designs(tuning=9) == [MLP.name]


def counts(right):
    return {kind: [right, 100] for kind in KINDS}


def made(design, seed, right, validation=50, *, steps=2400, scenes=5000, rolled=True, **rate):
    return {
        "design": design.name, "seed": seed, "schedule": {"scenes": scenes, "steps": [250, steps]}, "rolled": rolled, "scale": 1.0,
        "kernel_rate": asdict(KernelRate(**rate)), "kernel_parameters": 1000, "seconds": 36.0,
        "test": counts(right), "hard": counts(right), "curve": [{"validation": counts(validation)}],
    }  # fmt: skip


def results_of(*runs, right=0.5, compressions=()):
    return Results({
        "benchmark": {"version": 2}, "plan": {"name": "any", "held_out": 1}, "planned": 282, "runs": list(runs),
        "pretrained": {name: {"right": right} for name in ("encoder", "language_model")}, "compressions": list(compressions),
        "machine": {"device": "a CPU", "versions": {"torch": "2.9"}},
    })  # fmt: skip


def test_validation_decides_between_rates_of_as_many_seeds():
    slow, fan_in = KernelRate(0.1), KernelRate(by_fan_in=True)
    runs = [made(CROPPING, seed, 90, 60 + seed) for seed in range(5)]  # on the seeds that all have: 61
    runs += [made(CROPPING, seed, 10, validation, scale=0.1) for seed, validation in enumerate((70, 60, 59))]  # 63
    runs += [made(CROPPING, 0, 99, 99, by_fan_in=True)]  # one seed: not yet
    results, setting = results_of(*runs), {"rolled": True, "tuning": 2400}
    assert results.validation_by_rate(CROPPING.name, **setting) == {KernelRate(): [60, 61, 62], slow: [70, 60, 59]}
    assert results.kernel_rate(CROPPING.name, **setting) == slow
    assert results.estimate(CROPPING.name, "test", **setting).mean == 10
    runs += [made(CROPPING, seed, 20, 64, by_fan_in=True) for seed in (1, 2)]
    assert results_of(*runs).kernel_rate(CROPPING.name, **setting) == fan_in
    assert results_of(*runs[:3], runs[8]).kernel_rate(CROPPING.name, **setting) == KernelRate()
    assert results_of(runs[1], runs[5]).validation_by_rate(CROPPING.name, **setting) == {KernelRate(): [61]}  # no seed has both
    assert results_of(*runs).kernel_rate(POOLING.name, **setting) is None


def test_runs_of_another_plan_join_where_it_has_the_same_encoder():
    own, other = results_of(made(CROPPING, 0, 80)), [made(CROPPING, 0, 80), made(CROPPING, 1, 82), made(CROPPING, 0, 84, scale=0.1)]
    for each in other[:2]:
        del each["kernel_rate"], each["kernel_parameters"]  # as plans that know none have written them
    joined = own.with_runs_of(results_of(*other))
    assert joined.values["runs"] == [*own.values["runs"], *other[1:]]
    assert own.with_runs_of(results_of(*other, right=0.4)) is own
    assert own.count_repeated(results_of(*other)) == (1, 1)
    assert own.count_repeated(results_of(made(CROPPING, 0, 81))) == (1, 0)


def test_a_page_of_few_runs_says_what_they_say_and_how_few_they_are(monkeypatch, tmp_path):
    dense = {seed: made(CROPPING, seed, 80 + seed) for seed in range(3)}
    small = {
        "of": {**dense[1], "kernel_rate": asdict(KernelRate())}, "frequencies": 3, "rank": 32, "kernel_parameters": 100,
        "dense_kernel_parameters": 2900, "unexplained": 0.125,
        "compressed": {"test": counts(79)}, "tuned": {"test": counts(82)}, "dense_tuned": {"test": counts(81)},
    }  # fmt: skip
    results = results_of(*dense.values(), *(made(FACTORIZED, seed, 82 + seed) for seed in range(3)), compressions=[small])
    setting = {"rolled": True, "tuning": 2400}
    table = dense_or_factorized.designs(results, setting)
    assert f"| {FACTORIZED.name} | 1 k | 3 | x 1 | 82.0, 83.0, 84.0 | **+2.0 ± 0.0** |" in table
    assert f"| {CROPPING.name} | 1 k | 3 | x 1 | 80.0, 81.0, 82.0 |  |" in table
    assert PLACES.name not in table
    two = [made(each, seed, right + seed) for each, right in ((CROPPING, 80), (FACTORIZED, 82)) for seed in range(2)]
    assert f"| {FACTORIZED.name} | 1 k | 2 | x 1 | 82.0, 83.0 | +2.0 |" in dense_or_factorized.designs(results_of(*two), setting)
    row = f"| {CROPPING.name} | 5,000 | 1 | 3 x 3, rank 32 | 1/29 | 12.5 | 81.0 | -2.0 | +1.0 | +0.0 |"
    assert row in dense_or_factorized.compressed(results)
    assert "Not run yet" in dense_or_factorized.designs(results, {"rolled": False, "tuning": 400})
    assert "Not run yet" in dense_or_factorized.rates(results)
    counted = dense_or_factorized.counted(results, results_of(made(CROPPING, 0, 80)))
    planned = [
        sum(job.rolled and job.schedule == each for job in PLANS["factorized"].runs) for each in (LONGER, MORE_SCENES, MEDIUM)
    ]
    assert f"7 of {len(PLANS['factorized'].jobs)} runs" in counted
    for found in (
        "6 of {} with rolled features and 2,400 steps, 0 of {} with rolled features and 2,400 steps on 20,000 scenes",
        "0 of {2} with rolled features and 800 steps",
    ):
        assert found.format(*planned) in counted
    assert f"1 of {sum(isinstance(job, Compression) for job in PLANS['factorized'].jobs)} compressions" in counted
    assert "0.1 hours" in counted
    slower = results_of(*results.values["runs"], *(made(CROPPING, seed, 85, 60, scale=0.03) for seed in range(3)))
    assert f"| {CROPPING.name} | 3 | 50.0 | **60.0** |" in dense_or_factorized.rates(slower)
    assert f"| {CROPPING.name} | 1 k | 3 | x 0.03 (of 2) | 85.0, 85.0, 85.0 |" in dense_or_factorized.designs(slower, setting)


def test_the_page_is_made_of_what_is_committed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    more = made(FACTORIZED, 0, 75, scenes=MORE_SCENES.scenes)
    results = results_of(made(CROPPING, 0, 80), made(MLP, 0, 50), made(FACTORIZED, 0, 70), more)
    monkeypatch.setattr(dense_or_factorized, "COMMITTED", tmp_path)
    assert dense_or_factorized.page() == "Not run yet.\n"
    (tmp_path / "factorized.json").write_text("")
    monkeypatch.setattr(dense_or_factorized, "committed", lambda name: results)
    usual, of_more = dense_or_factorized.page().split("### Rolled features, 2,400 steps, 20,000 training scenes\n")
    assert f"| {FACTORIZED.name} | 1 k | 1 | x 1 | 70.0 | -10.0 |" in usual
    assert f"| {FACTORIZED.name} | 1 k | 1 | x 1 | 75.0 | not run |" in of_more
    dense_or_factorized.draw(tmp_path)
    assert (tmp_path / "dense-or-factorized.png").stat().st_size > 10_000


def test_differences_are_seed_by_seed():
    ours = {seed: {"test": counts(right)} for seed, right in ((0, 50), (1, 70), (2, 60))}
    theirs = {seed: {"test": counts(right)} for seed, right in ((0, 48), (1, 67), (3, 0))}
    found = difference(ours, theirs, "test")
    assert (found.mean, found.count) == (2.5, 2)
    assert difference(ours, {7: theirs[0]}, "test") is None


def test_a_gain_is_of_the_split_and_over_what_it_is_asked_for():
    schedule = {"scenes": 8, "steps": [2, 4]}
    right = {MLP.name: (50, 40), CROPPING.name: (53, 45), POOLING.name: (60, 41)}
    runs = [
        {"design": name, "seed": 0, "schedule": schedule, "rolled": False, "scale": 1.0, "test": counts(test), "hard": counts(hard),
         "curve": [{"validation": counts(50)}]}
        for name, (test, hard) in right.items()
    ]  # fmt: skip
    results = Results({"runs": runs})
    assert [results.gain(CROPPING.name, split).mean for split in ("test", "hard")] == [3, 5]
    assert [results.gain(POOLING.name, split, over=CROPPING.name).mean for split in ("test", "hard")] == [7, -4]


def test_accuracy_and_chance():
    assert accuracy({**counts(50), "size": [100, 100]}) == 60
    assert accuracy({**counts(50), "third": [100, 100]}, "position") == 75
    assert accuracy(counts(50), "size") == 50
    assert chance("hard", "position") == pytest.approx(100 * mean([1 / 4, 1 / 3]))
    assert chance("test", "attribute") == pytest.approx(100 * mean([1 / 2, 1 / 5]))
    assert chance("hard", "attribute") == pytest.approx(100 * mean([1 / 2, 1 / 6]))
    assert chance("hard") == pytest.approx(mean([50, 700 / 24, 25, 50, 100 / 3]))


def test_the_committed_results_are_of_this_version_and_make_the_page(tmp_path, monkeypatch):
    results = committed("full")
    assert results.values["benchmark"]["digests"] == {split: run.digest(run.examples(split, 20)) for split in run.SPLITS}
    for name in (MLP.name, CROPPING.name):
        wanted = {"design": name, "rolled": False, "scale": 1.0, "scenes": 5000, "steps": [250, 400]}
        mine = [accuracy(each["test"]) for each in results.values["runs"] if wanted.items() <= (each | each["schedule"]).items()]
        assert f"| {name} |" in tables.designs_page() + tables.settings_page()
        assert f"{mean(mine):.1f}" in tables.comparison(results)
    pytest.importorskip("matplotlib")
    from benchmarks.spatial_vqa import pictures

    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.draw()
    detailed = any(run["design"] in {each.name for each in DETAIL} for run in results.values["runs"])
    factorized = (COMMITTED / "factorized.json").exists()
    assert len(list(tmp_path.glob("*.png"))) == 2 + detailed + factorized


def test_the_main_designs_have_the_rate_that_validation_prefers():
    results = committed("full")
    for design in MAIN:
        tried: dict[float, dict[int, float]] = {1.0: {}, 0.25: {}}
        for each in results.values["runs"]:
            if each["design"] == design.name and not each["rolled"] and each["schedule"] == results.usual:
                tried[each["scale"]][each["seed"]] = accuracy(each["curve"][-1]["validation"])
        other = 0.25 if design.scale == 1.0 else 1.0
        assert len(tried[other]) == 3
        assert mean(tried[design.scale][seed] for seed in tried[other]) > mean(tried[other].values())
