"""What transformers' Trainer needs to know of spatial tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spatial_tokens.adapters.huggingface.saving import save_adapter
from spatial_tokens.errors import MissingExtraError

FOLDER = "spatial_tokens"


def trainer_callback() -> Any:
    """A callback that writes an adapter into `spatial_tokens/` of each of Trainer's checkpoints.

    To resume: `load_adapter(base, checkpoint / "spatial_tokens", processor)`, then `train(resume_from_checkpoint=checkpoint)`.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error

    class SaveSpatialTokens(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
            sharded = any(hasattr(each, "full_tensor") for each in model.parameters())  # then all of them gather, one writes
            if state.is_world_process_zero or sharded:
                save_adapter(model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    return SaveSpatialTokens()
