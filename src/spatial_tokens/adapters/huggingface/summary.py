"""`print_trainable_parameters`, for a model with spatial tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.hooks import NAME


def print_trainable_parameters(model: Any) -> None:
    """Prints how many parameters train, in all and among the spatial tokens, as PEFT's method of this name does.

    Args:
        model: An attached model, also one that PEFT has wrapped.

    Raises:
        SpatialTokensError: If it has no spatial tokens.
    """
    attachment_of(model)
    parameters = dict(model.named_parameters())
    spatial = {name: each for name, each in parameters.items() if NAME in name.split(".")}
    others = {name: each for name, each in parameters.items() if name not in spatial}
    trainable, total = _counts(parameters)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / max(1, total):.4f}")
    for what, group in (("spatial tokens", spatial), ("rest of the model", others)):
        print("  {}: {:,} of {:,} train".format(what, *_counts(group)))


def _counts(parameters: dict[str, nn.Parameter]) -> tuple[int, int]:
    """How many train, and how many there are; of a parameter that DeepSpeed has partitioned, the whole."""
    sizes = {name: getattr(each, "ds_numel", each.numel()) for name, each in parameters.items()}
    return sum(sizes[name] for name, each in parameters.items() if each.requires_grad), sum(sizes.values())
