"""A folder of the authors' code becomes a Hugging Face LLaVA with spatial tokens.

What LLaVA's LoRA training writes: `config.json`; `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), the LoRA of the
language model; `non_lora_trainables.bin`, the projector. The language model and the vision tower are elsewhere. A folder without a
LoRA is of stage 1 (`mm_projector.bin`), or holds a whole model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.api import attach
from spatial_tokens.adapters.huggingface.hooks import NAME
from spatial_tokens.adapters.huggingface.quiet import quiet_transformers
from spatial_tokens.adapters.huggingface.saving import FORMAT, save_adapter
from spatial_tokens.checkpoint.build_llava import (
    assembled,
    errors_prefixed,
    found_base,
    found_vision,
    language_model,
    text_config,
    vision_config,
    vision_tower,
)
from spatial_tokens.checkpoint.llava_sp import from_llava_sp
from spatial_tokens.checks import as_path
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError, reason, shown
from spatial_tokens.grid import is_positive_int
from spatial_tokens.modules import MLPHead, SPProjector
from spatial_tokens.storage.directories import new_directory
from spatial_tokens.storage.files import read_tensors
from spatial_tokens.storage.pretrained import require_exactly
from spatial_tokens.storage.staging import is_staging
from spatial_tokens.storage.text import read_text

CONFIG_NAME = "config.json"
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = "non_lora_trainables.bin"

# What a LlavaForConditionalGeneration computes, of the settings in a released config.json.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": ("patch", None),
    "mm_patch_merge_type": ("flat", None),
    "mm_use_im_start_end": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
}
# A LoRA that is W + alpha / r * B A: these settings as they are here, these others anything, and all the rest unset.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", None),
}
FREE_IN_LORA = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type",
}  # fmt: skip

_LANGUAGE = re.compile(r"(base_model\.model\.)?(model\.)?(layers|embed_tokens|norm|lm_head)\.")
_TOWER = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower\.)+(vision_model\.)?")
_WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_|processor_|preprocessor_)?config\.json|"
    r"tokenizer\.(json|model)|(special_tokens_map|added_tokens|vocab|chat_template)\.json|merges\.txt|chat_template\.jinja"
)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def from_released(
    folder: str | PathLike[str],
    base: str | PathLike[str],
    *,
    vision: str | PathLike[str] | None = None,
    config: SPProjectorConfig | None = None,
) -> tuple[Any, Any]:
    """A Hugging Face LLaVA with the spatial tokens of a released folder: ready to generate or to train further.

    A LoRA is merged, in float32, into the base's weights, which keep their dtype; the other parts take it. The released MLP of
    the patches becomes the model's own `multi_modal_projector`. Weight files are read without running code in them.

    Args:
        folder: What the authors' code wrote: a LoRA and its projector, a projector, or a whole model.
        base: The language model that it was trained on and its tokenizer, such as Vicuna: a folder, or a name on the hub. For a
            whole model, `folder` again.
        vision: The vision tower, a CLIP, and its image processor; what the folder's config names when left out.
        config: What the projector must be; inferred when left out, see `from_llava_sp`.

    Returns:
        A `LlavaForConditionalGeneration` with spatial tokens, in evaluation mode, and a `LlavaProcessor` that inserts placeholders.

    Raises:
        SpatialTokensError: If a file is missing, damaged or would need code to be run, the folder is none that a Hugging Face
            LLaVA can be made of, or its parts do not fit each other.

    Examples:
        ```python
        model, processor = from_released("llava-sp-cropping-lora", "lmsys/vicuna-7b-v1.5")
        text = "USER: <image> What is to the left of the dog? ASSISTANT:"
        model.generate(**processor(images=image, text=text, return_tensors="pt"))
        ```
    """
    with quiet_transformers() as transformers:
        return _with_tokens(*_assembled(transformers, as_path(folder), base, vision, config))


def convert_released(
    folder: str | PathLike[str],
    base: str | PathLike[str],
    out: str | PathLike[str],
    *,
    vision: str | PathLike[str] | None = None,
    config: SPProjectorConfig | None = None,
) -> SPProjectorConfig:
    """Writes what `from_released` makes: into `out` a LLaVA that loads alone, into `out/spatial_tokens` its adapter.

    All of it or nothing: `out` appears when it is complete. An earlier conversion that is there is replaced, unless there are other
    files in it.

    Returns:
        The config of the spatial tokens.

    Raises:
        SpatialTokensError: As `from_released`; and if `out` cannot be written, or holds something else.
    """
    with new_directory(os.path.realpath(as_path(out)), _require_replaceable) as directory, quiet_transformers() as transformers:
        model, processor, projector = _assembled(transformers, as_path(folder), base, vision, config)
        with errors_prefixed(f"cannot write {out}"):
            processor.save_pretrained(directory)
            model, _ = _with_tokens(model, processor, projector)
            model.save_pretrained(directory)
            model.config._name_or_path = os.path.basename(os.path.realpath(out))  # its own base
            save_adapter(model, directory / NAME)
    return projector.config


def _assembled(
    transformers: Any, folder: Path, base: str | PathLike[str], vision: str | PathLike[str] | None, config: SPProjectorConfig | None
) -> tuple[Any, Any, SPProjector]:
    """The LLaVA and its processor, and the projector without its patch head, which is in the model."""
    base, settings = found_base(as_path(base)), _settings(folder)
    vision = found_vision(settings["mm_vision_tower"] if vision is None else vision)
    lora = _lora(folder)
    source = folder if lora is None else folder / TRAINED
    whole = lora is None and os.path.realpath(base) == os.path.realpath(folder)
    names = _names(source)
    if not whole and (strays := [name for name in names if _LANGUAGE.match(name)]):
        raise SpatialTokensError(
            f"{source} holds {len(strays)} tensors of the language model itself, such as {strays[0]}; "
            + ("only a LoRA can be merged into a base" if lora else f"it is a whole model, so give {folder} as its base too")
        )
    clip_config = vision_config(transformers, vision)
    grid_size = clip_config.image_size // clip_config.patch_size
    projector = from_llava_sp(source, config=config, grid_size=grid_size, dtype=torch.float32)
    mlp = projector.patch_head
    if not isinstance(mlp, MLPHead):
        raise SpatialTokensError("the config's patch_head must be 'mlp', got None: a released folder's MLP becomes the LLaVA's own")
    llama_config = _own_text_config(transformers, settings) if whole else text_config(transformers, base)
    _require_fit(projector.config, llama_config, clip_config, settings, {"base": base, "vision": vision, "folder": folder})

    llama = language_model(transformers, base, llama_config, lambda name: not whole or bool(_LANGUAGE.match(name)))
    if lora is not None:
        _merge(llama, *lora)
    tower = vision_tower(transformers, vision, llama.dtype)
    if any(_TOWER.match(name) for name in names):
        _load_tower(tower, source)
    projector = projector.to(dtype=llama.dtype)
    projector.patch_head = None
    layer, pad = settings["mm_vision_select_layer"], settings.get("image_aspect_ratio") == "pad"
    model, processor = assembled(transformers, llama, tower, mlp, base=base, vision=vision, layer=layer, pad=pad)
    return model, processor, projector


def _with_tokens(model: Any, processor: Any, projector: SPProjector) -> tuple[Any, Any]:
    model, processor = attach(model, processor, projector)
    return model.eval(), processor


def _settings(folder: Path) -> dict[str, Any]:
    """The released `config.json`, checked for what a Hugging Face LLaVA cannot do."""
    path = folder / CONFIG_NAME
    settings = _json(path)
    if not isinstance(settings.get("mm_vision_tower"), str):
        raise SpatialTokensError(f"{path} is not of a LLaVA of the authors' code: it names no mm_vision_tower")
    _require_values(settings, SETTINGS, path)
    layer = settings.get("mm_vision_select_layer")
    if type(layer) is not int:
        raise SpatialTokensError(f"mm_vision_select_layer in {path} must be one layer's number, got {shown(layer)}")
    return settings


def _lora(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The LoRA's settings, checked to be those of a plain one, and its weights; None in a folder without."""
    weights = [folder / name for name in LORA_WEIGHTS if (folder / name).is_file()]
    there = {name: (folder / name).is_file() for name in (LORA_CONFIG, TRAINED)} | {" or ".join(LORA_WEIGHTS): bool(weights)}
    if not any(there.values()):
        return None
    if missing := [name for name, found in there.items() if not found]:
        raise SpatialTokensError(f"{folder} is incomplete: missing {', '.join(missing)}")
    path = folder / LORA_CONFIG
    values = _json(path)
    _require_values(values, PLAIN_LORA, path)
    known = FREE_IN_LORA | PLAIN_LORA.keys()
    if others := [f"{name}={shown(value)}" for name, value in values.items() if value and name not in known]:
        raise SpatialTokensError(
            f"{path} is not of a plain LoRA, W + alpha / r * B A: it has {', '.join(others)}; merge it with the authors' code and "
            "convert the whole model"
        )
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise SpatialTokensError(f"target_modules in {path} must be a list of names, got {shown(targets)}")
    if not is_positive_int(values.get("r")) or type(values.get("lora_alpha")) not in (int, float):
        raise SpatialTokensError(
            f"r in {path} must be a positive integer and lora_alpha a number, got {shown(values.get('r'))} and "
            f"{shown(values.get('lora_alpha'))}"
        )
    return values, weights[0]


