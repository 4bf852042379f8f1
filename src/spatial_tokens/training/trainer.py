"""transformers' Trainer, with the recipe's learning rates and checkpoints that are complete or skipped."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler

from spatial_tokens.adapters.huggingface.saving import is_sharded_model
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown
from spatial_tokens.training.checkpoints import checkpoints_in, last_complete, mark_complete
from spatial_tokens.training.prepare import load_trained, parts_of, require_finite, save_trained
from spatial_tokens.training.recipe import Stage, parameter_groups, schedule

try:
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_length_grouped_indices
except ImportError as missing:
    raise MissingExtraError("transformers", "train") from missing

OnNan = Literal["stop", "continue"]
LEAST_SCALE = 1e-4  # fairseq's: a float16 loss that overflows at this scale is not finite itself


class SpatialTokensTrainer(Trainer):
    """Trains a model that `prepare_model` made ready for a stage.

    Learning rates, schedule and weight decay are the stage's, whatever the `TrainingArguments` say; all else is theirs. A
    checkpoint holds what trains (`spatial_tokens/`, `lora/`), the optimizer's and the random state, not the base; a list of its
    files is written last, so that `last_complete(output_dir)` never gives one that was cut short or damaged. Samples of a data set
    that tells its `lengths` are grouped by them.

    NaN and infinity are logged as they are (`logging_nan_inf_filter` is turned off), and weights that are not finite are never
    written.

    Args:
        stage: The recipe.
        on_nan: "stop": the first step or evaluation whose loss or gradient norm is NaN or infinite ends training with an error,
            in all processes. "continue": training goes on; a checkpoint of weights that are not finite is left out with a warning.
        **options: As Trainer takes them.

    Raises:
        SpatialTokensError: If the arguments ask for checkpoints that cannot be resumed, or for one process on several GPUs; in
            training, if a checkpoint cannot be written, or as `on_nan` says.
    """

    def __init__(self, *, stage: Stage, on_nan: OnNan = "stop", **options: Any) -> None:
        if not isinstance(stage, Stage):
            raise SpatialTokensError(f"stage must be a Stage, such as ALIGNMENT, got {shown(stage)}")
        if on_nan not in ("stop", "continue"):
            raise SpatialTokensError(f"on_nan must be 'stop' or 'continue', got {shown(on_nan)}")
        self.stage, self.on_nan = stage, on_nan
        super().__init__(**options)
        self.args.logging_nan_inf_filter = False
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
            self.optimizer = kind(parameter_groups(parts_of(self._unwrapped_model()), self.stage), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.create_optimizer(), self.stage, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # its data loader draws a number, and training must not notice
            metrics = super().evaluate(*arguments, **options)
        for name, value in metrics.items():
            if self.on_nan == "stop" and name.endswith("_loss") and isinstance(value, float) and not isfinite(value):
                raise self._not_finite(f"{name} is {value}")
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *rest: Any, **options: Any) -> None:
        """After each optimizer step, and each epoch."""
        if self.on_nan == "stop":
            self._require_finite(tr_loss, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **options)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()  # Trainer subtracts it from itself, which leaves NaN for the steps to come

    def _require_finite(self, loss: torch.Tensor, grad_norm: Any) -> None:
        """Reads loss and gradient norm of all processes at once, so that all of them stop.

        Raises:
            SpatialTokensError: If one is not finite. A gradient that overflowed in float16 is no reason: its step was skipped, and
                the next one is scaled down.
        """
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        norm = torch.as_tensor(0.0 if norm is None or self._float16_step_was_skipped() else norm, device=loss.device)
        found: Any = self.accelerator.gather(torch.stack([loss.detach().float(), norm.detach().float()])[None])
        for name, values in zip(("loss", "gradient norm"), found.T.tolist(), strict=True):
            if (wrong := next((value for value in values if not isfinite(value)), None)) is not None:
                raise self._not_finite(f"the {name} is {wrong}")

    def _float16_step_was_skipped(self) -> bool:
        if self.accelerator.mixed_precision != "fp16" or not self.accelerator.optimizer_step_was_skipped:
            return False
        scaler = self.accelerator.scaler  # None under DeepSpeed, which gives up by itself
        return scaler is None or scaler.get_scale() >= LEAST_SCALE

    def _not_finite(self, what: str) -> SpatialTokensError:
        return SpatialTokensError(
            f"step {self.state.global_step}: {what}; training stopped, {self._last_checkpoint(Path(self._get_output_dir(None)))} "
            "(on_nan='continue' trains on)"
        )

    def _last_checkpoint(self, output_dir: Path) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = last_complete(output_dir) if output_dir.is_dir() else None
        return "no checkpoint was written before" if kept is None else f"the last good checkpoint is {kept}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            require_finite(self._unwrapped_model())  # in every process, not only in the one that writes
        if self.args.should_save or is_sharded_model(self._unwrapped_model()):
            save_trained(self._unwrapped_model(), output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._unwrapped_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self._unwrapped_model(), str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        try:
            require_finite(self._unwrapped_model())
        except SpatialTokensError as error:
            if self.on_nan == "stop":
                raise self._not_finite(str(error)) from error
            warnings.warn(f"{folder} is not written: {error}", stacklevel=2)
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the new one must be whole before an old one goes
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
                self._remove_old(output_dir, folder, limit)
        except (OSError, RuntimeError, SafetensorError, SpatialTokensError) as error:
            raise SpatialTokensError(
                f"cannot write the checkpoint {folder}: {reason(error)}; {self._last_checkpoint(output_dir)}"
            ) from error
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

    def _unwrapped_model(self) -> Any:
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
