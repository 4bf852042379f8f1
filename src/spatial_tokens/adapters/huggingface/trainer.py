"""What transformers' Trainer needs to know of spatial tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spatial_tokens.adapters.huggingface.collator import MaskPlaceholders
from spatial_tokens.adapters.huggingface.saving import is_sharded_model, save_adapter, trained_tensors
from spatial_tokens.errors import MissingExtraError

FOLDER = "spatial_tokens"


def trainer_callback() -> Any:
    """A callback that writes an adapter into `spatial_tokens/` of each of Trainer's checkpoints, and masks labels of placeholders.

    It wraps Trainer's collator in `MaskPlaceholders`. Training does not begin if the spatial tokens cannot be saved, such as where
    PEFT wraps their layers.

    To resume: `load_adapter(base, checkpoint / "spatial_tokens", processor)`, then `train(resume_from_checkpoint=checkpoint)`.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error

    class SaveSpatialTokens(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, *, model: Any = None, train_dataloader: Any = None, **_: Any
        ) -> None:
            trained_tensors(model)  # what cannot be saved is an error now, not after hours
            loader = getattr(train_dataloader, "base_dataloader", train_dataloader)  # accelerate's has one inside
            if loader is not None:
                loader.collate_fn = MaskPlaceholders(loader.collate_fn, model)

        def on_save(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
            if state.is_world_process_zero or is_sharded_model(model):
                save_adapter(model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    return SaveSpatialTokens()
