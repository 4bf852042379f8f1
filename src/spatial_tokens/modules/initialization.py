"""Initialising what a module is made of."""

from torch import nn


def reset(module: nn.Module) -> None:
    """Calls `reset_parameters` of a module, or of its children where it has none."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return
    for child in module.children():
        reset(child)
