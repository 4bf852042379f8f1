"""Adapters on disk, as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, beside no base model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path, PureWindowsPath
from typing import Any, get_args

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.api import Model, attach, attachment_of, detach, unwrapped
from spatial_tokens.adapters.huggingface.hooks import NAME, Mode, Unit
from spatial_tokens.adapters.huggingface.maps_to_tokens import Resize
from spatial_tokens.adapters.huggingface.processing import TOKEN
from spatial_tokens.checks import as_path
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError, reason, shown
from spatial_tokens.modules import SPProjector
from spatial_tokens.modules.parts import PARTS
from spatial_tokens.storage import hub
from spatial_tokens.storage.folder_format import FolderFormat
from spatial_tokens.storage.int8 import dequantized, quantized_parameter
from spatial_tokens.storage.model_card import PAPER, render_model_card
from spatial_tokens.storage.pretrained import assign, require_exactly
from spatial_tokens.storage.sharded import gathered, is_sharded, shape_of, tensors_of, whole_copy, write
from spatial_tokens.versions import ENTRY, WRITER, naming_newer_files

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT = FolderFormat(CONFIG_NAME, WEIGHTS_NAME, "adapter_config")
KIND = "SPATIAL_TOKENS: load with spatial_tokens.adapters.huggingface.load_adapter"  # PEFT's KeyError shows it
KINDS = (KIND, "SPATIAL_TOKENS")  # the latter in files of 0.1
ROW = "reserved_token."  # of files that 0.1 wrote: a row of the embeddings, which needs none any more
BASE_NAME = "base_model_name_or_path"
MODULE = "module."  # and the name of a parameter of a module of the base that was trained too
_LOADING = """
from transformers import AutoModelForImageTextToText, AutoProcessor
from spatial_tokens.adapters.huggingface import load_adapter

base = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
processor = AutoProcessor.from_pretrained("{base}")
model, processor = load_adapter(base, "{repo_id}", processor)
"""


def save_adapter(model: Any, directory: str | PathLike[str]) -> None:
    """Writes the spatial tokens' config and weights; whenever the process is killed, the complete old or new adapter is there.

    Of the base model only what was trained with them goes in (`training.prepare`: the MLP of the patches), as in PEFT's
    `modules_to_save`.

    Of a model that is sharded over processes (FSDP2, ZeRO-3, tensor parallelism) every one must call this; the first writes.

    Raises:
        SpatialTokensError: If the model has none, they are wrapped, or the files cannot be written.
    """
    inner, attachment = unwrapped(model), attachment_of(model)
    tensors = gathered(trained_tensors(model))
    if not tensors:
        return
    values = {
        "peft_type": KIND,
        ENTRY: WRITER,
        BASE_NAME: getattr(inner.config, "_name_or_path", None) or None,
        "base_model_type": inner.config.model_type,
        "mode": attachment.mode,
        "unit": attachment.unit,
        "resize": attachment.resize,
        "token": attachment.token.text,
        "token_id": attachment.token_id,
        "modules_to_save": attachment.modules_to_save,
        "projector": getattr(inner, NAME).to_dict(),
    }
    text = json.dumps(values, indent=2) + "\n"
    if (as_path(directory) / "config.json").is_file():
        raise SpatialTokensError(
            f"{directory} has a config.json: transformers would take an adapter beside it for PEFT's; give a folder of its own"
        )
    FORMAT.save(directory, text, tensors)


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter holds, by its names in the file: the model's own tensors, to be read or written in place."""
    inner = unwrapped(model)
    tensors = dict(getattr(inner, NAME).exact_state_dict())
    for path in attachment_of(inner).modules_to_save:
        tensors |= {f"{MODULE}{path}.{name}": each for name, each in tensors_of(inner.get_submodule(path)).items()}
    return tensors


def is_sharded_model(model: Any) -> bool:
    """Whether processes hold parts of a model: then all of them must save, and the first writes."""
    return any(map(is_sharded, model.parameters()))


