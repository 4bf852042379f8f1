"""What a dense projector becomes: its kernels as they are compressed, and the projector that is made of their factors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from spatial_tokens.compression.factors import Factors
from spatial_tokens.compression.fit import Candidate
from spatial_tokens.compression.kernels import SLICE, DenseKernel
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size, SpatialBasis, as_frequencies, as_size, check_factors
from spatial_tokens.modules import DetailFeatureIntegrator, FactorizedFeatureExtractor, SpatialFeatureExtractor, SPProjector
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.modules.inputs import is_plain
from spatial_tokens.storage.int8 import is_quantized
from spatial_tokens.storage.sharded import is_partitioned


@dataclass(frozen=True)
class Target:
    """A dense projector, and of what kind its factorized kernels shall be.

    Args:
        extractor: Its extractor.
        integrator: Its integrator, or None.
        projector: The whole.
        frequencies: The most of each side of each kernel's window.
        spatial_basis: "cosine" or "learned".
    """

    extractor: SpatialFeatureExtractor
    integrator: DetailFeatureIntegrator | None
    projector: SPProjector
    frequencies: tuple[int, ...]
    spatial_basis: SpatialBasis

    @classmethod
    def of(cls, projector: Any, frequencies: Any, spatial_basis: Any, most: int) -> Target:
        """The target, checked; without frequencies each window has `most`, or as many as it has patches a side.

        Raises:
            SpatialTokensError: If the projector is none with dense, plain kernels of finite values, or frequencies do not fit it.
        """
        _check_values(dense_layers(projector))
        extractor, integrator = cast(SpatialFeatureExtractor, projector.extractor), projector.integrator
        channels = extractor.vision_hidden_size
        if frequencies is None:
            frequencies = tuple(min(most, *as_size(size, "kernel size")) for size in extractor.kernel_sizes)
        checked = check_factors(channels, extractor.kernel_sizes, 1, frequencies, spatial_basis)
        numbers = as_frequencies(checked or (), len(extractor.kernel_sizes))
        return cls(extractor, integrator, projector, numbers, spatial_basis)

    @property
    def grid_size(self) -> Size:
        """Patches `(H, W)`."""
        return self.extractor.grid_size

    @property
    def _weight(self) -> torch.Tensor:
        return cast(nn.Linear, self.extractor.kernels[0]).weight

    @property
    def channels(self) -> int:
        """`C`."""
        return self.extractor.vision_hidden_size

    def frequencies_of(self, candidate: Candidate) -> tuple[int, ...]:
        """Of each of the extractor's kernels."""
        return tuple(min(most, candidate.frequencies) for most in self.frequencies)

    def parameters(self, candidate: Candidate) -> int:
        """Of the factorized kernels."""
        return sum(each.numel() for kernels in self._factorized(candidate) for each in kernels.parameters())

    def dense_kernels(self, frequencies: int) -> list[list[DenseKernel]]:
        """The kernels that share a channel projection: the extractor's, and the integrator's if there is one."""
        names = [f"kernel {'x'.join(map(str, as_size(size, 'kernel size')))}" for size in self.extractor.kernel_sizes]
        groups: list[tuple[list[str], list[nn.Module]]] = [(names, list(self.extractor.kernels))]
        if self.integrator is not None:
            groups.append((["detail map"], [self.integrator.detail_kernel]))
        return [
            [
                DenseKernel(name, cast(nn.Linear, layer).weight.detach(), basis, self.grid_size)
                for name, layer, basis in zip(names, layers, kernels.bases, strict=True)
            ]
            for (names, layers), kernels in zip(groups, self._factorized(Candidate(1, frequencies)), strict=True)
        ]

    def build(self, candidate: Candidate, fits: Sequence[Sequence[tuple[Factors, torch.Tensor]]]) -> SPProjector:
        """The projector with these factors and cores, and with copies of the heads and of the attention."""
        extractor, integrator = self._modules(candidate)
        for kernels, found in zip(self._factorized_of(extractor, integrator), fits, strict=True):
            _load(kernels, found, like=self._weight)
        if integrator is not None and self.integrator is not None:
            for name in ("query_projector", "key_projector", "value_projector"):
                setattr(integrator, name, copy.deepcopy(getattr(self.integrator, name)))
        spatial_head, patch_head = copy.deepcopy((self.projector.spatial_head, self.projector.patch_head))
        return SPProjector(extractor, integrator, spatial_head, patch_head).train(self.projector.training)

    def _factorized(self, candidate: Candidate) -> list[FactorizedKernels]:
        return self._factorized_of(*self._modules(candidate))

    @staticmethod
    def _factorized_of(
        extractor: FactorizedFeatureExtractor, integrator: DetailFeatureIntegrator | None
    ) -> list[FactorizedKernels]:
        return [extractor.kernels, *([] if integrator is None else [cast(FactorizedKernels, integrator.detail_kernel)])]

    def _modules(self, candidate: Candidate) -> tuple[FactorizedFeatureExtractor, DetailFeatureIntegrator | None]:
        """The modules, without values."""
        dense, integrator = self.extractor, self.integrator
        factors: dict[str, Any] = {"rank": candidate.rank, "spatial_basis": self.spatial_basis}
        shape: dict[str, Any] = {"grid_size": self.grid_size, "device": "meta", "dtype": self._weight.dtype}
        numbers = self.frequencies_of(candidate)
        extractor = FactorizedFeatureExtractor(
            self.channels,
            dense.spatial_hidden_size,
            kernel_sizes=dense.kernel_sizes,
            variant=dense.variant,
            frequencies=numbers,
            **factors,
            **shape,
        )
        if integrator is None:
            return extractor, None
        size, stride = integrator.kernel_size, integrator.stride
        return extractor, DetailFeatureIntegrator(
            self.channels,
            dense.spatial_hidden_size,
            kernel_size=size,
            stride=stride,
            frequencies=min(max(numbers), *as_size(size, "kernel size")),
            **factors,
            **shape,
        )


