"""An adapter as an engine needs it: how `save_adapter` wrote that spatial tokens were attached."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spatial_tokens.adapters.huggingface.families import Family
from spatial_tokens.adapters.huggingface.hooks import NAME, Mode, Unit
from spatial_tokens.adapters.huggingface.layouts import OF_ANY_SIZE
from spatial_tokens.adapters.huggingface.maps_to_tokens import Resize
from spatial_tokens.adapters.huggingface.model_parts import family_of
from spatial_tokens.adapters.huggingface.saving import MODULE, ROW, WEIGHTS_NAME, read_config
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.modules import SPProjector
from spatial_tokens.serving.families import require_served
from spatial_tokens.storage.files import read_safetensors, read_shapes
from spatial_tokens.storage.int8 import METADATA_ENTRY
from spatial_tokens.storage.pretrained import require_exactly


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that fits a base model.

    Args:
        folder: Where its files are.
        mode: The options of `attach`,
        unit: as they were
        resize: given.
        token_id: The reserved token, or the image's own.
        config: The projector's config.
        family: What is known of the base's family.
    """

    folder: Path
    mode: Mode
    unit: Unit
    resize: Resize | None
    token_id: int
    config: SPProjectorConfig
    family: Family

    @property
    def count(self) -> int:
        """Spatial tokens of an image, or of a tile."""
        return self.config.num_spatial_tokens

    @property
    def per_tile(self) -> bool:
        """Whether each tile of an image has spatial tokens of its own."""
        return self.unit == "tile" and self.family.tiles is not None


def read_adapter(folder: Path, hf_config: Any) -> ServedAdapter:
    """An adapter for a base model of this config.

    Raises:
        SpatialTokensError: If it is damaged, of another family or width, or of a family that cannot be served.
    """
    values = read_config(folder)
    config = SPProjectorConfig.from_dict(values["projector"])
    kind, width = hf_config.model_type, hf_config.get_text_config().hidden_size
    if values["base_model_type"] != kind:
        raise SpatialTokensError(f"{folder} is an adapter of a {values['base_model_type']} model, not of a {kind}")
    if config.text_hidden_size != width:
        raise SpatialTokensError(
            f"the tokens of {folder} have {config.text_hidden_size} channels, the language model has {width}; give its own base"
        )
    if METADATA_ENTRY in read_safetensors(folder / WEIGHTS_NAME, lambda name: False)[1]:
        raise SpatialTokensError(f"{folder} has int8 weights, which vLLM would take for plain ones; save it before quantization")
    require_served(hf_config)
    family, resize = family_of(hf_config), values["resize"]
    if family.layout in OF_ANY_SIZE and resize is None and not config.any_grid:
        raise SpatialTokensError(
            f"{kind} takes images of any size, and {folder} has no resize: an image of another patch grid would stop the engine; "
            "attach with resize='pool' or 'interpolate', or with factorized kernels"
        )
    return ServedAdapter(folder, values["mode"], values["unit"], resize, values["token_id"], config, family)


def require_weights(adapter: ServedAdapter) -> None:
    """Raises SpatialTokensError unless an adapter's file has exactly the projector's tensors, by its header's names and shapes."""
    path = adapter.folder / WEIGHTS_NAME
    # on "meta": only shapes are compared
    found = {name: torch.empty(shape, device="meta") for name, shape in read_shapes(path).items()}
    expected = SPProjector.from_config(adapter.config, device="meta").state_dict()
    own = {name: each for name, each in found.items() if not name.startswith((MODULE, ROW))}
    require_exactly({name: each.shape for name, each in expected.items()}, own, str(path))


def adapter_of(hf_config: Any, model: str) -> ServedAdapter:
    """The adapter that the config of a served model names, in the model's folder or by an absolute path.

    Raises:
        SpatialTokensError: If it names none, it is not there, or as `read_adapter`.
    """
    named = getattr(hf_config, NAME, None)
    if not isinstance(named, str):
        raise SpatialTokensError(
            f"the config of {model} names no adapter ({NAME!r} is {shown(named)}); serve what `spatial-tokens serve-export` "
            "wrote, or give hf_overrides(base, adapter)"
        )
    folder = Path(model, named)
    if not os.path.isdir(folder):
        raise SpatialTokensError(f"the adapter of {model} is not there: {folder}; download the model, and serve its local folder")
    return read_adapter(folder, hf_config)
