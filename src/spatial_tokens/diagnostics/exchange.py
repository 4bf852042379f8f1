"""Tokens of a picture replaced by another's, or by any others: what does a model look for in them?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Picture = tuple[Any, torch.Tensor]  # its name, or None, and its tokens (tokens, D)


@contextmanager
def replaced_tokens(part: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, what a part gives, `(pictures, tokens, D)`, is replaced."""
    handle = part.register_forward_hook(lambda module, arguments, tokens: replace(tokens))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def another_pictures(*parts: nn.Module) -> Iterator[None]:
    """Within the block, each picture is given the tokens that these parts make of another one (see `Others`).

    Args:
        parts: Modules that give `(pictures, tokens, D)`, such as `model.spatial_tokens`.
    """
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(replaced_tokens(part, Others()))
        yield


class Others:
    """Gives each picture of a batch the tokens of the one before it, the first those of the last.

    The same picture is passed over: one with several questions in a row is not given its own tokens. If a batch has no other
    picture, the latest other one of the batches before is taken; if there is none, a picture keeps its own tokens.
    """

    def __init__(self) -> None:
        self.latest: list[Picture] = []  # the last one and the last other one

    def __call__(self, tokens: torch.Tensor, names: Sequence[Any] | None = None) -> torch.Tensor:
        """Tokens `(pictures, tokens, D)` to others of the same shape.

        Args:
            tokens: Of the pictures of a batch.
            names: The same for the same picture, as `picture_names` gives them. None: pictures with the same tokens are the same.
        """
        pictures = _named(tokens, names)
        found = torch.stack([self._other(pictures, number) for number in range(len(tokens))])
        self.keep(tokens, names)
        return found

    def keep(self, tokens: torch.Tensor, names: Sequence[Any] | None = None) -> None:
        """Keeps what the next batch may need of this one."""
        for picture in _named(tokens.detach(), names):
            self.latest = [picture, *(each for each in self.latest if not _same(each, picture))][:2]

    @property
    def lacking(self) -> bool:
        """Whether a picture may find no other one, as fewer than two are kept."""
        return len(self.latest) < 2

    def lent(self) -> list[Picture]:
        """The last picture, for another process; none where there is none."""
        return [(name, tokens.cpu()) for name, tokens in self.latest[:1]]

    def borrow(self, pictures: Sequence[Picture]) -> None:
        """Keeps another process's pictures, where this one has no other."""
        for name, tokens in pictures if self.latest else ():
            picture = name, tokens.to(self.latest[0][1].device)
            if self.lacking and not any(_same(picture, each) for each in self.latest):
                self.latest.append(picture)

    def _other(self, pictures: list[Picture], number: int) -> torch.Tensor:
        own = pictures[number]
        for other in [*(pictures[number - back] for back in range(1, len(pictures))), *self.latest]:
            if not _same(other, own) and other[1].shape == own[1].shape:
                return other[1]
        return own[1]


def _named(tokens: torch.Tensor, names: Sequence[Any] | None) -> list[Picture]:
    return list(zip([None] * len(tokens) if names is None else names, tokens, strict=True))


def _same(one: Picture, other: Picture) -> bool:
    if one[0] is None or other[0] is None:
        return torch.equal(one[1], other[1])
    return bool(one[0] == other[0])


def picture_names(inputs: Mapping[str, Any], count: int) -> list[str] | None:
    """Digests of the pixels that a model is given of each of `count` pictures, whatever else is in the batch.

    Tokens would not do: their last bits depend on the size of the batch. None if pixels are not laid out picture by picture.
    """
    pixels, grids, sizes = (inputs.get(name) for name in ("pixel_values", "image_grid_thw", "image_sizes"))
    if pixels is None:
        return None
    if grids is not None:  # patches, one picture's after another's
        counts = grids.prod(1).tolist()
        if len(counts) != count or sum(counts) != len(pixels):
            return None
        return [_digest(each, size) for each, size in zip(pixels.split(counts), grids.tolist(), strict=True)]
    if pixels.ndim != 4 or len(pixels) != count:
        return None
    if sizes is None:
        return [_digest(each, each.shape) for each in pixels]
    return [
        _digest(each[:, :height, :width], (height, width)) for each, (height, width) in zip(pixels, sizes.tolist(), strict=True)
    ]


def _digest(pixels: torch.Tensor, size: Sequence[int]) -> str:
    values = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(repr(tuple(size)).encode() + values.tobytes()).hexdigest()