def load_adapter(
    model: Model,
    directory: str | PathLike[str],
    processor: Any = None,
    *,
    revision: str | None = None,
    parts: Sequence[type[nn.Module]] = (),
) -> tuple[Model, Any]:
    """Attaches what `save_adapter` or `push_to_hub` wrote to a base model.

    Warns if the model has another name than the one the adapter was saved with.

    Args:
        model: The base model, without spatial tokens.
        directory: That of the two files, or "user/name" on the Hugging Face Hub.
        processor: Its processor; the one returned inserts the placeholders.
        revision: A branch, tag or commit of the repository.
        parts: The classes of the projector's parts that are not this library's.

    Returns:
        The model and a copy of the processor, as `attach` gives them.

    Raises:
        SpatialTokensError: If a file is missing or damaged, or does not fit the model, or the download fails; the model
            is then as it was.
    """
    folder = hub.folder_of(directory, (CONFIG_NAME, WEIGHTS_NAME), revision)
    values, tensors = FORMAT.load(folder, partial(_checked, folder=folder))
    inner = unwrapped(model)
    if inner.config.model_type != values["base_model_type"]:
        raise SpatialTokensError(
            f"{folder} is an adapter of a {values['base_model_type']} model, not of a {inner.config.model_type}"
        )
    warn_of_another_base(folder, values, inner.config)
    tensors = {name: each for name, each in tensors.items() if not name.startswith(ROW)}
    modules = {name.removeprefix(MODULE): tensors.pop(name) for name in list(tensors) if name.startswith(MODULE)}
    paths: list[str] = values.get("modules_to_save", [])
    projector = SPProjector.from_dict(values["projector"], parts, device=None if PARTS in values["projector"] else "meta")
    assign(projector, tensors, str(folder / WEIGHTS_NAME))
    token_id = values["token_id"] if values["mode"] == "own" and processor is None else None
    model, processor = attach(
        model, processor, projector, mode=values["mode"], unit=values["unit"], resize=values["resize"],
        token=values["token"] or TOKEN, token_id=token_id,
    )  # fmt: skip
    try:
        _load_modules(inner, paths, modules, str(folder / WEIGHTS_NAME))
    except SpatialTokensError:
        detach(model)
        raise
    return model, processor


def read_config(directory: str | PathLike[str]) -> dict[str, Any]:
    """The values of an adapter's `adapter_config.json`, each of its kind; those of the weights, if that is of another save.

    Raises:
        SpatialTokensError: If a file is missing or damaged.
    """
    folder = as_path(directory)
    return FORMAT.load(folder, partial(_checked, folder=folder), lambda name: False)[0]


def warn_of_another_base(folder: Path, values: dict[str, Any], config: Any) -> None:
    """Warns if an adapter was saved with a base of another name than the model that has this config.

    Only the last part of a name or path is compared, and nothing where a name is not known or the adapter is in the base's own
    folder. It is no error: a copy of the base may have been renamed.
    """
    saved, given = values.get(BASE_NAME), getattr(config, "_name_or_path", None)
    if not isinstance(saved, str) or not saved or not given or _model_name(saved) == _model_name(given):
        return
    if os.path.realpath(given) != os.path.realpath(folder.parent):
        warnings.warn(
            f"{folder} was saved with the base model {saved!r}, and this one is {given!r}; unless that is the same model under "
            "another name, load the base that the adapter was trained for",
            stacklevel=3,
        )


def _model_name(name: str) -> str:
    """What "user/name", a folder of any system and a folder of Hugging Face's cache have in common."""
    path = PureWindowsPath(name)  # which takes / too
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else path.name).lower()


