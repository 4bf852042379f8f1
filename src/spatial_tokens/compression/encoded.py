"""Pictures in a folder as features, encoded once and read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.grid import check_positive
from spatial_tokens.pictures import read_picture

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BATCH = 8


def pictures_in(folder: str | os.PathLike[str], most: int) -> list[Path]:
    """The pictures in a folder and those below, by name; where there are more than `most`, evenly spread ones.

    Raises:
        SpatialTokensError: If it is no folder, or has no pictures.
    """
    check_positive(most=most)
    path = as_path(folder, "the folder of pictures")
    if not os.path.isdir(path):
        raise SpatialTokensError(f"{path} is not a folder; give one of pictures")
    found = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
    if not found:
        raise SpatialTokensError(f"{path} has no pictures; looked for {', '.join(SUFFIXES)}")
    return found if len(found) <= most else [found[i * len(found) // most] for i in range(most)]


class EncodedPictures(AbstractContextManager["EncodedPictures"]):
    """Features of pictures, a batch at a time: encoded when they are first read, then read from a temporary file.

    Args:
        paths: The pictures.
        encoder: Pixels `(B, 3, height, width)` to features `(B, N, C)`.
        transform: A picture to pixels.
        device: The encoder's.
    """

    def __init__(
        self,
        paths: list[Path],
        encoder: Callable[[torch.Tensor], torch.Tensor],
        transform: Callable[[Any], Any],
        device: Any = None,
    ) -> None:
        self._paths, self._encoder, self._transform, self._device = paths, encoder, transform, device
        self._folder = TemporaryDirectory(prefix="spatial-tokens-")
        self._kept: torch.Tensor | None = None

    def __exit__(self, *_: object) -> None:
        self._kept = None
        self._folder.cleanup()

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._kept is not None:
            yield from torch.split(self._kept, BATCH)
            return
        kept, done = None, 0
        for start in range(0, len(self._paths), BATCH):
            with torch.inference_mode():
                paths = self._paths[start : start + BATCH]
                pixels = [self._transform(read_picture(path)) for path in paths]
                features = self._encoder(torch.stack(pixels).to(self._device)).cpu()
            for path, each in zip(paths, features, strict=True):
                if not bool(each.isfinite().all()):
                    raise SpatialTokensError(
                        f"the encoder gives NaN or infinity for the picture {path}; look at its weights and dtype"
                    )
            kept = self._allocate(features) if kept is None else kept
            kept[done : done + len(features)] = features
            done += len(features)
            yield features
        self._kept = kept

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Room for the features of all pictures, in a file."""
        shape = (len(self._paths), *like.shape[1:])
        path = Path(self._folder.name) / "features"
        size = like.new_empty(0).element_size() * len(self._paths) * like[0].numel()
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk is found as it is written to
                    os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(path), shared=True, size=len(self._paths) * like[0].numel(), dtype=like.dtype).view(shape)
        except (OSError, RuntimeError) as error:
            raise SpatialTokensError(
                f"there is no room for {size / 2**30:.1f} GiB of features in {path.parent}: {reason(error)}; "
                "take fewer pictures, or set TMPDIR"
            ) from error
