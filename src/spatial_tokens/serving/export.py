"""A base and its adapter as vLLM takes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from spatial_tokens.adapters.huggingface.hooks import NAME
from spatial_tokens.adapters.huggingface.saving import FORMAT, read_config, warn_of_another_base
from spatial_tokens.checks import as_path
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason
from spatial_tokens.serving.adapter import read_adapter, require_weights
from spatial_tokens.serving.vllm import ARCHITECTURE, MOE_ARCHITECTURE
from spatial_tokens.storage.directories import new_directory
from spatial_tokens.storage.files import make_directory, write_text
from spatial_tokens.storage.staging import is_staging
from spatial_tokens.storage.text import read_text

CONFIG_NAME = "config.json"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of transformers' own
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")  # as vLLM finds them


def hf_overrides(base: str | PathLike[str], adapter: str | PathLike[str]) -> dict[str, Any]:
    """What vLLM is told, to serve a base with an adapter where they lie: `LLM(base, hf_overrides=hf_overrides(base, adapter))`.

    The architecture is ours alone. vLLM takes the next of several where it does not know the first: without the plugin it would
    serve the base without spatial tokens.

    Warns if the base has another name than the one the adapter was saved with.

    Args:
        base: The base model's folder.
        adapter: What `save_adapter` wrote.

    Raises:
        SpatialTokensError: If the adapter is damaged, or does not fit the base; or vLLM computes the base otherwise than
            transformers.
    """
    config, folder = _config(as_path(base, "base")), Path(os.path.abspath(as_path(adapter, "adapter")))
    require_weights(read_adapter(folder, config))
    warn_of_another_base(folder, read_config(folder), config)
    text = config.get_text_config()
    experts = any(getattr(text, name, None) for name in EXPERTS)
    return {"architectures": [MOE_ARCHITECTURE if experts else ARCHITECTURE], NAME: str(folder)}


def serve_export(
    base: str | PathLike[str], adapter: str | PathLike[str], out: str | PathLike[str], *, link: bool = False
) -> dict[str, Any]:
    """Writes one folder that `vllm serve OUT` takes as it is: the base's files, and the adapter below `spatial_tokens`.

    Where this library is not installed, vLLM refuses it. transformers loads the base from it, and `load_adapter` its
    `OUT/spatial_tokens`.

    All of it or nothing: `out` appears when it is complete. An earlier export that is there is replaced.

    Args:
        base: The base model's folder.
        adapter: What `save_adapter` wrote.
        out: The folder to write.
        link: Links to the base's files instead of copies.

    Returns:
        What its `config.json` has in place of the base's.

    Raises:
        SpatialTokensError: As `hf_overrides`; and if `out` is the base or the adapter, holds something else, or cannot be written.
    """
    source, folder, target = as_path(base, "base"), as_path(adapter, "adapter"), Path(os.path.realpath(as_path(out, "out")))
    if os.path.realpath(source) == str(target) or os.path.realpath(folder) == str(target):
        raise SpatialTokensError(f"{out} is what is to be exported; choose another folder")
    changed = {**hf_overrides(source, folder), NAME: NAME}
    values = json.loads(read_text(source / CONFIG_NAME)) | changed
    with new_directory(target, _require_export) as made:
        for each in sorted(source.iterdir()):
            if each.is_file() and each.name != CONFIG_NAME and not is_staging(each.name):
                _place(each, made / each.name, link=link)
        if (source / CHAT_TEMPLATES).is_dir():
            make_directory(made / CHAT_TEMPLATES)
            for each in (source / CHAT_TEMPLATES).iterdir():
                _place(each, made / CHAT_TEMPLATES / each.name, link=link)
        make_directory(made / NAME)
        for name in (FORMAT.config_name, FORMAT.weights_name):
            _place(folder / name, made / NAME / name, link=False)
        write_text(made / CONFIG_NAME, json.dumps(values, indent=2) + "\n")
    return changed


def _place(source: Path, target: Path, *, link: bool) -> None:
    try:
        if link:
            target.symlink_to(os.path.realpath(source))
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise SpatialTokensError(f"cannot write {target.name}: {reason(error)}") from error


def _config(base: Path) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    if not os.path.isfile(base / CONFIG_NAME):
        raise SpatialTokensError(f"{base} has no {CONFIG_NAME}; give a model's local folder")
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise SpatialTokensError(f"cannot read {base / CONFIG_NAME}: {reason(error)}") from error
    if hasattr(config, NAME):
        raise SpatialTokensError(f"{base} is an export already; give the base model's folder")
    return config


def _require_export(target: Path) -> None:
    """Raises SpatialTokensError unless a folder is empty, or an earlier export."""
    if not target.is_dir():
        raise SpatialTokensError(f"{target} is there already and is not a folder; choose another one")
    there = [each for each in target.iterdir() if not is_staging(each.name)]
    if there and not _is_export(target):
        raise SpatialTokensError(f"{target} is not replaced: it is not an export; choose another folder")


def _is_export(folder: Path) -> bool:
    try:
        values = json.loads(read_text(folder / CONFIG_NAME))
    except (SpatialTokensError, ValueError):
        return False
    return isinstance(values, Mapping) and values.get(NAME) == NAME and (folder / NAME).is_dir()
