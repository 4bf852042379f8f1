"""Trains spatial tokens by the paper's recipe, one stage at a time.

python examples/train.py examples/configs/llava-1.5-7b/alignment.yaml
accelerate launch --config_file examples/engines/zero2.yaml examples/train.py examples/configs/llava-1.5-7b/alignment.yaml --seed 1

A config holds the fields of `Run` and of transformers' TrainingArguments; `--name value` replaces one. The same command again goes
on from the last whole checkpoint in output_dir. docs/training.md says more.
"""

import atexit
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, llava_from_parts, load_adapter
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_llava
from spatial_tokens.errors import reason
from spatial_tokens.storage.files import read_text
from spatial_tokens.training import STAGES, LoRA
from spatial_tokens.training.checkpoints import last_complete
from spatial_tokens.training.dataset import Collator, ConversationDataset
from spatial_tokens.training.prepare import load_trained, prepare
from spatial_tokens.training.trainer import SpatialTokensTrainer

OF_THE_STAGE = (
    "learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "gradient_accumulation_steps",
)  # fmt: skip


@dataclass
class Run:
    """What a config says beside the TrainingArguments.

    Args:
        model: A vision-language model of the hub or a folder; "tiny": a LLaVA of random weights.
        vision: A CLIP, where `model` is a language model alone: their LLaVA starts with a new MLP, as in the paper.
        stage: "alignment" or "instruction_tuning".
        data: The training samples, a file in LLaVA's format.
        images: The folder that their images' paths start from.
        start_from: What an earlier stage wrote (its output_dir): its spatial tokens, and its LoRA where both stages have one.
        preset: The spatial tokens, where there is no earlier stage.
        projector: Fields in place of the preset's, and options of `attach`.
        recipe: Numbers in place of the stage's: global_batch_size, projector_learning_rate, lora: {rank, learning_rate}, ...
        eval_data: Samples to evaluate on, at eval_strategy's times and at the end.
        template: "plain" (the alignment's default), "vicuna" or "chat" (the model's own).
        max_length: The most tokens of a sample, image tokens included.
        on_bad_sample: "stop" or "skip".
        allow_images_outside: Whether images' paths may leave `images`.
    """

    model: str
    stage: str
    data: str
    images: str
    vision: str | None = None
    start_from: str | None = None
    preset: str = "llava-sp-cropping"
    projector: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)
    eval_data: str | None = None
    template: str | None = None
    max_length: int = 2048
    on_bad_sample: str = "stop"
    allow_images_outside: bool = False


KINDS = {str: str, dict: dict, int: int, bool: bool, str | None: (str, type(None))}


