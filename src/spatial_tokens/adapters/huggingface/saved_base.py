"""A base model's `save_pretrained` that writes the base alone."""

from __future__ import annotations

import inspect
from typing import Any


class SaveBase:
    """Takes the place of a model's `save_pretrained`: no tensor of the spatial tokens is written.

    Args:
        model: The model.
        prefix: The name of the spatial tokens in it.
    """

    def __init__(self, model: Any, prefix: str) -> None:
        self.model, self.prefix = model, prefix

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(type(self.model).save_pretrained).bind(self.model, *args, **kwargs)
        given = call.arguments.get("state_dict")
        given = self.model.state_dict() if given is None else given
        call.arguments["state_dict"] = {name: each for name, each in given.items() if not name.startswith(f"{self.prefix}.")}
        return type(self.model).save_pretrained(*call.args, **call.kwargs)
