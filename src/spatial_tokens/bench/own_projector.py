"""A projector of the caller's own, measured beside LLaVA's MLP."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from spatial_tokens.bench.baselines import LlavaMLP
from spatial_tokens.bench.comparison import Candidate, Comparison, Row, Setting
from spatial_tokens.bench.options import DTYPES
from spatial_tokens.bench.runner import run_comparison
from spatial_tokens.bench.suites.kernels import TOLERANCE, verified
from spatial_tokens.bench.suites.projectors import BASELINE
from spatial_tokens.errors import SpatialTokensError, shown


def bench_projector(projector: nn.Module, patches: torch.Tensor, *, name: str = "yours", seconds: float = 2.0) -> dict[str, Row]:
    """Times a projector beside LLaVA's MLP on the same patch features, as `spatial-tokens bench --suite projectors` does.

    Args:
        projector: Any module that maps patch features `(B, N, C)` to tokens `(B, M, D)`; it is put into evaluation mode meanwhile.
        patches: Patch features `(B, N, C)`, on the projector's device and in its dtype.
        name: What its row is called.
        seconds: How long to time.

    Returns:
        The rows by name: "LLaVA MLP" and the projector's. `values` has `ms`, `ratio` (the MLP's time over its own), `tokens`,
        `parameters` and, where the system reports it, `peak_mib`.

    Raises:
        SpatialTokensError: If the features are not `(B, N, C)` of a dtype that is measured, or the name is the baseline's.
    """
    dtype = next((known for known, each in DTYPES.items() if isinstance(patches, torch.Tensor) and each == patches.dtype), None)
    if dtype is None or patches.ndim != 3:
        raise SpatialTokensError(f"patches must be features (B, N, C) of {' or '.join(DTYPES)}, got {shown(patches)}")
    if name == BASELINE:
        raise SpatialTokensError(f"{name!r} is the baseline's name; give another")
    was_training = projector.training
    projector.eval()
    try:
        with torch.inference_mode():
            width = projector(patches).shape[-1]
        batch, count, channels = patches.shape
        mlp = LlavaMLP(channels, width, grid_size=(1, count), device=patches.device, dtype=patches.dtype).eval()
        candidates = {each: _candidate(module, patches, dtype) for each, module in ((BASELINE, mlp), (name, projector))}
        setting: Setting = {"dtype": dtype, "batch": batch}
        builders = {each: lambda candidate=candidate: replace(candidate) for each, candidate in candidates.items()}
        comparison = Comparison("projectors", name, setting, builders, baseline=BASELINE)
        return {row.implementation: row for row in run_comparison(comparison, patches.device, None, seconds)}
    finally:
        projector.train(was_training)


def _candidate(module: nn.Module, patches: torch.Tensor, dtype: str) -> Candidate:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            tokens: torch.Tensor = module(patches)
            return tokens

    count = verified(run, module, TOLERANCE[dtype]).shape[1]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Candidate(run, values={"tokens": count, "parameters": parameters})
