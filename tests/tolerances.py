"""How close is equal: the only place where the tests say so."""

import torch

FLOAT32 = 1e-5
FLOAT64 = 1e-9


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest expected value, in float64. NaN where one has a NaN and the other not."""
    if given.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(given.shape)} and {tuple(expected.shape)}")
    given, expected = given.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    return ((given - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_close(given: torch.Tensor, expected: torch.Tensor, tolerance: float = FLOAT32) -> None:
    """Fails unless the relative error is at most the tolerance; a NaN on one side fails."""
    error = relative_error(given, expected)
    assert error <= tolerance, f"relative error {error:.2e} is over {tolerance:.0e}"


def assert_each_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless each value is as near as float32 allows, also where all are zero but for rounding."""
    torch.testing.assert_close(given, expected, rtol=10 * FLOAT32, atol=FLOAT32)


def rounding(dtype: torch.dtype, operations: int) -> float:
    """The tolerance for that many operations one after another, each off by at most half a unit in the last place."""
    return operations * torch.finfo(dtype).eps / 2
