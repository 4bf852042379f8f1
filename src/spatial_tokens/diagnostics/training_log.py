"""The spatial tokens' usage in a training log, measured at each evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from math import ceil
from typing import Any

from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.diagnostics.processes import is_shared_out
from spatial_tokens.diagnostics.token_usage import Batch, require_batches, usage
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.grid import check_positive

BATCHES = 8


def log_usage(trainer: Any, batches: Iterable[Batch] | None = None, *, limit: int = BATCHES) -> None:
    """Has a Trainer log `usage_gain` and the like at each evaluation: a gain that stays at 0 is the first sign of a run in vain.

    It goes where the loss goes: `trainer.state.log_history`, TensorBoard and others. `plot_usage` draws it.

    Args:
        trainer: A `SpatialTokensTrainer`, or any Trainer of transformers, whose model has spatial tokens.
        batches: What is measured (see `usage`); the first of the evaluation's own when left out. Several processes share out a
            DataLoader that accelerate has prepared, as the evaluation's own is, and log what all of them have found; other batches
            are all measured by each.
        limit: At most so many batches, of all processes together; rounded up to as many for each process.

    Raises:
        MissingExtraError: If transformers is not installed.
        SpatialTokensError: If the model has no spatial tokens, or there is nothing to measure.

    Example:
        log_usage(trainer)
        trainer.train()
        plot_usage(trainer.state.log_history)
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    check_positive(limit=limit)
    attachment_of(trainer.model)
    if batches is not None:
        require_batches(batches)
    elif trainer.eval_dataset is None:
        raise SpatialTokensError("the Trainer has no eval_dataset; give it one, or give batches")

    class LogUsage(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found = trainer.get_eval_dataloader() if batches is None else batches
            shared = is_shared_out(found)
            each = ceil(limit / args.world_size) if shared else limit
            trainer.log(usage(trainer.model, _First(found, each), gather=shared).metrics())

    trainer.add_callback(LogUsage())


class _First:
    """The first of some batches, each time they are read."""

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self.batches, self.count = batches, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __iter__(self) -> Any:
        return islice(self.batches, self.count)
