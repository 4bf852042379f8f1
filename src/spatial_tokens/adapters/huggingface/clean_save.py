"""A base model's `save_pretrained` that writes the base alone, as it was before spatial tokens were attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CleanSave:
    """Takes the place of a model's `save_pretrained`: no tensor of ours, no row of the reserved token.

    Args:
        model: The model, before anything is attached.
        prefix: The name that our submodule will have in it.
    """

    def __init__(self, model: Any, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.rows = int(model.get_input_embeddings().weight.shape[0])
        self.grown: list[str] = []  # parameters that gained rows since, and
        self.grown_to = self.rows  # how many they have
        self.__signature__ = inspect.signature(type(model).save_pretrained)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(type(self.model).save_pretrained).bind(self.model, *args, **kwargs)
        given = call.arguments.get("state_dict")
        given = self.model.state_dict() if given is None else given
        added = self._added()
        tensors = {
            name: each[: len(each) - added] if name in self.grown else each
            for name, each in given.items()
            if not name.startswith(f"{self.prefix}.")
        }
        with self._as_before():
            call.arguments["state_dict"] = tensors
            return type(self.model).save_pretrained(*call.args, **call.kwargs)

    def _added(self) -> int:
        """Rows of the reserved token that are still the embeddings' last: 0 once somebody has added rows of their own."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        return rows - self.rows if self.grown and rows == self.grown_to else 0

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        text = self.model.config.get_text_config()
        names = ("vocab_size", "vocab_size_per_layer_input")
        found = [
            (config, name, getattr(config, name)) for config in (text, self.model.config) for name in names if hasattr(config, name)
        ]
        try:
            for owner, name, value in found:
                setattr(owner, name, value - self._added())
            yield
        finally:
            for owner, name, value in found:
                setattr(owner, name, value)
