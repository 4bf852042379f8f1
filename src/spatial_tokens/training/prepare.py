"""A Hugging Face model with spatial tokens, made ready for a stage; and what it has learned, on disk."""

from __future__ import annotations

import warnings
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from spatial_tokens.adapters.huggingface.api import attachment_of, unwrapped
from spatial_tokens.adapters.huggingface.saving import FORMAT, WEIGHTS_NAME, save_adapter, trained_tensors
from spatial_tokens.checks import as_path
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, shown
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.files import read_tensors
from spatial_tokens.storage.int8 import quantized_parameter
from spatial_tokens.storage.pretrained import require_exactly
from spatial_tokens.storage.sharded import gathered, is_partitioned, shape_of, tensors_of, whole, whole_copy, write
from spatial_tokens.storage.text import read_text
from spatial_tokens.training.recipe import LoRA, Parts, Stage, freeze

SPATIAL, LORA = "spatial_tokens", "lora"  # the folders of what was trained


def prepare_model(model: Any, stage: Stage) -> Any:
    """Makes a model that `attach` gave spatial tokens ready for a stage.

    What trains is the projector (the spatial tokens and the model's own MLP of the patches, as in the paper) and, where the stage
    has a LoRA, adapters of all linear layers of the language model. It is kept in float32, as an optimizer's steps are too small
    for bfloat16; all else is frozen and stays in its dtype. What trains takes the base's dtype and returns it, so the model runs
    with autocast and without. `detach` restores the MLP's own weights and dtype. Where DeepSpeed has partitioned the base already
    (ZeRO-3), all dtypes stay as they are: it takes a model of one, and keeps float32 copies of what trains itself.

    Returns:
        The model; a PEFT model of it where the stage has a LoRA.

    Raises:
        SpatialTokensError: If the model has no spatial tokens, the stage is no `Stage`, or the model's MLP is quantized or
            offloaded; the model is then as it was.
    """
    if not isinstance(stage, Stage):
        raise SpatialTokensError(f"stage must be a Stage, such as ALIGNMENT, got {shown(stage)}")
    attachment = attachment_of(model)
    inner, mlp = unwrapped(model), attachment.parts.projector
    path = next(name for name, module in inner.named_modules() if module is mlp)
    if (quantized := quantized_parameter(mlp)) is not None:
        raise SpatialTokensError(
            f"{path}.{quantized} is quantized and cannot be trained; load the model without quantizing {path}, for example with "
            f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{path!r}, 'lm_head'])"
        )
    if any(each.is_meta for each in mlp.parameters()):
        raise SpatialTokensError(f"{path} is offloaded and cannot be trained; give device_map a device for it")
    in_float32 = not any(map(is_partitioned, inner.parameters()))
    dtype = next((each.dtype for each in mlp.parameters() if in_float32 and each.dtype != torch.float32), None)
    if path not in attachment.modules_to_save or dtype is not None:
        attachment.undo.append(partial(_restore, mlp, {name: whole_copy(each) for name, each in _named_tensors(mlp)}))
    if path not in attachment.modules_to_save:
        attachment.modules_to_save.append(path)
    if dtype is not None:
        before = mlp.register_forward_pre_hook(_to_weights, with_kwargs=True)
        after = mlp.register_forward_hook(partial(_to_dtype, dtype))
        attachment.undo += [before.remove, after.remove]
    if stage.lora is not None and not _is_peft(model):
        model = _with_lora(model, stage.lora)
    parts = parts_of(model)
    freeze(model, parts)
    for part in (*parts.projector, *parts.lora) if in_float32 else ():
        part.float()
    return model


def _to_weights(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(partial(_cast, next(module.parameters()).dtype), (args, kwargs))  # DeepSpeed may have cast them since


def _to_dtype(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(partial(_cast, dtype), output)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _restore(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives a module's parameters and buffers their values and dtypes of before."""
    for name, each in _named_tensors(module):
        each.grad = None
        if is_partitioned(each):
            write(each, tensors[name])
        else:
            each.data = tensors[name].to(each.device)


def parts_of(model: Any) -> Parts:
    """The modules that train in a model that `prepare_model` made ready, as they declare themselves."""
    inner, attachment = unwrapped(model), attachment_of(model)
    projector = [attachment.projector, *(inner.get_submodule(path) for path in attachment.modules_to_save)]
    kernels = _kernels(cast(SPProjector, attachment.projector))
    if not _is_peft(model):
        return Parts(projector, kernels=kernels)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in attachment.parts.language_model.modules() if isinstance(module, BaseTunerLayer)]
    lora = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    return Parts(projector, lora, kernels)


def _kernels(projector: SPProjector) -> list[nn.Module]:
    """What reads windows of patches: the extractor, and the integrator's detail kernel."""
    integrator = projector.integrator
    return [projector.extractor] if integrator is None else [projector.extractor, integrator.detail_kernel]


def save_trained(model: Any, directory: str | PathLike[str]) -> None:
    """Writes what trained and nothing else: `spatial_tokens/` (see `save_adapter`) and, of a PEFT model, `lora/` as PEFT reads it.

    Of a sharded model (FSDP2, ZeRO-3) every process must call this; the first writes.

    Raises:
        SpatialTokensError: If a trained weight is not finite, or the files cannot be written.
    """
    require_finite(model)
    folder = as_path(directory)
    save_adapter(model, folder / SPATIAL)
    if _is_peft(model) and (tensors := gathered(_lora_tensors(model))):
        with TemporaryDirectory() as temporary:
            model.peft_config[model.active_adapter].save_pretrained(temporary)
            config = read_text(Path(temporary) / FORMAT.config_name)
        FORMAT.save(folder / LORA, config, tensors)


def require_finite(model: Any) -> None:
    """Raises SpatialTokensError if what trained is not finite, or so large that its norm is not.

    Of a sharded model (FSDP2, ZeRO-3) every process must call this.
    """
    tensors = trained_tensors(model) | (_lora_tensors(model) if _is_peft(model) else {})
    norms = {name: _norm(each) for name, each in tensors.items() if each.is_floating_point()}
    first = next(iter(norms.values())).device
    finite = torch.stack([norm.to(first) for norm in norms.values()]).isfinite().tolist()
    wrong = [f"{name} ({norm.item()})" for (name, norm), good in zip(norms.items(), finite, strict=True) if not good]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SpatialTokensError(f"the norms of trained weights are not finite: {wrong[0]}{more}; lower the learning rate")


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    if is_partitioned(tensor):
        with whole(tensor) as each:
            return torch.linalg.vector_norm(each.detach().float())  # type: ignore[no-any-return]
    norm: Any = torch.linalg.vector_norm(tensor.detach().float())
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]


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
        require_exactly({key: shape_of(each) for key, each in tensors.items()}, saved, str(path))
        for key, tensor in tensors.items():
            write(tensor, saved[key])


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

    return dict(get_peft_model_state_dict(model, state_dict=tensors_of(model), save_embedding_layers=False))


def _is_peft(model: Any) -> bool:
    return hasattr(model, "get_base_model")


def __getattr__(name: str) -> Any:
    if name == "prepare":
        warnings.warn("training.prepare.prepare is called prepare_model now", FutureWarning, stacklevel=2)
        return prepare_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