def _names(path: Path) -> list[str]:
    """The names in a weight file, or in those of a folder."""
    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    read_tensors(path, note)
    return names


def _own_text_config(transformers: Any, settings: Mapping[str, Any]) -> Any:
    """The language model's config, out of a whole model's settings."""
    known = transformers.LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "torch_dtype"}
    known -= {"architectures", "model_type", "transformers_version"}
    fields = {name: value for name, value in settings.items() if name in known and value is not None}
    with errors_prefixed("cannot make a Llama's config of the folder's settings"):
        return transformers.LlamaConfig(**fields)


def _require_fit(
    projector: SPProjectorConfig, text: Any, vision: Any, settings: Mapping[str, Any], names: Mapping[str, str | PathLike[str]]
) -> None:
    """Raises SpatialTokensError if language model, vision tower and projector are not of one model."""
    given = {name: settings[name] for name in _SIZES if settings.get(name) is not None}
    given["hidden_size"] = projector.text_hidden_size
    if wrong := [f"{name} {getattr(text, name)}, not {value}" for name, value in given.items() if getattr(text, name) != value]:
        raise SpatialTokensError(f"{names['base']} is not the language model of {names['folder']}: it has {'; '.join(wrong)}")
    side, layer = vision.image_size // vision.patch_size, settings["mm_vision_select_layer"]
    found = {"hidden_size": vision.hidden_size, "grid": (side, side)}
    expected = {"hidden_size": projector.vision_hidden_size, "grid": projector.grid_size}
    if wrong := [f"{name} {value}, not {expected[name]}" for name, value in found.items() if value != expected[name]]:
        raise SpatialTokensError(f"{names['vision']} is not the vision tower of {names['folder']}: it has {'; '.join(wrong)}")
    if not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise SpatialTokensError(f"mm_vision_select_layer is {layer}, but {names['vision']} has {vision.num_hidden_layers} layers")


