"""A base model's `save_pretrained` that writes the base alone, as it was before spatial tokens were attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CleanSave:
    """Takes the place of a model's `save_pretrained`: no tensor of ours, no row of the reserved token, no suppressed token.

    Args:
        model: The model.
        prefix: The name of our submodule in it.
        rows: Rows that its embeddings had before.
        suppressed: Its generation config's `suppress_tokens` before.
    """

    def __init__(self, model: Any, prefix: str, rows: int, suppressed: list[int] | None) -> None:
        self.model, self.prefix, self.rows, self.suppressed = model, prefix, rows, suppressed
        self.__signature__ = inspect.signature(type(model).save_pretrained)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("state_dict")
        given = self.model.state_dict() if given is None else given
        of_words = self._names_of_word_rows()
        tensors = {
            name: each[: self.rows] if name in of_words else each
            for name, each in given.items()
            if not name.startswith(f"{self.prefix}.")
        }
        with self._as_before():
            return type(self.model).save_pretrained(self.model, *args, **{**kwargs, "state_dict": tensors})

    def _names_of_word_rows(self) -> set[str]:
        owners = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        ours = [id(each) for owner in owners if owner is not None for each in owner.parameters(recurse=False)]
        return {name for name, each in self.model.named_parameters(remove_duplicate=False) if id(each) in ours}

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        text, generation = self.model.config.get_text_config(), getattr(self.model, "generation_config", None)
        owners = [(config, "vocab_size") for config in (text, self.model.config) if hasattr(config, "vocab_size")]
        found = [(owner, name, getattr(owner, name)) for owner, name in owners]
        if generation is not None:
            found.append((generation, "suppress_tokens", generation.suppress_tokens))
        try:
            for owner, name, value in found:
                setattr(owner, name, self.suppressed if name == "suppress_tokens" else min(value, self.rows))
            yield
        finally:
            for owner, name, value in found:
                setattr(owner, name, value)
