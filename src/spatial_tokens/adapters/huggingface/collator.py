"""A data collator whose labels leave placeholders out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.placeholders import IGNORED


class MaskPlaceholders:
    """Wraps a data collator: labels of placeholders become -100, before anybody counts them.

    An attached model masks them itself. But transformers' Trainer divides the loss by the number of labels that it counted in all
    batches of a step, and label smoothing takes labels before the model sees them.

    Args:
        collator: Samples to a batch with `labels`.
        model: The attached model.

    Raises:
        SpatialTokensError: If the model has no spatial tokens.

    Examples:
        ```python
        Trainer(model=model, data_collator=MaskPlaceholders(collator, model), ...)
        ```
    """

    def __init__(self, collator: Callable[..., Any], model: Any) -> None:
        attachment = attachment_of(model)
        self.collator, self.token_id = collator, attachment.token_id if attachment.mode == "own" else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        if self.token_id is not None and batch.get("labels") is not None:
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == self.token_id, IGNORED)
        return batch
