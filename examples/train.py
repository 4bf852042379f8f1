"""Trains spatial tokens by the paper's recipe, one stage at a time.

python examples/train.py examples/configs/llava-1.5-7b/alignment.yaml
accelerate launch --config_file examples/engines/zero2.yaml examples/train.py examples/configs/llava-1.5-7b/alignment.yaml --seed 1

A config holds the fields of `Run` and of transformers' TrainingArguments; `--name value` replaces one. The same command again
resumes from the last whole checkpoint in output_dir. Without a config a tiny model is trained. docs/training.md says more.
"""

import atexit
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from enum import Enum
from inspect import getdoc
from math import ceil, isfinite
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import TrainerState, TrainingArguments, set_seed

from spatial_tokens import SpatialTokensError, SPProjectorConfig
from spatial_tokens.adapters.huggingface import attach, load_adapter
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_llava
from spatial_tokens.checkpoint import llava_from_parts
from spatial_tokens.errors import reason, shown
from spatial_tokens.storage.files import make_directory
from spatial_tokens.storage.text import read_text
from spatial_tokens.training import STAGES, LoRA
from spatial_tokens.training.checkpoints import last_complete
from spatial_tokens.training.dataset import Collator, ConversationDataset
from spatial_tokens.training.prepare import load_trained, prepare_model
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
        on_nan: "stop" at a loss or gradient that is NaN or infinite, or "continue".
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
    on_nan: str = "stop"


POSITIVE = (
    "max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "logging_steps", "save_steps",
    "eval_steps", "eval_accumulation_steps", "save_total_limit",
)  # fmt: skip
RANGES = {
    **dict.fromkeys(POSITIVE, (", greater than 0", lambda value: value > 0)),
    **dict.fromkeys(("seed", "data_seed"), (" from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)),
    "max_steps": (", greater than 0, or -1 to train for num_train_epochs", lambda value: value > 0 or value == -1),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2"), (" from 0.0 to below 1.0", lambda value: type(value) is float and 0 <= value < 1)
    ),
    "local_rank": ("", lambda value: True),
}
TRANSFORMERS_ERRORS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
NOT_NEGATIVE = (", at least 0", lambda value: value >= 0)
WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", list: "a list", dict: "a mapping"} | {
    type(None): "null"
}


