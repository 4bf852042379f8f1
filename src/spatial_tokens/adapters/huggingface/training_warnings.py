"""Warnings of training that would be for nothing: each once, at the first step."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from spatial_tokens.storage.sharded import is_sharded

PEFT_EXCLUDE_MODULES = r"(.*\.)?spatial_tokens\..*"
FROZEN = "the spatial tokens are random and frozen; unfreeze model.spatial_tokens, or name it in PEFT's modules_to_save"
WRAPPED = (
    "an adapter such as LoRA wraps layers of the spatial tokens, which save_adapter cannot save; give PEFT "
    f"exclude_modules={PEFT_EXCLUDE_MODULES!r}"
)


class TrainingWarnings:
    """What has been warned of.

    Args:
        projector: The spatial tokens, as they were attached.
        is_new: Whether their weights are random.
    """

    def __init__(self, projector: nn.Module, *, is_new: bool) -> None:
        self.given: set[str] = set()
        self.random = _first_values(projector) if is_new else None

    def check(self, projector: nn.Module) -> None:
        """Warns of a projector that takes part in a step of training: where it is random and frozen, or layers are wrapped."""
        if not projector.training:
            return
        if FROZEN not in self.given and self.random is not None and _is_frozen(projector):
            if _equal(_first_values(projector), self.random):
                self._warn(FROZEN)
            else:
                self.random = None  # it has been trained, or loaded
        if WRAPPED not in self.given and any(hasattr(module, "base_layer") for module in projector.modules()):
            self._warn(WRAPPED)

    def _warn(self, message: str) -> None:
        self.given.add(message)
        warnings.warn(message, stacklevel=5)


def _is_frozen(projector: nn.Module) -> bool:
    kept = getattr(projector, "modules_to_save", None)  # PEFT's copies, of which one is used
    return not kept and not any(weight.requires_grad for weight in projector.parameters())


def _first_values(projector: nn.Module) -> torch.Tensor | None:
    """Some of the weights, to tell whether they have changed; None where they are not at hand."""
    weight = next(projector.parameters())
    return None if is_sharded(weight) or weight.is_meta else weight.detach().flatten()[:64].to("cpu", torch.bfloat16, copy=True)


def _equal(found: torch.Tensor | None, random: torch.Tensor) -> bool:
    return found is None or torch.equal(found, random)
