"""A method of a model, replaced by one that calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Around:
    """A method of an object, with something around it; it has the method's signature, which transformers reads."""

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
        self.owner, self.name, self.around, self.before = owner, name, around, vars(owner).get(name)
        parameters = self.__signature__.parameters.values()
        self.names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._before())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes {len(self.names)} positional arguments at most, got {len(args)}")
        named = dict(zip(self.names[: len(args)], args, strict=True))
        return self.around(self._original, {**named, **kwargs})

    def _original(self, **kwargs: Any) -> Any:
        return self._before()(**kwargs)

    def _before(self) -> Callable[..., Any]:
        """What the owner had: an attribute of its own, or its class's method."""
        before: Callable[..., Any] = (
            getattr(type(self.owner), self.name).__get__(self.owner) if self.before is None else self.before
        )
        return before
