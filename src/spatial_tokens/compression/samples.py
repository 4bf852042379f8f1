"""The sample of features that a compression reads, several times, in batches that fit into little memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.grid import Size
from spatial_tokens.modules.inputs import check_num_patches
from spatial_tokens.ops.dense import check_dense

BATCH_BYTES = 2**26
HELD_OUT = 5  # each fifth picture
LARGEST_EXPONENT = 120  # of a power of two by which float32 can be divided

Progress = Callable[[str, int], None]
Features = torch.Tensor | str | PathLike[str] | Iterable[torch.Tensor]


class Sample:
    """Features `(b, N, C)` of pictures, a batch at a time, as often as they are asked for.

    Args:
        features: A tensor `(n, N, C)`; a safetensors file that holds one; or batches of them that can be read again and again.
        grid_size: The grid that they must have.
        hidden_size: The channels that they must have.
        device: Where they are wanted.
        dtype: In what dtype.
        progress: Told what pictures are read for, and how many have been.

    Attributes:
        scale: A power of two that brings features near 1, so that their squares are finite; features are divided by it.

    Raises:
        SpatialTokensError: If features are none of these, do not fit, or hold NaN or infinity.
    """

    def __init__(
        self, features: Any, grid_size: Size, hidden_size: int, device: torch.device, dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self._batches = _batches(features)
        self.grid_size, self.hidden_size = grid_size, hidden_size
        self.device, self.dtype = device, dtype
        self._most = max(1, BATCH_BYTES // (4 * grid_size[0] * grid_size[1] * hidden_size))
        self.pictures = 0
        self.scale = 1.0
        self._progress = progress

    @property
    def held_out(self) -> int:
        """Pictures on which a fit to the others is judged."""
        return self.pictures // HELD_OUT

    def read(self, stage: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches `(b, N, C)`, divided by `scale`, and which of their pictures are held out, `(b,)`."""
        read, first = 0, self.pictures == 0
        for batch in self._batches:
            self._check(batch, read)
            for part in torch.split(batch, self._most):
                values = part.detach().to(self.device, self.dtype)
                finite = values.isfinite().flatten(1).all(1)
                if not bool(finite.all()):
                    picture = read + int(finite.logical_not().nonzero()[0])
                    raise SpatialTokensError(f"the features of picture {picture}, counted from 0, hold NaN or infinity")
                if first and bool(values.any()):
                    self.scale, first = _scale(values), False
                numbers = torch.arange(read, read + len(part), device=values.device)
                read += len(part)
                yield values / self.scale, numbers % HELD_OUT == HELD_OUT - 1
                if self._progress is not None:
                    self._progress(stage, read)
        if read < HELD_OUT:
            raise SpatialTokensError(f"features are of {read} pictures; give {HELD_OUT} at least, better some hundreds")
        if self.pictures not in (0, read):
            raise SpatialTokensError(
                f"features were of {self.pictures} pictures when they were read first, and are of {read} now; "
                "give batches that are the same each time"
            )
        self.pictures = read

    def _check(self, batch: Any, read: int) -> None:
        check_dense(batch, f"the batch of features after {read} pictures", "(b, N, C)", 3)
        if batch.shape[-1] != self.hidden_size:
            raise SpatialTokensError(f"features have {batch.shape[-1]} channels, the projector reads {self.hidden_size}")
        if batch.is_meta:
            raise SpatialTokensError("features are on the meta device, without values; encode the pictures first")
        if not batch.is_floating_point():
            raise SpatialTokensError(f"features must be floating point, got {batch.dtype}; encode the pictures first")
        check_num_patches(batch.shape[1], self.grid_size)


def _scale(values: torch.Tensor) -> float:
    """A power of two, as large as the largest value."""
    return 2.0 ** min(max(math.frexp(values.abs().max().item())[1], -LARGEST_EXPONENT), LARGEST_EXPONENT)


def _batches(features: Any) -> Iterable[Any]:
    if isinstance(features, torch.Tensor):
        check_dense(features, "features", "(n, N, C)", 3)
        return [features]
    if isinstance(features, (str, PathLike)):
        return FeatureFile(features)
    if not isinstance(features, Iterable):
        raise SpatialTokensError(
            f"features must be a tensor (n, N, C), a safetensors file or batches of features, got a {type(features).__name__}"
        )
    if iter(features) is features:
        raise SpatialTokensError(
            f"features are read several times, which a {type(features).__name__} cannot be; give a list or a DataLoader"
        )
    return features


class FeatureFile:
    """The one tensor `(n, N, C)` of a safetensors file, in batches; the file is not read whole.

    Args:
        path: The file. Where it holds several tensors, the one named "features".

    Raises:
        SpatialTokensError: If it cannot be read, or holds no such tensor.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = as_path(path, "the features")
        with _opened(self._path) as file:
            names = list(file.keys())
            self._name = "features" if "features" in names else names[0] if len(names) == 1 else None
            if self._name is None:
                raise SpatialTokensError(
                    f"{self._path} holds {len(names)} tensors; it must hold one, or one that is named 'features'"
                )
            self._shape = tuple(file.get_slice(self._name).get_shape())
        if len(self._shape) != 3:
            raise SpatialTokensError(f"{self._name} of {self._path} must have shape (n, N, C), got {self._shape}")

    def __iter__(self) -> Iterator[torch.Tensor]:
        count, patches, channels = self._shape
        step = max(1, BATCH_BYTES // max(1, 4 * patches * channels))
        with _opened(self._path) as file:
            values = file.get_slice(self._name)
            for start in range(0, count, step):
                yield values[start : start + step]


def _opened(path: Path) -> Any:
    if path.is_dir():
        raise SpatialTokensError(f"{path} is a folder; give a safetensors file of features (n, N, C)")
    if not path.is_file():
        raise SpatialTokensError(f"{path} does not exist; give a safetensors file of features (n, N, C)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SpatialTokensError(f"{path} is not a complete safetensors file: {reason(error)}") from error
