"""Readers in closed form, beside plain least squares, logits of pairs counted one by one, and what is known of places."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.spatial_vqa import probes
from benchmarks.spatial_vqa.splits import examples
from spatial_tokens.diagnostics.intervals import Estimate, bootstrap, ratios
from spatial_tokens.diagnostics.readers import RIDGES, SECTIONS, Moments, coordinates, fit, right_order, sections, targets_of
from spatial_tokens.diagnostics.shifts import Shift
from spatial_tokens.diagnostics.verdict import PLAIN_POSITION, PLAIN_RIGHT, ROLLED_POSITION, ROLLED_RIGHT, ROLLED_WITH_PLACES
from tests.tolerances import FLOAT64, assert_close

ROOT = Path(__file__).parents[2]


def moments(*batches):
    made = Moments()
    for batch in batches:
        made.add(*batch)
    return made


def test_moments_of_batches_are_those_of_all_rows_also_far_from_zero():
    features, targets = torch.randn(90, 5, dtype=torch.float64) + 1e6, torch.randn(90, 2, dtype=torch.float64)
    made = moments(*zip(features.split([1, 50, 39]), targets.split([1, 50, 39]), strict=True))
    rows = torch.cat([features, targets], dim=1)
    assert_close(made.mean, rows.mean(0), FLOAT64)
    assert_close(made.scatter / 89, rows.T.cov(), FLOAT64)
    merged = moments((features[:40], targets[:40])).merged(moments((features[40:], targets[40:])))
    assert_close(merged.mean, made.mean, FLOAT64)
    assert_close(merged.scatter, made.scatter, FLOAT64)


def test_a_fit_is_the_ridge_regression_that_is_best_on_validation():
    mix = torch.randn(30, 30, dtype=torch.float64)

    def rows(count):
        features = torch.randn(count, 30, dtype=torch.float64) @ mix + 3
        return features, features[:, :2] * 0.1 + torch.randn(count, 2, dtype=torch.float64)

    train, validation, asked = rows(40), rows(200), torch.randn(7, 30, dtype=torch.float64)
    found = fit(moments(train), moments(validation))(asked)
    mean, deviation = train[0].mean(0), train[0].std(0, correction=0)
    inputs = (train[0] - mean) / deviation
    readings = []
    for ridge in RIDGES:
        penalty = (40 * ridge) ** 0.5 * torch.eye(30, dtype=torch.float64)
        padded = torch.cat([train[1] - train[1].mean(0), torch.zeros(30, 2, dtype=torch.float64)])
        weight = torch.linalg.lstsq(torch.cat([inputs, penalty]), padded).solution
        read = [((each - mean) / deviation) @ weight + train[1].mean(0) for each in (validation[0], asked)]
        readings.append(((read[0] - validation[1]).square().sum(0), read[1]))
    best = torch.stack([error for error, _ in readings]).argmin(0)
    assert_close(found, torch.stack([readings[best[i]][1][:, i] for i in range(2)], dim=1), 1e-6)


def test_the_pairs_are_counted_as_one_by_one():
    places, readings = coordinates((3, 4), torch.device("cpu")), torch.randint(5, (12, 2)).double()
    right, asked = right_order(readings, places)
    for axis in range(2):
        pairs = [(i, j) for i, j in itertools.permutations(range(12), 2) if places[i, axis] != places[j, axis]]
        told = [(readings[i, axis] - readings[j, axis]) * (places[i, axis] - places[j, axis]).sign() for i, j in pairs]
        assert asked[axis] == len(pairs)
        assert right[axis] == sum(1.0 if each > 0 else 0.5 if each == 0 else 0.0 for each in told)


def test_least_squares_on_differences_from_the_mean_are_those_on_all_pairs():
    features, places = torch.randn(3, 20, 6, dtype=torch.float64), coordinates((4, 5), torch.device("cpu"))
    within, pairs = Moments(), Moments()
    for each in features:
        within.add(each - each.mean(0), places)
        pairs.add((each[:, None] - each).flatten(0, 1), (places[:, None] - places).flatten(0, 1))
    assert_close(fit(within, within).weight, fit(pairs, pairs).weight, 1e-9)


def test_places_and_their_twelfths():
    places = coordinates((2, 3), torch.device("cpu"))
    assert_close(places[:, 0], torch.tensor([-2, 0, 2] * 2).double() / 3)
    assert places[:, 1].tolist() == [-0.5] * 3 + [0.5] * 3
    twelve = coordinates((SECTIONS, SECTIONS), torch.device("cpu"))
    assert sections(twelve)[:, 0].tolist() == list(range(SECTIONS)) * SECTIONS
    assert targets_of(twelve).shape == (SECTIONS**2, 2 + 2 * SECTIONS)


def test_what_a_shifted_picture_shows_comes_from_where_it_is_said_to():
    image = pytest.importorskip("PIL.Image")
    side, grid = 96, (12, 12)
    places = coordinates(grid, torch.device("cpu"))
    ramp = image.new("RGB", (side, side))
    ramp.putdata([(x, y, 0) for y in range(side) for x in range(side)])
    for shift in (Shift("roll", 5 / 12, 2 / 12), Shift("crop", 0.8, 0.3)):
        moved = torch.frombuffer(bytearray(shift(ramp).tobytes()), dtype=torch.uint8).double().view(12, 8, 12, 8, 3)
        seen = (moved.mean((1, 3)) + 0.5) / side * 2 - 1  # column and row of origin, from the colors
        error = (seen[..., :2].flatten(0, 1) - shift.origins(places)).abs()
        assert error.max() < 0.03, shift


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        values = torch.randn(60, 1, generator=generator, dtype=torch.float64)
        (found,) = bootstrap(torch.cat([values, torch.ones_like(values)], dim=1), ratios, seed=seed)
        held += found.low <= 0 <= found.high
    assert 180 <= held <= 199
    assert bootstrap(torch.ones(5, 2), ratios) == [Estimate(1.0)]
    assert bootstrap(torch.ones(6, 2), ratios) == [Estimate(1.0, 1.0, 1.0)]


def test_the_readers_find_what_those_of_the_evidence_find():
    scenes = examples("train", 40)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(SECTIONS**2, 24, generator=generator)
    features = 0.4 * mix + torch.randn(40, SECTIONS**2, 24, generator=generator)
    padded = torch.nn.functional.pad(features, (0, 0, 1, 0))
    theirs = probes.read_patches((padded[:20], scenes[:20]), (padded[20:], scenes[20:]))
    places = coordinates((SECTIONS, SECTIONS), torch.device("cpu"))
    targets = targets_of(places).repeat(20, 1)
    reader = fit(*[moments((features[:20].flatten(0, 1), targets))] * 2)
    told = reader(features[20:].flatten(0, 1))[:, 2:].unflatten(1, (2, -1)).argmax(-1)
    ours = (told == sections(places).repeat(20, 1)).double().mean(0).tolist()
    for name, share in zip(("column", "row"), ours, strict=True):
        assert share == pytest.approx(theirs[name][0], abs=0.01)
        assert theirs[name][0] > 0.15


def test_the_verdict_quotes_the_evidence():
    from benchmarks.spatial_vqa.estimates import accuracy, estimate
    from benchmarks.spatial_vqa.results import committed

    results = committed("full")
    readers = results.values["pretrained"]["from_patches"]
    for kind, figures in (("features", PLAIN_RIGHT), ("rolled", ROLLED_RIGHT)):
        assert [round(readers[kind][name][0], 3) for name in ("column", "row")] == pytest.approx(figures, abs=1e-3)
    for rolled, figures in ((False, PLAIN_POSITION), (True, ROLLED_POSITION)):
        for design, figure in figures.items():
            runs = results.runs(design, rolled=rolled, tuning=2400 if rolled else 400)
            assert len(runs) == 5
            assert round(estimate([accuracy(run["test"], "position") for run in runs.values()]).mean, 1) == figure
    told = json.loads((ROOT / "benchmarks" / "results" / "spatial_vqa" / "factorized.json").read_text())
    (run,) = (
        each
        for each in told["runs"]
        if each["design"] == "MLP + an embedding of each place" and each["rolled"] and each["schedule"]["steps"] == [250, 2400]
    )
    assert round(accuracy(run["test"], "position"), 1) == ROLLED_WITH_PLACES
