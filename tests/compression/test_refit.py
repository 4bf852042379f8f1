"""The least squares, against numpy's on stacked data."""

import numpy as np
import pytest
import torch

from spatial_tokens.compression.factors import Factors
from spatial_tokens.compression.refit import RIDGES, Products, judge, solver
from tests.tolerances import FLOAT64, assert_close

MAPS, RANK, OUTPUTS = 3, 4, 5


def symmetric(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def some_factors():
    return Factors(randn(MAPS, 7), randn(RANK, 9), randn(OUTPUTS, MAPS, RANK), symmetric(MAPS), symmetric(RANK))


def products_of(inputs, tokens):
    products = Products.zeros(inputs.shape[1], tokens.shape[1], inputs.device)
    for part in zip(inputs.split(7), tokens.split(7), strict=True):
        products.add(*part)
    return products


def stacked(prior, inputs, tokens, ridge):
    """The ridge regression as plain least squares: the prior is data, too."""
    metric = np.kron(prior.of_maps.numpy(), prior.of_channels.numpy())
    root = np.linalg.cholesky(ridge * len(inputs) * metric).T
    rows = np.concatenate([inputs.numpy(), root])
    targets = np.concatenate([tokens.numpy(), root @ prior.core.flatten(1).numpy().T])
    return torch.from_numpy(np.linalg.lstsq(rows, targets)[0].T)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("samples", [8, 200])
def test_cores_are_numpys_least_squares(samples, ridge):
    prior, inputs, tokens = some_factors(), randn(samples, MAPS * RANK) @ symmetric(MAPS * RANK), randn(samples, OUTPUTS)
    given = solver(prior, products_of(inputs, tokens))(ridge)
    assert_close(given, stacked(prior, inputs, tokens, ridge), 100 * FLOAT64)


def test_errors_are_the_mean_squares():
    inputs, tokens, core = randn(50, 6), randn(50, OUTPUTS) + 3, randn(OUTPUTS, 6)
    products = products_of(inputs, tokens)
    assert products.error(core) == pytest.approx((inputs @ core.T - tokens).square().sum(1).mean().item())
    assert products.variance == pytest.approx(tokens.var(0, unbiased=False).sum().item())
    kept = torch.tensor([0, 3, 4])
    assert products.part(kept).error(core[:, kept]) == pytest.approx(
        (inputs[:, kept] @ core[:, kept].T - tokens).square().sum(1).mean()
    )
    both = products + products_of(inputs[:3], tokens[:3])
    assert (both.samples, both.error(core)) == (
        53,
        pytest.approx(products_of(inputs[[*range(50), 0, 1, 2]], tokens[[*range(50), 0, 1, 2]]).error(core)),
    )


@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_the_ridge_is_the_best_on_held_out_pictures(noise):
    prior = some_factors()
    truth = prior.core.flatten(1) + randn(OUTPUTS, MAPS * RANK)
    inputs = randn(60, MAPS * RANK)
    tokens = inputs @ truth.T + noise * randn(60, OUTPUTS)
    parts = [(inputs[:40], tokens[:40]), (inputs[40:], tokens[40:])]
    found = judge(prior, *(products_of(*part) for part in parts))
    by_hand = {}
    for ridge in RIDGES:
        core = stacked(prior, *parts[0], ridge)
        by_hand[ridge] = (parts[1][0] @ core.T - parts[1][1]).square().sum(1).mean().item() / tokens.var(
            0, unbiased=False
        ).sum().item()
    before = (parts[1][0] @ prior.core.flatten(1).T - parts[1][1]).square().sum(1).mean() / tokens.var(0, unbiased=False).sum()
    assert by_hand[found.ridge] == pytest.approx(min(by_hand.values()), rel=1e-6, abs=1e-9)
    assert found.unexplained == pytest.approx(by_hand[found.ridge], rel=1e-6, abs=1e-9)
    assert found.before == pytest.approx(before.item())
