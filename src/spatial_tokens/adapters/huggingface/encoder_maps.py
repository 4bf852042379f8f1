"""Maps of the patches of a vision-language model that nothing is attached to: where `attach` takes them, and at each block."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.hooks import patches_in
from spatial_tokens.adapters.huggingface.layouts import Maps, maps_of
from spatial_tokens.adapters.huggingface.model_parts import ModelParts
from spatial_tokens.errors import SpatialTokensError

PROJECTOR = "projector"  # the name of what the model's projector is given
OTHER_TOKENS = 8  # at most so many class and register tokens come before a map's patches
RASTER = ("square", "class token", "channels first")  # each map's blocks are `(T, others + N, C)`, rows from the top
AS_PROJECTED = ("grid", "grid of blocks", "grid of windows", "image sizes")  # patches pass the blocks in the projector's order


def patch_maps(parts: ModelParts, inputs: Mapping[str, Any]) -> dict[str, Maps]:
    """Encodes images, and gives the maps `(H, W, C)` of what the model's projector is given, and of the vision encoder's blocks.

    Args:
        parts: The model's.
        inputs: What its image processor gives; what `get_image_features` does not take is left out.

    Returns:
        Maps by name: "1" is the first block's output, "projector" comes last. Blocks are left out where it is not known how their
        patches lie.

    Raises:
        SpatialTokensError: If the projector is not called, or is given features that do not lie as its family's do.
    """
    known = inspect.signature(parts.base.get_image_features).parameters  # type: ignore[arg-type]
    arguments = {name: each for name, each in inputs.items() if name in known}
    seen: dict[str, list[torch.Tensor]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(PROJECTOR, []).append(patches_in(args, kwargs))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for number, block in enumerate(_blocks(parts), 1):
            hooks.callback(block.register_forward_hook(partial(after, str(number))).remove)
        hooks.callback(parts.projector.register_forward_pre_hook(before, with_kwargs=True).remove)
        parts.base.get_image_features(**arguments)  # type: ignore[operator]
    if PROJECTOR not in seen:
        raise SpatialTokensError(f"the model's {parts.projector_path} was not called as it encoded an image; it has been replaced")
    given = maps_of(parts.family.layout, seen.pop(PROJECTOR), arguments, parts.vision_config)
    layers = {name: maps for name, outputs in seen.items() if (maps := _block_maps(parts, outputs, given, arguments)) is not None}
    return {**layers, PROJECTOR: given}


def _blocks(parts: ModelParts) -> list[nn.Module]:
    """The vision encoder's: the longest list of modules outside the language model."""
    words = set(parts.language_model.modules()) | set(parts.projector.modules())
    lists = [list(each) for each in parts.base.modules() if isinstance(each, nn.ModuleList) and each not in words]
    return max(lists, key=len, default=[])


def _block_maps(parts: ModelParts, outputs: list[torch.Tensor], given: Maps, arguments: Mapping[str, Any]) -> Maps | None:
    """The maps of one block; None where they do not lie in a known way."""
    if any(not isinstance(each, torch.Tensor) for each in outputs):
        return None
    if parts.family.layout in AS_PROJECTED:
        return maps_of(parts.family.layout, outputs, arguments, parts.vision_config)
    if (
        parts.family.layout not in RASTER
        or any(each.ndim != 3 for each in outputs)
        or len({each.shape[1:] for each in outputs}) > 1
    ):
        return None
    states, (height, width) = torch.cat(outputs), given[0].shape[:2]
    side = isqrt(states.shape[1] // (height * width))  # patches that the projector is given joined, along a side
    others = states.shape[1] - height * width * side**2
    if len(states) != len(given) or side == 0 or others > OTHER_TOKENS:
        return None
    return list(torch.unflatten(states[:, others:], 1, (height * side, width * side)))