def main(arguments):
    """Runs a stage, and gives its Trainer."""
    run, stage, training = read_config(arguments)
    output_dir = make_directory(training.output_dir)
    set_seed(training.seed)
    model, processor = build(run)
    if not getattr(model, "is_quantized", False):
        model = model.to(torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32)
    model = prepare_model(model, stage)
    if run.start_from is not None:  # once more, for what was rounded to the model's dtype; and its LoRA, if it has one
        load_trained(model, run.start_from, lora=(Path(run.start_from) / "lora").is_dir())
    checkpoint = last_complete(output_dir)
    bad_samples_file = output_dir / "bad_samples.jsonl"
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
    try:
        trainer = SpatialTokensTrainer(
            stage=stage, on_nan=run.on_nan, model=model, args=training, train_dataset=data, eval_dataset=evaluation,
            data_collator=Collator(processor.tokenizer.pad_token_id),
        )  # fmt: skip
        trainer.get_optimizer_cls_and_kwargs(training)
        num_steps = steps_of(trainer)
    except TRANSFORMERS_ERRORS as error:
        raise as_ours(error, arguments[0]) from error

    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if finished := state is not None and state.global_step >= num_steps:
        trainer.state = state
        best = state.best_model_checkpoint if training.load_best_model_at_end else None
        load_trained(model, best or checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    results = {} if evaluation is None or finished else trainer.evaluate()
    if trainer.is_world_process_zero():
        if not finished:
            trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        report(trainer, checkpoint, finished, results)
    return trainer


def steps_of(trainer):
    """The optimizer steps of a whole run."""
    training = trainer.args
    steps_of_epoch = ceil(len(trainer.get_train_dataloader()) / training.gradient_accumulation_steps)
    return training.max_steps if training.max_steps > 0 else ceil(training.num_train_epochs * steps_of_epoch)


def read_config(arguments):
    """The run, its stage, and the TrainingArguments that follow from both."""
    path, *changes = arguments
    values = parsed(read_text(path), path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SpatialTokensError(f"{path} must hold names and values, got {shown(values)}")
    values |= changes_of(changes)
    require_known(path, values)
    lacking = [name for name in ("model", "stage", "data", "images", "output_dir") if values.get(name) in (None, "")]
    if lacking:
        raise SpatialTokensError(f"{path} lacks {', '.join(lacking)}")
    values = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in values.items()}  # YAML's no
    require_values(path, values)
    stage = stage_of(values["stage"], dict(values.get("recipe", {})))

    at_once = values.setdefault("per_device_train_batch_size", 16)
    per_step = at_once * num_processes()
    if stage.global_batch_size % per_step:
        raise SpatialTokensError(
            f"the stage's global_batch_size {stage.global_batch_size} is no multiple of the {per_step} samples that "
            f"{num_processes()} processes take at once; change per_device_train_batch_size"
        )
    defaults = {
        "num_train_epochs": stage.num_epochs, "learning_rate": stage.projector_learning_rate, "logging_steps": 1,
        "report_to": "none", "remove_unused_columns": False, "label_names": ["labels"],
        "gradient_accumulation_steps": stage.global_batch_size // per_step,
    }  # fmt: skip
    if values.get("eval_data") is None and (values.get("eval_strategy", "no") != "no" or values.get("eval_on_start")):
        raise SpatialTokensError(f"{path}: eval_strategy and eval_on_start need eval_data")
    of_run = {each.name for each in fields(Run)}
    run = Run(**{name: value for name, value in values.items() if name in of_run})
    try:
        training = TrainingArguments(**{**defaults, **{name: value for name, value in values.items() if name not in of_run}})
    except TRANSFORMERS_ERRORS as error:
        raise as_ours(error, path) from error
    if training.fp16 and training.device.type == "cpu":
        raise SpatialTokensError(f"{path}: fp16 needs a GPU; leave it out, or use bf16")
    if training.dataloader_persistent_workers:
        raise SpatialTokensError(f"{path}: a run with dataloader_persistent_workers cannot be resumed exactly")
    return run, stage, training


def as_ours(error, path):
    """What transformers said about a config, on one line."""
    if isinstance(error, SpatialTokensError):
        return error
    return SpatialTokensError(f"{path}: {'unknown value ' if isinstance(error, KeyError) else ''}{reason(error)}")


def changes_of(words):
    """The values that `--name value` pairs give."""
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        raise SpatialTokensError(f"after the config come --name value pairs, got {' '.join(words)}")
    names = [name[2:] for name in words[::2]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpatialTokensError(f"--{twice[0]} is given twice")
    return {name: parsed(value, f"--{name}") for name, value in zip(names, words[1::2], strict=True)}


def require_known(path, values):
    """Raises SpatialTokensError at a name that is no field, or not one to be set."""
    known = [each.name for kind in (Run, TrainingArguments) for each in fields(kind) if each.init]
    for name in values:
        if name not in known:
            close = get_close_matches(name, known, 1)
            if close and close[0] in OF_THE_STAGE:
                raise SpatialTokensError(f"{path}: unknown key {name!r}; {of_the_stage(close[0])}")
            raise SpatialTokensError(f"{path}: unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if name in OF_THE_STAGE:
            raise SpatialTokensError(f"{path}: {of_the_stage(name)}")
    if values.get("resume_from_checkpoint") is not None:
        raise SpatialTokensError(f"{path}: leave resume_from_checkpoint out; a run resumes from the last checkpoint in output_dir")


def of_the_stage(name):
    """Where a number is changed that transformers has a key for, but the stage decides."""
    key = {"learning_rate": "projector_learning_rate", "gradient_accumulation_steps": "global_batch_size"}.get(name)
    return f"{name} follows from the stage; change {key or 'its numbers'} under recipe:"


def require_values(path, values):
    """Raises SpatialTokensError at a value of another type than its field's, or a number out of range."""
    hints = get_type_hints(TrainingArguments) | get_type_hints(Run)
    hints["fsdp"] = bool | str | list | None  # which transformers takes, whatever its hint says
    for name, value in values.items():
        words, allows = RANGES.get(name, NOT_NEGATIVE)
        if not fits(value, hints[name]) or (type(value) in (int, float) and not allows(value)):
            expected = described(hints[name])
            limits = words if "integer" in expected or "number" in expected else ""
            raise SpatialTokensError(f"{path}: {name} must be {expected}{limits}, got {shown(value)}")


def fits(value, hint):
    """Whether a value of YAML is of a type; what YAML cannot write is left to transformers."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is float:
        return type(value) in (int, float) and abs(value) < 2**63 and isfinite(value)
    if origin is int:
        return type(value) is int and abs(value) < 2**63
    if isinstance(origin, type) and issubclass(origin, Enum):
        return isinstance(value, str)
    return type(value) is origin if origin in (bool, str, list, dict, type(None)) else True


def described(hint):
    """A type in words."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [WORDS.get(get_origin(each) or each) for each in kinds]
    return " or ".join(dict.fromkeys(word for word in words if word)) or str(hint)


class Loader(yaml.SafeLoader):
    """YAML that reads 2e-5 as the number that it is, and refuses a key that is there twice."""

    def construct_mapping(self, node, deep=False):
        """A mapping of YAML."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parsed(text, where):
    """The value of a YAML text."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise SpatialTokensError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def num_processes():
    """As torchrun and accelerate tell it."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise SpatialTokensError(f"WORLD_SIZE must be a positive integer, as torchrun and accelerate set it, got {told!r}")
    return int(told)


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
    known = [*(each.name for each in fields(SPProjectorConfig)), "mode", "unit", "resize", "token"]
    if wrong := [name for name in run.projector if name not in known]:
        raise SpatialTokensError(f"projector: unknown field {wrong[0]!r}; the fields are {', '.join(known)}")
    if run.vision is not None:
        model, processor = llava_from_parts(run.model, run.vision)
    else:
        model, processor = tiny_llava() if run.model == "tiny" else from_hub(run.model)
    if run.start_from is not None:
        return load_adapter(model, Path(run.start_from) / "spatial_tokens", processor)
    return attach(model, processor, run.preset, **run.projector)


def report(trainer, checkpoint, finished, results):
    """Says what came of it."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if finished:
        print(f"finished already: {checkpoint} is of the last step, so nothing was trained")
    elif checkpoint is not None:
        print(f"resumed from {checkpoint}")
    told = f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "no loss logged"
    folder = trainer.args.output_dir
    print(f"{trainer.state.global_step} steps, {told}; wrote {folder}")
    print(f"next: load_adapter(model, '{folder}/spatial_tokens', processor), or the next stage with start_from: {folder}")
    if results:
        print(f"evaluation loss {results['eval_loss']:.4f}")
    for data in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        if bad := data.bad_samples:
            print(
                f"{len(bad)} bad samples of {data.path} were left out; {data.bad_samples_file} says which and why", file=sys.stderr
            )


def tiny_run():
    """The arguments of a run without any: a tiny model, on pictures that are drawn for it."""
    import tiny_data

    config = Path(__file__).parent / "configs" / "tiny" / "alignment.yaml"
    print(f"no config was given: training a tiny model with {config}; see --help")
    if not Path("tiny-data").exists():
        tiny_data.main("tiny-data")
    return [str(config)]


def leave():
    """Ends a process of several: DDP keeps threads of the destroyed group, which abort now and then when Python is taken down."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"usage: train.py [CONFIG.yaml] [--name value ...]\n\n{__doc__}\n{getdoc(Run)}")
        sys.exit()
    try:
        if sys.argv[1:2] and sys.argv[1].startswith("-"):
            raise SpatialTokensError("give a config before them: python examples/train.py CONFIG.yaml [--name value ...]")
        main(sys.argv[1:] or tiny_run())
    except (SpatialTokensError, ImportError) as error:
        sys.exit(f"train.py: error: {reason(error)}")
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if num_processes() > 1:
        leave()
