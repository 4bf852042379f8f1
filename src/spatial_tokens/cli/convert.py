"""`spatial-tokens convert`: released checkpoints to this library's format or a Hugging Face model, or back."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from spatial_tokens.checkpoint import convert_released, from_llava_sp, to_llava_sp
from spatial_tokens.checkpoint.llava_sp import PREFIXES
from spatial_tokens.checks import as_path, check_choice
from spatial_tokens.cli.configs import read_config
from spatial_tokens.cli.output import print_json, require_paths
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.files import write_tensors
from spatial_tokens.storage.pretrained import CONFIG_NAME, WEIGHTS_NAME
from spatial_tokens.storage.staging import is_staging
from spatial_tokens.storage.text import read_text

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")


def run(arguments: Namespace) -> None:
    """`spatial-tokens convert`: the direction follows from what IN is."""
    source, target = as_path(arguments.input, "IN"), as_path(arguments.output, "OUT")
    check_choice("--prefix", arguments.prefix, PREFIXES)
    if os.path.exists(target) and not arguments.overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise SpatialTokensError(f"{target} is already there; choose another OUT or give --overwrite")
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise SpatialTokensError(f"IN and OUT are both {target}; choose another OUT")
    config = None if arguments.config is None else read_config(arguments.config)
    require_paths(arguments, "base", "vision")
    if arguments.base is not None:
        _convert_whole(arguments, config)
        return
    if arguments.vision is not None:
        raise SpatialTokensError("--vision needs --base, which makes a whole model of a released folder")
    if is_own_format(source):
        if target.suffix not in WEIGHT_SUFFIXES:
            raise SpatialTokensError(
                f"{source} becomes one file of the released names; OUT must end in {' or '.join(WEIGHT_SUFFIXES)}"
            )
        projector = SPProjector.from_pretrained(source)
        write_tensors(target, to_llava_sp(projector, prefix=arguments.prefix), {"library": "spatial-tokens"})
    else:
        if target.suffix in WEIGHT_SUFFIXES:
            raise SpatialTokensError(
                f"{source} becomes a directory of {CONFIG_NAME} and {WEIGHTS_NAME}; OUT must not be a file's name"
            )
        require_own_files(target)
        projector = from_llava_sp(source, config=config)
        projector.save_pretrained(target)
    _print_converted(arguments, projector.config)


def _convert_whole(arguments: Namespace, config: SPProjectorConfig | None) -> None:
    out = arguments.output
    converted = convert_released(arguments.input, arguments.base, out, vision=arguments.vision, config=config)
    _print_converted(arguments, converted)
    if arguments.json:
        return
    print("load it, with LlavaForConditionalGeneration and AutoProcessor of transformers, load_adapter of this library:")
    print(f'  model = LlavaForConditionalGeneration.from_pretrained("{out}", dtype="auto")')
    print(f'  processor = AutoProcessor.from_pretrained("{out}")')
    print(f'  model, processor = load_adapter(model, "{out}/spatial_tokens", processor)')
    print(f"train on: python examples/train.py CONFIG.yaml --model {out} --start_from {out}; see docs/training.md")


def _print_converted(arguments: Namespace, config: SPProjectorConfig) -> None:
    source, target = Path(arguments.input), Path(arguments.output)
    if arguments.json:
        print_json({"input": str(source), "output": str(target), "config": config.to_dict()})
        return
    described = ", ".join(f"{name}={value}" for name, value in config.to_dict().items())
    print(f"wrote {target}: {described}")


def require_own_files(target: Path, *names: str) -> None:
    """Raises SpatialTokensError if a directory holds files that a command does not write, or the config of something else."""
    if not target.is_dir():
        return
    others = sorted(
        path.name for path in target.iterdir() if path.name not in (CONFIG_NAME, WEIGHTS_NAME, *names) and not is_staging(path.name)
    )
    if (target / CONFIG_NAME).exists() and not _is_own_config(target / CONFIG_NAME):
        others.append(CONFIG_NAME)
    if others:
        raise SpatialTokensError(
            f"{target} is not overwritten: it holds files that the command does not write, {', '.join(others[:20])}; "
            "move them away, or choose another OUT"
        )


def is_own_format(path: Path) -> bool:
    """Whether it is a directory that `save_pretrained` wrote."""
    return os.path.isfile(path / WEIGHTS_NAME) and _is_own_config(path / CONFIG_NAME)


def _is_own_config(path: Path) -> bool:
    return os.path.isfile(path) and "spatial_hidden_size" in read_text(path)