def dense_layers(projector: Any) -> list[nn.Linear]:
    """The kernels of a dense projector: the extractor's, and the integrator's if there is one.

    Raises:
        SpatialTokensError: If it has others, or they are wrapped, quantized or sharded.
    """
    if not isinstance(projector, SPProjector):
        raise SpatialTokensError(f"projector must be an SPProjector, got a {type(projector).__name__}")
    extractor, integrator = projector.extractor, projector.integrator
    factorized = integrator is not None and integrator.rank is not None
    if isinstance(extractor, FactorizedFeatureExtractor) and (integrator is None or factorized):
        raise SpatialTokensError(f"the projector is factorized already, with rank {extractor.rank}; give the dense one that it was")
    if not isinstance(extractor, SpatialFeatureExtractor) or factorized:
        found = "a factorized detail kernel" if factorized else f"a {type(extractor).__name__}"
        raise SpatialTokensError(f"dense kernels are needed, as those of a SpatialFeatureExtractor are; this projector has {found}")
    layers = [*extractor.kernels, *([] if integrator is None else [integrator.detail_kernel])]
    if any(is_quantized(weight) for layer in layers for weight in layer.parameters(recurse=False)):
        raise SpatialTokensError("a kernel is quantized; use the projector before quantization")
    if not all(type(layer) is nn.Linear and is_plain(layer) and not is_partitioned(layer.weight) for layer in layers):
        raise SpatialTokensError("a kernel is wrapped, quantized or sharded; merge or unload it first")
    return cast("list[nn.Linear]", layers)


def _check_values(layers: Sequence[nn.Linear]) -> None:
    for layer in layers:
        if layer.weight.is_meta:
            raise SpatialTokensError("a kernel is on the meta device, without values; load or initialize it first")
        if layer.weight.device.type == "mps":
            raise SpatialTokensError("sums over pictures need float64, which MPS does not have; move the projector to the CPU")
        if not all(bool(part.isfinite().all()) for part in torch.split(layer.weight, SLICE)):
            raise SpatialTokensError("a kernel holds NaN or infinity; find out where they come from before you compress it")
    placed = sorted({f"{layer.weight.dtype} on {layer.weight.device}" for layer in layers})
    if len(placed) > 1:
        raise SpatialTokensError(f"kernels are {' and '.join(placed)}; move them to one device and dtype first")


def _load(kernels: FactorizedKernels, found: Sequence[tuple[Factors, torch.Tensor]], like: torch.Tensor) -> None:
    """Gives factorized kernels their values."""
    values = {f"cores.{i}.weight": core for i, (_, core) in enumerate(found)}
    values["channel_projection.weight"] = found[0][0].projection
    if kernels.spatial_basis == "learned":
        for i, (factors, _) in enumerate(found):
            values[f"maps.{i}"] = torch.unflatten(factors.maps, 1, kernels.bases[i].map_size)
    placed = {name: each.to(like.device, like.dtype, copy=True).contiguous() for name, each in values.items()}
    if not all(bool(each.isfinite().all()) for each in placed.values()):
        raise SpatialTokensError(f"the factorized kernels have values beyond {like.dtype}; compress the projector as float32")
    kernels.load_state_dict(placed, assign=True)