def _merge(llama: Any, settings: Mapping[str, Any], path: Path) -> None:
    """Adds a LoRA to the weights that it is of: `W + alpha / r * B A`, rounded once."""
    targets = {
        name: module
        for name, module in llama.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight is not llama.get_input_embeddings().weight
        and any(f".{name}".endswith(f".{target}") for target in settings["target_modules"])
    }
    rank, prefix = settings["r"], "base_model.model."
    shapes = {}
    for name, module in targets.items():
        shapes[f"{prefix}{name}.lora_A.weight"] = (rank, module.in_features)
        shapes[f"{prefix}{name}.lora_B.weight"] = (module.out_features, rank)
    tensors = read_tensors(path)
    require_exactly(shapes, tensors, str(path))
    exact = torch.promote_types(llama.dtype, torch.float32)
    with torch.no_grad():
        for name, module in targets.items():
            a, b = (tensors[f"{prefix}{name}.lora_{part}.weight"].to(exact) for part in "AB")
            module.weight.copy_(module.weight.to(exact) + settings["lora_alpha"] / rank * (b @ a))


def _load_tower(tower: Any, source: Path) -> None:
    """Gives the tower the weights that the released files have of it."""
    own = {name.removeprefix("vision_model."): each for name, each in tower.named_parameters()}
    tensors = read_tensors(source, lambda name: bool(_TOWER.match(name)))
    found = {_TOWER.sub("", name, count=1): each for name, each in tensors.items()}
    found.pop("embeddings.position_ids", None)  # a buffer of older versions
    require_exactly({name: each.shape for name, each in own.items()}, found, f"the vision tower in {source}")
    with torch.no_grad():
        for name, each in own.items():
            each.copy_(found[name])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpatialTokensError(f"{path} is not valid JSON: {reason(error)}") from error
    if not isinstance(values, dict):
        raise SpatialTokensError(f"{path} must hold an object, got {shown(values)}")
    return values


def _require_values(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    """Raises SpatialTokensError if a field is none of its allowed values; None among them: it may be left out."""
    for name, choices in allowed.items():
        if values.get(name) not in choices:
            known = " or ".join(shown(choice) for choice in choices if choice is not None)
            raise SpatialTokensError(f"{name} in {path} must be {known}, got {shown(values.get(name))}")


def _require_replaceable(target: Path) -> None:
    """Raises SpatialTokensError unless a folder is empty, or a conversion without other files (checkpoints of a training, say)."""
    if not target.is_dir():
        raise SpatialTokensError(f"{target} is there already and is not a folder; choose another one")
    there = [path for path in target.iterdir() if not is_staging(path.name)]
    if not there:
        return
    adapter = {FORMAT.config_name, FORMAT.weights_name}
    others = [path.name for path in there if path.name != NAME and not (path.is_file() and _WRITTEN.fullmatch(path.name))]
    if (target / NAME).is_dir():
        others += [
            f"{NAME}/{each.name}" for each in (target / NAME).iterdir() if not (each.name in adapter or is_staging(each.name))
        ]
    if others:
        raise SpatialTokensError(
            f"{target} is not replaced: it holds files that a conversion does not write, {', '.join(sorted(others)[:20])}; "
            "move them away, or choose another folder"
        )
    if not all((target / name).is_file() for name in (CONFIG_NAME, f"{NAME}/{FORMAT.config_name}")):
        raise SpatialTokensError(
            f"{target} is not replaced: it is not a conversion, which has a {CONFIG_NAME} and {NAME}/; choose another folder"
        )
