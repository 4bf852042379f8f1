"""Tokens of a picture replaced by another's, or by any others: what does a model look for in them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


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

    Pictures with the same tokens are passed over: one with several questions in a row is not given its own. If a batch has no
    other, the last picture of the batch before is taken; if there is none, a picture keeps its own tokens.

    Args:
        last: Tokens of a picture `(tokens, D)`, as if of an earlier batch.
    """

    def __init__(self, last: torch.Tensor | None = None) -> None:
        self.last = last

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(pictures, tokens, D)` to others of the same shape."""
        found = torch.stack([self._other(tokens, number) for number in range(len(tokens))])
        self.last = tokens[-1].detach()
        return found

    def _other(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        own = tokens[number]
        for back in range(1, len(tokens)):
            if not torch.equal(tokens[number - back], own):
                return tokens[number - back]
        return own if self.last is None or self.last.shape != own.shape else self.last