def main(arguments):
    """Runs a stage, and gives its Trainer."""
    run, stage, training = read_config(arguments)
    set_seed(training.seed)
    model, processor = build(run)
    model = prepare(model.to(torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32), stage)
    if run.start_from is not None:  # once more, for what was rounded to the model's dtype; and its LoRA, if it has one
        load_trained(model, run.start_from, lora=(Path(run.start_from) / "lora").is_dir())
    checkpoint = last_complete(training.output_dir) if Path(training.output_dir).is_dir() else None
    bad_samples_file = Path(training.output_dir) / "bad_samples.jsonl"
    with training.main_process_first():
        if checkpoint is None and training.process_index == 0:
            bad_samples_file.unlink(missing_ok=True)  # of an earlier run

    options = {
        "template": run.template or ("plain" if stage.lora is None else "vicuna"),
        "max_length": run.max_length,
        "on_bad_sample": run.on_bad_sample,
        "bad_samples_file": bad_samples_file,
        "allow_images_outside": run.allow_images_outside,
    }
    data = ConversationDataset(run.data, run.images, processor, **options)
    evaluation = None if run.eval_data is None else ConversationDataset(run.eval_data, run.images, processor, **options)
    trainer = SpatialTokensTrainer(
        stage=stage, model=model, args=training, train_dataset=data, eval_dataset=evaluation,
        data_collator=Collator(processor.tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    results = {} if evaluation is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(Path(training.output_dir) / "trainer_state.json"))
        report(trainer, checkpoint, results)
    return trainer


def read_config(arguments):
    """The run, its stage, and the TrainingArguments that follow from both."""
    path, *changes = arguments
    values = parsed(read_text(path), path)
    if not isinstance(values, dict):
        raise SpatialTokensError(f"{path} must hold names and values")
    if len(changes) % 2 or not all(name.startswith("--") for name in changes[::2]):
        raise SpatialTokensError(f"after the config come --name value pairs, got {' '.join(changes)}")
    values |= {name[2:]: parsed(value, name) for name, value in zip(changes[::2], changes[1::2], strict=True)}
    known = [each.name for kind in (Run, TrainingArguments) for each in fields(kind) if each.init]
    for name in values:
        if name not in known:
            close = get_close_matches(name, known, 1)
            raise SpatialTokensError(f"{path}: unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if name in OF_THE_STAGE:
            raise SpatialTokensError(f"{path}: {name} follows from the stage; change its numbers under recipe:")
    lacking = [name for name in ("model", "stage", "data", "images", "output_dir") if name not in values]
    if lacking:
        raise SpatialTokensError(f"{path} lacks {', '.join(lacking)}")
    for each in fields(Run):
        if each.name in values and not isinstance(values[each.name], KINDS[each.type]):
            raise SpatialTokensError(f"{path}: {each.name} must be {each.type}, got {values[each.name]!r}")
    stage = stage_of(values["stage"], dict(values.get("recipe", {})))

    at_once = values.setdefault("per_device_train_batch_size", 16)
    if type(at_once) is not int or at_once < 1:
        raise SpatialTokensError(f"{path}: per_device_train_batch_size must be a positive integer, got {at_once!r}")
    per_step = at_once * num_processes()
    if stage.global_batch_size % per_step:
        raise SpatialTokensError(
            f"the stage's global_batch_size {stage.global_batch_size} is no multiple of the {per_step} samples that "
            f"{num_processes()} processes take at once; change per_device_train_batch_size"
        )
    values["gradient_accumulation_steps"] = stage.global_batch_size // per_step
    defaults = {
        "num_train_epochs": stage.num_epochs, "learning_rate": stage.projector_learning_rate, "logging_steps": 1,
        "report_to": "none", "remove_unused_columns": False, "label_names": ["labels"],
    }  # fmt: skip
    values = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in values.items()}  # YAML's no
    if values.get("eval_strategy", "no") != "no" and values.get("eval_data") is None:
        raise SpatialTokensError(f"{path}: eval_strategy needs eval_data")
    try:
        run, training = HfArgumentParser((Run, TrainingArguments)).parse_dict({**defaults, **values})
    except (TypeError, ValueError) as error:
        raise SpatialTokensError(f"{path}: {reason(error)}") from error
    wrong = [
        f"{name} must be a number, got {getattr(training, name)!r}" for name in ("max_steps", "save_steps", "logging_steps", "seed")
        if not isinstance(getattr(training, name), (int, float))
    ]  # fmt: skip
    if wrong or training.dataloader_persistent_workers:
        raise SpatialTokensError(
            f"{path}: {'; '.join(wrong) or 'a run with dataloader_persistent_workers cannot be resumed exactly'}"
        )
    return run, stage, training


class Loader(yaml.SafeLoader):
    """YAML that reads 2e-5 as the number that it is."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parsed(text, where):
    """The value of a YAML text."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise SpatialTokensError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def num_processes():
    """As torchrun and accelerate tell it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def stage_of(name, changes):
    """A stage of the recipe, with some of its numbers replaced."""
    if name not in STAGES:
        raise SpatialTokensError(f"stage must be one of {', '.join(STAGES)}, got {name!r}")
    stage = STAGES[name]
    try:
        if isinstance(changes.get("lora"), dict):
            changes["lora"] = replace(stage.lora or LoRA(), **changes["lora"])
        return replace(stage, **changes)
    except (TypeError, SpatialTokensError) as error:
        raise SpatialTokensError(f"recipe: {error}") from error


def build(run):
    """The model and its processor, with the spatial tokens of the earlier stage or with new ones."""
    if run.vision is not None:
        model, processor = llava_from_parts(run.model, run.vision)
    else:
        model, processor = tiny_llava() if run.model == "tiny" else from_hub(run.model)
    if run.start_from is not None:
        return load_adapter(model, Path(run.start_from) / "spatial_tokens", processor)
    return attach(model, processor, run.preset, **run.projector)


def report(trainer, checkpoint, results):
    """Says what came of it."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if checkpoint is not None:
        print(f"went on from {checkpoint}")
    told = f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "no loss logged"
    print(f"{trainer.state.global_step} steps, {told}; wrote {trainer.args.output_dir}")
    if results:
        print(f"evaluation loss {results['eval_loss']:.4f}")
    for data in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        if bad := data.bad_samples:
            print(
                f"{len(bad)} bad samples of {data.path} were left out; {data.bad_samples_file} says which and why", file=sys.stderr
            )


def leave():
    """Ends a process of several: DDP keeps threads of the destroyed group, which abort now and then when Python is taken down."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    try:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            raise SpatialTokensError("give a config: python examples/train.py CONFIG.yaml [--name value ...]")
        main(sys.argv[1:])
    except SpatialTokensError as error:
        sys.exit(f"train.py: error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if num_processes() > 1:
        leave()
