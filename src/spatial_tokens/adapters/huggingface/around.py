"""A method of a model, replaced by one that calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any


class Around:
    """A method of an object, with something around it; it has the method's signature, which transformers reads.

    Args:
        owner: The object.
        name: The method's.
        around: What is called instead, with the method and its arguments by name.
    """

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
        self.owner, self.name, self.around, self.before = owner, name, around, vars(owner).get(name)
        parameters = self.__signature__.parameters.values()
        self.takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        self.names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]

    @property
    def __signature__(self) -> inspect.Signature:
        if self.before is not None:
            return inspect.signature(self.before)
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.takes_any and len(args) > len(self.names):
            return self.around(partial(self._original, *args), kwargs)
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes {len(self.names)} positional arguments at most, got {len(args)}")
        named = dict(zip(self.names[: len(args)], args, strict=True))
        return self.around(self._original, {**named, **kwargs})

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)  # torch.compile cannot trace `__get__`
