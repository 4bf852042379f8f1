"""The released LLaVA-SP checkpoints' names and shapes, both ways.

| released | here |
|---|---|
| `conv_{k}.weight` `(S, C, k, k)` | `extractor.kernels.{i}.weight` `(S, k * k * C)` |
| `conv_CM.weight` `(S, C, k, k)` | `integrator.detail_kernel.weight` `(S, k * k * C)` |
| `query_projector.{0,1}.*`, `key_projector...`, `value_projector...` | the same under `integrator.` |
| `conv_linear.1.*` | `spatial_head.fc.*` |
| `mm_projector.{0,2}.*` | `patch_head.fc{1,2}.*` |

Pooling's kernels are `conv_{k}.1.weight`, but for the one that covers the grid.
In a whole model these names start with `model.`, in `non_lora_trainables.bin` with `base_model.model.model.`.
"""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from einops import rearrange

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size, as_size, check_positive
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.files import Tensors, is_state_dict, read_tensors, require_values
from spatial_tokens.storage.int8 import require_plain
from spatial_tokens.storage.pretrained import assign, require_exactly, require_unquantized

PREFIXES = ("base_model.model.model.", "model.", "")
GRID = 24  # patches along a side, in all released models
STEPS = (4, 2, 8)  # between the kernels of table 4, the released models' first; its fourth model has one kernel, of the grid's size

_REST_OF_MODEL = re.compile(
    r"(base_model\.model\.)?(model\.)?(layers|embed_tokens|norm|vision_tower|image_newline|rotary_emb|lm_head)(\.|$)"
)
_KERNEL = re.compile(r"(.*\.)?conv_(\d+)(\.1)?\.weight")


