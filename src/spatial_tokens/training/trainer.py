"""transformers' Trainer, with the recipe's learning rates and checkpoints that are whole or passed over."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.training.checkpoints import checkpoints_in, last_complete, mark_complete
from spatial_tokens.training.prepare import load_trained, parts_of, save_trained
from spatial_tokens.training.recipe import Stage, parameter_groups, schedule

try:
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_length_grouped_indices
except ImportError as missing:
    raise MissingExtraError("transformers", "train") from missing


class SpatialTokensTrainer(Trainer):
    """Trains a model that `prepare` made ready for a stage.

    Learning rates, schedule and weight decay are the stage's, whatever the `TrainingArguments` say; all else is theirs. A
    checkpoint holds what trains (`spatial_tokens/`, `lora/`), the optimizer's and the random state, not the base; a list of its
    files is written last, so that `last_complete(output_dir)` never gives one that was cut short or damaged. Samples of a data set
    that tells its `lengths` are grouped by them.

    Args:
        stage: The recipe.
        **options: As Trainer takes them.

    Raises:
        SpatialTokensError: If the arguments ask for checkpoints that cannot be resumed, or for one process on several GPUs; in
            training, if a checkpoint cannot be written.
    """

    def __init__(self, *, stage: Stage, **options: Any) -> None:
        self.stage = stage
        super().__init__(**options)
        if self.args.save_only_model:
            raise SpatialTokensError(
                "save_only_model leaves out what a resumed run needs; only spatial_tokens/ and lora/ are large"
            )
        if self.args.n_gpu > 1:
            raise SpatialTokensError(
                f"one process for {self.args.n_gpu} GPUs is not supported; launch one for each: accelerate launch"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(parameter_groups(parts_of(self._bare()), self.stage), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.create_optimizer(), self.stage, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # its data loader draws a number, and training must not notice
            return super().evaluate(*arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save or self.is_fsdp_enabled:
            save_trained(self._bare(), output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._bare(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self._bare(), str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the new one must be whole before an old one goes
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
                self._remove_old(output_dir, folder, limit)
        except (OSError, RuntimeError, SafetensorError, SpatialTokensError) as error:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept = last_complete(output_dir)
            left = "there is none before it" if kept is None else f"the last whole one is {kept}"
            raise SpatialTokensError(f"cannot write the checkpoint {folder}: {reason(error)}; {left}") from error
        finally:
            self.args.save_total_limit = limit

    def _remove_old(self, output_dir: Path, newest: Path, limit: int | None) -> None:
        """Leaves as many as the limit says; what has more steps than the newest is of a run that was given up."""
        if not limit:
            return
        best, found = self.state.best_model_checkpoint, checkpoints_in(output_dir)
        older, given_up = found[: found.index(newest)], found[found.index(newest) + 1 :]
        for folder in given_up + older[: len(older) - (limit - 1)]:
            if best is None or folder != Path(best):
                shutil.rmtree(folder, ignore_errors=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        at_once = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self._by_length(dataset, at_once) or super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        at_once = self.args.eval_batch_size * self.args.world_size
        return self._by_length(eval_dataset, at_once) or super()._get_eval_sampler(eval_dataset)

    def _by_length(self, dataset: Any, batch_size: int) -> Any:
        if not hasattr(dataset, "lengths"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _ByLength(dataset.lengths, batch_size, seed)

    def _bare(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


class _ByLength(Sampler[int]):
    """Samples of about the same length side by side; their order follows from seed and epoch, and is a resumed run's too."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))  # type: ignore[no-untyped-call]
