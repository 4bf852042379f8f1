"""An SPProjector as the `mm_projector` of the original LLaVA code, and of what was built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.fit_config import fitted, require
from spatial_tokens.modules import SPProjector
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.presets import PRESETS

PROJECTOR_TYPES = tuple(PRESETS)


def build_spatial_projector(config: Any) -> SPProjector:
    """The projector of a LLaVA config whose `mm_projector_type` is one of `PROJECTOR_TYPES`: the names of the presets.

    Its patch head is LLaVA's `mlp2x_gelu`. All that defines it is in the config, so that a model is rebuilt from its
    `config.json`.

    Args:
        config: LLaVA's flat config. Read are `mm_projector_type`; `mm_hidden_size` and `hidden_size`, the widths; and
            `mm_spatial_tokens` if there is one: a dict of SPProjectorConfig's fields in place of the preset's.

    Raises:
        SpatialTokensError: If one of the three is missing, the type or a field is unknown, or the result is not valid.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(
        ...     mm_projector_type="llava-sp-pooling", mm_hidden_size=8, hidden_size=16, mm_spatial_tokens={"spatial_hidden_size": 4}
        ... )
        >>> build_spatial_projector(config)(torch.randn(2, 576, 8)).shape
        torch.Size([2, 582, 16])
    """
    require(config, "the config of a LLaVA model", "mm_projector_type", "mm_hidden_size", "hidden_size")
    return SPProjector.from_config(
        fitted(
            config.mm_projector_type,
            getattr(config, "mm_spatial_tokens", None) or {},
            vision_hidden_size=config.mm_hidden_size,
            text_hidden_size=config.hidden_size,
        )
    )


def split_spatial_tokens(projector: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts what a projector gave into spatial tokens and patch tokens, for code that lays the latter out on their grid.

    Args:
        projector: The `mm_projector`; one of LLaVA's own has no spatial tokens.
        features: Its output `(T, K + N, D)`.

    Returns:
        `(T, K, D)` and `(T, N, D)`, views.
    """
    check_dense(features, "features", "(T, K + N, D)", 3)
    count = int(getattr(projector, "num_spatial_tokens", 0))
    return features[:, :count], features[:, count:]
