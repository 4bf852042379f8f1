"""`compress`: a dense projector to a factorized one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from spatial_tokens.compression.factors import SecondMoments, decompose
from spatial_tokens.compression.fit import Candidate, KernelFit, gather
from spatial_tokens.compression.kernels import DenseKernel
from spatial_tokens.compression.report import CompressionReport, CurvePoint, TokenReport
from spatial_tokens.compression.samples import Features, Progress, Sample
from spatial_tokens.compression.target import Target
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.grid import FREQUENCIES, RANK, SpatialBasis, check_factors, check_positive
from spatial_tokens.modules import SPProjector

MOST_FREQUENCIES = 5  # that are tried where the rank is chosen, by default
LARGEST_RANK, LARGEST_INPUT = 256, 2304  # that are tried where the rank is chosen; the latter is channels times maps
CURVE = 4  # ranks on the curve of a rank that is given, each half of the one before


@torch.no_grad()
def compress(
    projector: SPProjector,
    features: Features,
    *,
    rank: int | None = None,
    frequencies: int | Sequence[int] | None = None,
    spatial_basis: SpatialBasis = "cosine",
    parameters: int | None = None,
    error: float | None = None,
    progress: Progress | None = None,
) -> tuple[SPProjector, CompressionReport]:
    """Factorized kernels that give nearly the tokens of dense ones, in closed form, from a sample of the features that they read.

    Trained kernels are mostly their initial noise; the features that they read are not. So kernels are decomposed mode by mode as
    the features' second moments weigh channels and places (a whitened, truncated higher-order SVD; of all kernels' channels
    together, as they share one projection). The cores are then fitted to the dense kernels' tokens by least squares, with a ridge
    that is chosen on held-out pictures, every fifth. Heads and attention are copied as they are.

    Args:
        projector: A dense one, with a SpatialFeatureExtractor, and a DetailFeatureIntegrator or none. It is not changed.
        features: Patch features of some hundred pictures or more, as the projector reads them: a tensor `(n, N, C)`; a safetensors
            file that holds one, which is read a part at a time; or batches of them that can be read again and again.
        rank: Channels that the kernels shall see; 128 unless it is chosen by `parameters` or `error`.
        frequencies: Maps of each side of a window, for all kernels or one number for each; 3 by default, fewer on windows of fewer
            patches. Where the rank is chosen, the most that are tried; 5 by default.
        spatial_basis: "cosine", or "learned" for free maps, found for each kernel.
        parameters: The most parameters that the kernels may have. With each number of frequencies the largest rank that fits is
            tried, and its halves; what misses least is taken.
        error: The share of the tokens' variance that may be missed, in the mean over tokens; of the sizes tried (each rank half of
            the one before) that miss no more, what has the fewest parameters is taken.
        progress: Told what pictures are read for, and how many have been.

    Returns:
        The factorized projector, in the dense one's dtype and on its device, and a report.

    Raises:
        SpatialTokensError: If the projector is not dense, is wrapped or quantized, or has no finite values; if features do not fit
            it, hold NaN or infinity, or are the same for all pictures;
            if a rank or number of frequencies is too large; if more than one of `rank`, `parameters`
            and `error` is given; or if nothing keeps to these.

    Examples:
        >>> from spatial_tokens import SPProjectorConfig
        >>> config = SPProjectorConfig(
        ...     vision_hidden_size=32, text_hidden_size=64, grid_size=(8, 8), kernel_sizes=(4, 8), spatial_hidden_size=16,
        ...     detail_kernel_size=4,
        ... )
        >>> dense = SPProjector.from_config(config)
        >>> small, report = compress(dense, torch.randn(50, 64, 32), rank=8)
        >>> small.config.rank, report.dense_parameters, report.parameters
        (8, 49152, 3968)
    """
    chosen_by_us = parameters is not None or error is not None
    target = Target.of(projector, frequencies, spatial_basis, MOST_FREQUENCIES if chosen_by_us else FREQUENCIES)
    candidates = _candidates(target, rank, parameters, error)
    groups = target.dense_kernels(max(each.frequencies for each in candidates))
    kernel = groups[0][0]
    sample = Sample(features, target.grid_size, target.channels, kernel.weight.device, kernel.dtype, progress)
    moments = SecondMoments.of(sample)
    try:
        fits = [_fits(group, candidates, spatial_basis, moments) for group in groups]
        gather(fits, sample)
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise SpatialTokensError(
            "the kernels or features have no decomposition in their range of numbers; look for values that are much too large"
        ) from failure

    every = [fit for group in fits for fit in group]
    curve = [
        CurvePoint(
            candidate.rank,
            candidate.frequencies,
            target.parameters(candidate),
            fmean(fit.found[candidate].unexplained for fit in every),
            fmean(fit.plain_unexplained[candidate] for fit in every),
        )
        for candidate in candidates
    ]
    number = _choice(curve, error, parameters)
    chosen = candidates[number]
    found = [[(fit.factors_of(chosen), fit.found[chosen].core) for fit in group] for group in fits]
    report = CompressionReport(
        rank=chosen.rank,
        frequencies=target.frequencies_of(chosen),
        spatial_basis=spatial_basis,
        pictures=sample.pictures,
        held_out=sample.held_out,
        dense_parameters=sum(fit.kernel.weight.numel() for fit in every),
        parameters=curve[number].parameters,
        unexplained=curve[number].unexplained,
        tokens=tuple(
            TokenReport(fit.kernel.name, each.unexplained, each.before, fit.plain_unexplained[chosen], each.ridge)
            for fit, each in ((fit, fit.found[chosen]) for fit in every)
        ),
        curve=tuple(sorted(curve, key=lambda point: point.parameters)),
    )
    return target.build(chosen, found), report


def _candidates(target: Target, rank: Any, parameters: Any, error: Any) -> list[Candidate]:
    """What is tried; the one that is asked for by its rank comes first."""
    given = {name: value for name, value in {"rank": rank, "parameters": parameters, "error": error}.items() if value is not None}
    if len(given) > 1:
        raise SpatialTokensError(f"{' and '.join(given)} exclude each other; give one of them")
    if error is not None and not (isinstance(error, (int, float)) and 0 < error < 1):
        raise SpatialTokensError(f"error must be a share of the tokens' variance, between 0 and 1, got {shown(error)}")
    most, channels = max(target.frequencies), target.channels
    if parameters is None and error is None:
        rank = min(RANK, channels) if rank is None else rank
        check_factors(channels, (), rank, ())
        return [Candidate(each, most) for each in _halves(rank)]
    largest = {number: min(channels, LARGEST_RANK, max(1, LARGEST_INPUT // number**2)) for number in range(1, most + 1)}
    if error is not None:
        return [Candidate(each, number) for number in largest for each in _halves(largest[number], 99)]
    check_positive(parameters=parameters)
    found = []
    for number in largest:
        one = target.parameters(Candidate(1, number))
        each_more = target.parameters(Candidate(2, number)) - one if channels > 1 else one
        if parameters >= one:
            found += [Candidate(each, number) for each in _halves(min(largest[number], 1 + (parameters - one) // each_more))]
    if not found:
        fewest = target.parameters(Candidate(1, 1))
        raise SpatialTokensError(f"{parameters:,} parameters are too few: kernels of rank 1 and one map have {fewest:,}")
    return found


def _halves(rank: int, count: int = CURVE) -> list[int]:
    return [rank >> i for i in range(count) if rank >> i]


def _choice(curve: Sequence[CurvePoint], error: float | None, parameters: int | None) -> int:
    """Which point is asked for."""
    if error is None and parameters is None:
        return 0
    order = range(len(curve))
    if error is None:
        return min(order, key=lambda i: (curve[i].unexplained, curve[i].parameters))
    enough = [i for i in order if curve[i].unexplained <= error]
    if not enough:
        least = min(point.unexplained for point in curve)
        raise SpatialTokensError(
            f"no kernels of rank {max(point.rank for point in curve)} or less miss {error:.2%} of the tokens' variance or less: "
            f"{least:.2%} is the least; allow more, or give more frequencies, a higher rank, or learned maps "
            "(spatial_basis='learned', or --basis learned)"
        )
    return min(enough, key=lambda i: (curve[i].parameters, curve[i].unexplained))


def _fits(
    kernels: Sequence[DenseKernel], candidates: Sequence[Candidate], spatial_basis: SpatialBasis, moments: SecondMoments
) -> list[KernelFit]:
    rank = max(each.rank for each in candidates)
    whitened, plain = (decompose(kernels, rank, spatial_basis, each) for each in (moments, None))
    return [KernelFit(*each, spatial_basis, candidates) for each in zip(kernels, whitened, plain, strict=True)]