def _load_modules(inner: Any, paths: list[str], values: dict[str, torch.Tensor], source: str) -> None:
    """Gives modules of the base the weights that were saved; detaching gives them back their own.

    Raises:
        SpatialTokensError: If the base's modules are others, quantized or offloaded; nothing has been written then.
    """
    try:
        quantized = {path: quantized_parameter(inner.get_submodule(path)) for path in paths}
        own = {f"{path}.{name}": each for path in paths for name, each in tensors_of(inner.get_submodule(path)).items()}
    except AttributeError as error:
        raise SpatialTokensError(f"{source} has weights of modules that the model does not have: {reason(error)}") from error
    for path, name in quantized.items():
        if name is not None:
            raise SpatialTokensError(
                f"{source} has weights for {path}.{name}, which is quantized; load the base without quantizing {path}"
            )
    require_exactly({name: shape_of(each) for name, each in own.items()}, values, source)
    offloaded = next((name for name, each in own.items() if each.is_meta), None)
    if offloaded is not None:
        raise SpatialTokensError(f"{source} has weights for {offloaded}, which is offloaded; give device_map a device for it")
    attachment = attachment_of(inner)
    for path in paths:
        module = inner.get_submodule(path)
        attachment.undo.append(partial(_write_all, module, {name: whole_copy(each) for name, each in tensors_of(module).items()}))
        _write_all(module, {name: dequantized(values[f"{path}.{name}"]) for name in tensors_of(module)})
    attachment.modules_to_save += paths


def _write_all(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, each in tensors_of(module).items():
        write(each, values[name])


def push_to_hub(model: Any, repo_id: str, *, datasets: Sequence[str] = (), **options: Any) -> str:
    """Uploads what `save_adapter` writes, with a model card, to the Hugging Face Hub; see `storage.hub.push`.

    Args:
        model: The model.
        repo_id: The repository, "user/name", which is made if it is not there.
        datasets: What it was trained on, by names on the Hub, for the card.
        **options: `private`, `token`, `revision`, `commit_message`.

    Returns:
        The repository's address; "" in a process of a sharded model that does not write.

    Raises:
        SpatialTokensError: If the adapter cannot be written or sent.
    """
    return hub.push(partial(save_adapter, model), repo_id, partial(_card, model, repo_id, datasets), **options)


def _card(model: Any, repo_id: str, datasets: Sequence[str]) -> str:
    inner, attachment = unwrapped(model), attachment_of(model)
    name = getattr(inner.config, "_name_or_path", None)
    base = name if hub.is_repository(name) else None
    facts = {"base model": f"[{base}](https://huggingface.co/{base})" if base else f"a `{inner.config.model_type}` model"}
    if attachment.modules_to_save:
        facts["parts of the base that were trained too"] = ", ".join(f"`{path}`" for path in attachment.modules_to_save)
    return render_model_card(
        repo_id,
        getattr(inner, NAME).config,
        summary=f"Visual spatial tokens, in the design of [LLaVA-SP]({PAPER}), for {facts['base model']}.",
        code=_LOADING.format(repo_id=repo_id, base=base or "PATH OR NAME OF THE BASE MODEL"),
        facts=facts,
        datasets=datasets,
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag="image-text-to-text",
    )


def _checked(text: str, folder: Path) -> dict[str, Any]:
    """The values of an `adapter_config.json`, each of its kind."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpatialTokensError(f"{folder / CONFIG_NAME} is not valid JSON: {reason(error)}") from error
    with naming_newer_files(values):
        return _with_every_value(values, folder)


def _with_every_value(values: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(values, dict) or values.get("peft_type") not in KINDS:
        raise SpatialTokensError(f"{folder / CONFIG_NAME} is not of spatial tokens: its peft_type is not {KINDS[-1]!r}")
    allowed: dict[str, tuple[Any, ...]] = {"mode": get_args(Mode), "unit": get_args(Unit), "resize": (None, *get_args(Resize))}
    for name, choices in allowed.items():
        if values.get(name, ...) not in choices:
            raise SpatialTokensError(f"{name} in {folder / CONFIG_NAME} must be one of {choices}, got {shown(values.get(name))}")
    paths = values.get("modules_to_save", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SpatialTokensError(f"modules_to_save in {folder / CONFIG_NAME} must be a list of names, got {shown(paths)}")
    for name, kind in {"token": str, "token_id": int, "projector": dict, "base_model_type": str}.items():
        if not isinstance(values.get(name), kind):
            raise SpatialTokensError(f"{name} in {folder / CONFIG_NAME} must be a {kind.__name__}, got {shown(values.get(name))}")
    if PARTS not in values["projector"]:
        SPProjectorConfig.from_dict(values["projector"])
    return values
