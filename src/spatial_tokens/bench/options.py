"""What a run of the benchmarks was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from spatial_tokens.bench import names
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.grid import as_size

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.DTYPES}


@dataclass(frozen=True)
class Options:
    """Where, in what, how many images at once, and at what size.

    Args:
        device: Where.
        dtypes: Names of `DTYPES`, one comparison each.
        batches: Images at once, one comparison each; the suite's own choice when empty.
        config: The sizes: the paper's.
    """

    device: torch.device
    dtypes: Sequence[str] = ("float32", "bfloat16")
    batches: Sequence[int] = ()
    config: SPProjectorConfig = field(default_factory=lambda: SPProjectorConfig.from_preset("llava-sp-cropping"))

    def batches_or(self, *, cpu: Sequence[int], cuda: Sequence[int]) -> Sequence[int]:
        """The batches asked for, else the suite's for this device."""
        return self.batches or (cuda if self.device.type == "cuda" else cpu)

    @property
    def factorized(self) -> SPProjectorConfig:
        """The same sizes with factorized kernels."""
        return factorized(self.config)

    def features(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """Random patch features `(B, N, C)`."""
        return torch.randn(batch, self.config.num_patches, self.config.vision_hidden_size, device=self.device).to(dtype)


def factorized(config: SPProjectorConfig) -> SPProjectorConfig:
    """A config with factorized kernels in the place of its dense ones: 3 cosines a side or as many as fit, 128 channels."""
    frequencies = tuple(min(3, *as_size(size, "kernel size")) for size in config.kernel_sizes)
    return replace(config, rank=min(128, config.vision_hidden_size), frequencies=frequencies)
