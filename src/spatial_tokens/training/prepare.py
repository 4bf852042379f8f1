"""A Hugging Face model with spatial tokens, made ready for a stage; and what it has learned, on disk."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.api import attachment_of, unwrapped
from spatial_tokens.adapters.huggingface.saving import FORMAT, WEIGHTS_NAME, save_adapter, trained_tensors
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.storage.files import as_path, read_tensors, read_text
from spatial_tokens.storage.pretrained import gathered, require_exactly
from spatial_tokens.training.recipe import LoRA, Parts, Stage, freeze

SPATIAL, LORA = "spatial_tokens", "lora"  # the folders of what was trained


def prepare(model: Any, stage: Stage) -> Any:
    """Makes a model that `attach` gave spatial tokens ready for a stage.

    What trains is the projector (the spatial tokens and the model's own MLP of the patches, as in the paper) and, where the stage
    has a LoRA, adapters of all linear layers of the language model. It is kept in float32, as an optimizer's steps are too small
    for bfloat16; all else is frozen and stays in its dtype.

    Returns:
        The model; a PEFT model of it where the stage has a LoRA.

    Raises:
        SpatialTokensError: If the model has no spatial tokens.
    """
    attachment = attachment_of(model)
    inner = unwrapped(model)
    path = next(name for name, module in inner.named_modules() if module is attachment.parts.projector)
    if path not in attachment.modules_to_save:
        attachment.modules_to_save.append(path)
    if stage.lora is not None and not _is_peft(model):
        model = _with_lora(model, stage.lora)
    parts = parts_of(model)
    freeze(model, parts)
    for part in (*parts.projector, *parts.lora):
        part.float()
    return model


def parts_of(model: Any) -> Parts:
    """The modules that train in a model that `prepare` made ready, as they declare themselves."""
    inner, attachment = unwrapped(model), attachment_of(model)
    projector = [attachment.projector, *(inner.get_submodule(path) for path in attachment.modules_to_save)]
    if not _is_peft(model):
        return Parts(projector)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in attachment.parts.language_model.modules() if isinstance(module, BaseTunerLayer)]
    return Parts(
        projector, [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    )


def save_trained(model: Any, directory: str | PathLike[str]) -> None:
    """Writes what trained and nothing else: `spatial_tokens/` (see `save_adapter`) and, of a PEFT model, `lora/` as PEFT reads it.

    Of a sharded model (FSDP2) every process must call this; the first writes.

    Raises:
        SpatialTokensError: If the files cannot be written.
    """
    folder = as_path(directory)
    save_adapter(model, folder / SPATIAL)
    if _is_peft(model) and (tensors := gathered(_lora_tensors(model))):
        with TemporaryDirectory() as temporary:
            model.peft_config[model.active_adapter].save_pretrained(temporary)
            config = read_text(Path(temporary) / FORMAT.config_name)
        FORMAT.save(folder / LORA, config, tensors)


def load_trained(model: Any, directory: str | PathLike[str], *, lora: bool = True) -> None:
    """Gives a model of the same stage, sharded or not, the weights that `save_trained` wrote.

    Args:
        model: The model.
        directory: Where they are.
        lora: Whether a PEFT model's adapters are to be loaded too.

    Raises:
        SpatialTokensError: If a file is missing or damaged, or holds other tensors than the model.
    """
    folder = as_path(directory)
    parts = {SPATIAL: trained_tensors(model)} | ({LORA: _lora_tensors(model)} if lora and _is_peft(model) else {})
    for name, tensors in parts.items():
        path = folder / name / WEIGHTS_NAME
        saved = {key: each for key, each in read_tensors(path).items() if key in tensors or not key.startswith("reserved_token.")}
        require_exactly({key: tuple(each.shape) for key, each in tensors.items()}, saved, str(path))
        with torch.no_grad():
            for key, tensor in tensors.items():
                _copy(tensor, saved[key])


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def _with_lora(model: Any, lora: LoRA) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    language_model = attachment_of(model).parts.language_model
    linear = {id(module) for module in language_model.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in linear]
    if not names:
        raise SpatialTokensError(f"found no linear layer for the LoRA in {type(language_model).__name__}")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _lora_tensors(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _is_peft(model: Any) -> bool:
    return hasattr(model, "get_base_model")