def from_llava_sp(
    source: Mapping[str, torch.Tensor] | str | PathLike[str],
    *,
    config: SPProjectorConfig | None = None,
    grid_size: int = GRID,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SPProjector:
    """The projector of a released checkpoint.

    A whole model's other parts (language model, vision tower) are skipped, in files without being read. The caller's
    tensors are copied.

    Args:
        source: A state dict; a `.bin` or safetensors file; an index of shards; or a folder that holds one of them.
        config: What the checkpoint must hold. Inferred from the names and shapes when left out, with what no weight says taken
            as in all released models: kernels in steps of 2, 4 or 8 up to the whole grid, or of the whole grid alone (table 4), and
            a detail stride of 2.
        grid_size: Patches along a side of the vision encoder's grid, to infer the config.
        device: Where the projector goes; the tensors' own when left out.
        dtype: Its dtype; the tensors' own when left out.

    Raises:
        SpatialTokensError: If the file cannot be read, a tensor is missing, unexpected or wrongly shaped (they are listed), is
            quantized or has no values, or no config can be inferred, as kernels are missing.

    Examples:
        >>> config = SPProjectorConfig(vision_hidden_size=8, text_hidden_size=8, grid_size=8, kernel_sizes=(4, 8),
        ...                            spatial_hidden_size=4, detail_kernel_size=4, spatial_head="linear")
        >>> released = to_llava_sp(SPProjector.from_config(config))
        >>> released["conv_4.weight"].shape
        torch.Size([4, 8, 4, 4])
        >>> from_llava_sp(released, grid_size=8).config == config
        True
    """
    origin = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = _without_prefix(_projector_tensors(source), origin)
    require_values(tensors, f"cannot use {origin}")
    require_unquantized(tensors, origin)
    config = _infer_config(tensors, origin, grid_size) if config is None else config
    if config.rank is not None:
        raise SpatialTokensError(f"{origin} holds dense kernels, as all released files do; give a config without rank")

    projector = SPProjector.from_config(config, device="meta")
    names = _released_names(config)
    shapes = {names[name]: _released_shape(config, name, tensor.shape) for name, tensor in projector.state_dict().items()}
    require_exactly(shapes, tensors, origin)
    own = {name: _from_convolution(tensors.pop(released)) for name, released in names.items()}  # pop: few are in memory twice
    assign(projector, own, origin, dtype)
    return projector.to(device=device)


def to_llava_sp(projector: SPProjector, *, prefix: str = "") -> Tensors:
    """A copy of the projector's tensors under the released names and in the released shapes.

    Factorized kernels become the dense ones that they are on their own grid, so that the authors' code runs them.

    Args:
        projector: Any that the released names can hold: square kernels and a "linear" spatial head.
        prefix: "model." as in a whole model, "base_model.model.model." as in `non_lora_trainables.bin`, or "".

    Raises:
        SpatialTokensError: If the released names cannot hold the projector, or the prefix is none of theirs.
    """
    if not isinstance(projector, SPProjector):
        raise SpatialTokensError(f"projector must be an SPProjector, got a {type(projector).__name__}")
    if prefix not in PREFIXES:
        raise SpatialTokensError(f"prefix must be one of {', '.join(map(repr, PREFIXES))}, got {prefix!r}")
    config = projector.config
    names = _released_names(config)
    tensors = projector.exact_state_dict() if config.rank is None else projector.to_dense().exact_state_dict()
    require_plain(tensors, "the released names cannot hold this projector")
    return {  # pop: few of the dense kernels are in memory twice
        prefix + released: _to_convolution(config, name, tensors.pop(name)).clone(memory_format=torch.contiguous_format)
        for name, released in names.items()
    }


def _projector_tensors(source: Any) -> Tensors:
    """What may belong to a projector, from wherever it is."""
    if isinstance(source, (str, PathLike)):
        return read_tensors(source, lambda name: not _REST_OF_MODEL.match(name))
    if not is_state_dict(source):
        raise SpatialTokensError(f"source must be a path, or a state dict of names to tensors, got a {type(source).__name__}")
    return {name: tensor for name, tensor in source.items() if not _REST_OF_MODEL.match(name)}


def _released_names(config: SPProjectorConfig) -> dict[str, str]:
    """Our names to the released ones, for every tensor of the projector."""
    detail = config.detail_kernel_size
    sizes = [*config.kernel_sizes, *([detail] if detail is not None else [])]
    if config.spatial_head != "linear" or config.patch_head is None or any(isinstance(size, tuple) for size in sizes):
        raise SpatialTokensError(
            f"the released names hold square kernels, spatial_head='linear' and patch_head='mlp', got kernel sizes {sizes}, "
            f"spatial_head={config.spatial_head!r} and patch_head={config.patch_head!r}; save_pretrained holds every projector"
        )
    names = {}
    for i, k in enumerate(config.kernel_sizes):
        pooled = config.variant == "pooling" and as_size(k, "kernel size") != config.grid_size
        names[f"extractor.kernels.{i}.weight"] = f"conv_{k}.1.weight" if pooled else f"conv_{k}.weight"
    if detail is not None:
        names["integrator.detail_kernel.weight"] = "conv_CM.weight"
        for role in ("query", "key", "value"):
            for layer in ("0.weight", "0.bias", "1.weight", "1.bias"):
                names[f"integrator.{role}_projector.{layer}"] = f"{role}_projector.{layer}"
    names["spatial_head.fc.weight"] = "conv_linear.1.weight"
    if config.spatial_head_bias:
        names["spatial_head.fc.bias"] = "conv_linear.1.bias"
    for ours, theirs in (("fc1", "mm_projector.0"), ("fc2", "mm_projector.2")):
        for kind in ("weight", "bias"):
            names[f"patch_head.{ours}.{kind}"] = f"{theirs}.{kind}"
    return names


def _kernel_size(config: SPProjectorConfig, name: str) -> Size | None:
    """The window of one of our tensors that is a convolution in the released code; None for the others."""
    if name.startswith("extractor.kernels."):
        return as_size(config.kernel_sizes[int(name.split(".")[2])], "kernel size")
    if name == "integrator.detail_kernel.weight":
        return as_size(config.detail_kernel_size, "detail_kernel_size")
    return None


def _released_shape(config: SPProjectorConfig, name: str, shape: torch.Size) -> tuple[int, ...]:
    kernel = _kernel_size(config, name)
    return tuple(shape) if kernel is None else (shape[0], config.vision_hidden_size, *kernel)


def _to_convolution(config: SPProjectorConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    kernel = _kernel_size(config, name)
    return tensor if kernel is None else rearrange(tensor, "s (h w c) -> s c h w", h=kernel[0], w=kernel[1])


def _from_convolution(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, in our layout."""
    if tensor.ndim == 4:
        tensor = rearrange(tensor, "s c h w -> s h w c")
    own = tensor.detach().clone(memory_format=torch.contiguous_format)
    return own.flatten(1) if tensor.ndim == 4 else own


def _without_prefix(tensors: Mapping[str, torch.Tensor], origin: str) -> Tensors:
    """The tensors under the names that they have after the prefix of the convolutions."""
    found = sorted({match[1] or "" for match in map(_KERNEL.fullmatch, tensors) if match})
    if len(found) != 1 or found[0] not in PREFIXES:
        raise SpatialTokensError(
            f"{origin} holds no single LLaVA-SP projector: expected conv_{{k}}.weight under one of the prefixes "
            f"{', '.join(map(repr, PREFIXES))}, found it under {', '.join(map(repr, found)) or 'none'}"
        )
    strays = [name for name in tensors if not name.startswith(found[0])]
    if strays:
        raise SpatialTokensError(
            f"the tensors of {origin} do not fit: unexpected beside the prefix {found[0]!r}: {', '.join(strays[:20])}"
        )
    return {name.removeprefix(found[0]): tensor for name, tensor in tensors.items()}


def _infer_config(tensors: Tensors, origin: str, grid_size: int) -> SPProjectorConfig:
    kernels = {int(match[2]): match[0] for match in map(_KERNEL.fullmatch, tensors) if match}
    sizes, pooled = sorted(kernels), any(name.endswith(".1.weight") for name in kernels.values())
    _require_all_kernels(sizes, grid_size, pooled, origin)
    largest = kernels[sizes[-1]]
    detail = tensors.get("conv_CM.weight")
    text_hidden_size, vision_hidden_size = _shape(tensors, "mm_projector.0.weight", 2, origin)
    return SPProjectorConfig(
        vision_hidden_size=vision_hidden_size,
        text_hidden_size=text_hidden_size,
        grid_size=as_size(grid_size, "grid_size"),
        variant="pooling" if pooled else "cropping",
        kernel_sizes=tuple(sizes),
        spatial_hidden_size=_shape(tensors, largest, 4, origin)[0],
        detail_kernel_size=None if detail is None else _shape(tensors, "conv_CM.weight", 4, origin)[2],
        spatial_head="linear",
        spatial_head_bias="conv_linear.1.bias" in tensors,
    )


def _require_all_kernels(sizes: list[int], grid_size: int, pooled: bool, origin: str) -> None:
    """Raises SpatialTokensError, naming those that are missing, unless the kernels are all of a model of table 4."""
    check_positive(grid_size=grid_size)
    models = [range(step, grid_size + 1, step) for step in (*STEPS, grid_size) if grid_size % step == 0]
    if any(sizes == list(model) for model in models):
        return
    model = next((model for model in models if set(sizes) < set(model)), None)
    if model is None:
        fault = "no released model has these"
    else:
        names = [f"conv_{k}.1.weight" if pooled and k != grid_size else f"conv_{k}.weight" for k in model if k not in sizes]
        fault = f"missing: {', '.join(names)}"
    raise SpatialTokensError(
        f"{origin} has the kernels {', '.join(map(str, sizes))} on a grid of {grid_size} x {grid_size}: {fault}; find the complete "
        "checkpoint or, if its grid or kernels are others, give the config that it must hold"
    )


def _shape(tensors: Tensors, name: str, rank: int, origin: str) -> torch.Size:
    if name not in tensors:
        raise SpatialTokensError(f"the tensors of {origin} do not fit: missing: {name}")
    if tensors[name].ndim != rank:
        raise SpatialTokensError(f"the tensors of {origin} do not fit: wrongly shaped: {name} {tuple(tensors[name].shape)}")
    return tensors[name].shape
