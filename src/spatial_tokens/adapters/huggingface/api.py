"""`attach` and `detach`: spatial tokens for a Hugging Face vision-language model, and the model as it was."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from spatial_tokens.adapters.huggingface import placeholders
from spatial_tokens.adapters.huggingface.families import Family
from spatial_tokens.adapters.huggingface.hooks import NAME, Attachment, Mode, Unit
from spatial_tokens.adapters.huggingface.layouts import tiles_of
from spatial_tokens.adapters.huggingface.maps_to_tokens import Resize
from spatial_tokens.adapters.huggingface.model_parts import ModelParts, device_of, find_parts
from spatial_tokens.adapters.huggingface.processing import TOKEN, add_token, with_placeholders, without_placeholders
from spatial_tokens.adapters.huggingface.reserved_token import ReservedToken
from spatial_tokens.checks import check_choice
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, shown
from spatial_tokens.grid import as_size, crop_sizes
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.int8 import quantized_parameter

ATTRIBUTE = "_spatial_attachment"
LOGGER = logging.getLogger(__name__)

Model = TypeVar("Model")  # the caller's own class, which comes back


def attach(
    model: Model,
    processor: Any = None,
    projector: SPProjector | SPProjectorConfig | str = "llava-sp-cropping",
    *,
    mode: str = "auto",
    unit: Unit = "image",
    resize: Resize | None = None,
    token: str = TOKEN,
    token_id: int | None = None,
    **fields: Any,
) -> tuple[Model, Any]:
    """Adds spatial tokens to a vision-language model: in forward, loss and `generate`, in training and on disk.

    The model is changed in place: it gains a submodule `spatial_tokens` (an SPProjector without a patch head) and hooks. Its
    weights, its vocabulary and its own image tokens stay as they are, bit for bit. `detach` restores it. The processor is copied.
    torch.compile's caches are reset, as compiled code does not look for new hooks. What was added is logged, at the level INFO.

    Args:
        model: A transformers model with `get_image_features`, such as `LlavaForConditionalGeneration`; or one that PEFT,
            torch.compile or DistributedDataParallel wraps.
        processor: Its processor; the one returned inserts the placeholders. Without one, use `insert_placeholders` on ready
            `input_ids`.
        projector: A preset's name, whose widths are those of the model, and whose grid too where kernels are dense; or a whole
            config: a new projector, in the dtype of the model's own. Or a ready SPProjector without a patch head, which keeps its
            weights and dtype. Either is on the device of the model's own projector.
        mode: "own" ("auto" too): a reserved token of its own marks the places. "image": the model's image token does.
        unit: "image": K spatial tokens for an image, from the whole of it (of images cut into tiles: from the thumbnail, the
            paper's InternVL setting). "tile": K for each tile.
        resize: How patch features of another grid are brought to the projector's: "pool" (adaptive average pooling) or
            "interpolate" (bilinear, antialiased), in float32; None refuses them. Models that take images of any size need one,
            unless the projector's kernels are factorized (`rank=`), which read patches of every grid as they are.
        token: The reserved token's text: a new token, or an added special token of the tokenizer that has no other use.
        token_id: Its id, if `input_ids` are made without a processor; when left out, the first beyond the embeddings.
        **fields: Fields of an SPProjectorConfig in place of the preset's, or of what was found in the model. Kernel sizes are in
            patches of `grid_size`: with factorized kernels the preset's, unless given.

    Returns:
        The model, and a copy of the processor that inserts placeholders (None without one).

    Raises:
        SpatialTokensError: If the model is one that spatial tokens cannot be attached to (it says what was looked for and not
            found), has them already, or the projector, the token or an option does not fit it.

    Examples:
        >>> from spatial_tokens.adapters.huggingface.ready import trained_llava
        >>> from spatial_tokens.demo.scene_text import draw_scene
        >>> model, processor = attach(*trained_llava(), "factorized-cropping")
        >>> scene = draw_scene("green circle top left, large blue ring right")
        >>> inputs = processor(images=scene, text="<image> What color is the ring?", return_tensors="pt")
        >>> processor.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
        'blue'
    """
    _require_transformers()
    if "config" in fields:
        warnings.warn("attach takes projector= now, instead of config=", FutureWarning, stacklevel=2)
        projector = fields.pop("config")
    if "preset" in fields:
        raise SpatialTokensError(f"a preset is given as the projector: attach(model, processor, {shown(fields['preset'])})")
    if not isinstance(projector, (SPProjector, SPProjectorConfig, str)):
        raise SpatialTokensError(
            f"projector must be a preset's name, an SPProjectorConfig or an SPProjector, got {shown(projector)}"
        )
    check_choice("mode", mode, ("auto", "own", "image"))
    check_choice("unit", unit, ("image", "tile"))
    check_choice("resize", resize, (None, "pool", "interpolate"))
    inner = unwrapped(model)
    if hasattr(inner, ATTRIBUTE) or hasattr(inner, NAME):
        raise SpatialTokensError("the model has spatial tokens already; detach(model) first")
    _require_nothing_lost(model)
    if not isinstance(token, str) or not token.strip() or token != token.strip() or not token.isprintable():
        raise SpatialTokensError(f"token must be the text of a token, without spaces around it, got {shown(token)}")
    parts = find_parts(inner)
    chosen: Mode = "image" if mode == "image" else "own"
    if chosen == "image":
        _require_image_mode(parts.family, unit)
    is_new = not isinstance(projector, SPProjector)
    made = (
        _ready(parts, projector, resize, fields) if isinstance(projector, SPProjector) else _new(parts, projector, resize, fields)
    )

    copied = None
    if processor is not None:
        copied, found = add_token(processor, token if chosen == "own" else None)
        if chosen == "own" and token_id is not None and token_id != found:
            raise SpatialTokensError(f"the tokenizer gives {token!r} the id {found}, not {token_id}; leave token_id out")
        token_id = found
    reserved = ReservedToken(token, token_id, parts) if chosen == "own" else ReservedToken.of_images(parts)
    if copied is not None:
        per_tile = unit == "tile" and parts.family.tiles is not None
        copied = with_placeholders(copied, parts, reserved, made.num_spatial_tokens, per_tile=per_tile)

    attachment = Attachment(parts, made, reserved, chosen, unit, resize, is_new=is_new)
    setattr(inner, NAME, made.train(inner.training))
    attachment.undo.append(partial(delattr, inner, NAME))
    attachment.install()
    attachment.replace(inner, ATTRIBUTE, attachment)
    _forget_compiled_code()
    _log(attachment, made)
    return model, copied


def _log(attachment: Attachment, projector: SPProjector) -> None:
    """What was added, as PEFT's `print_trainable_parameters` says it: how much, and where the tokens go."""
    config: Any = attachment.parts.model.config
    weights = list(projector.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    grid = attachment.to_tokens.grid_size
    LOGGER.info(
        "attached %d spatial tokens to %s: %s parameters (%.1f MiB in %s), patch grid %s; they go before each %s, marked by %s "
        "(id %d)",
        attachment.num_spatial_tokens,
        config.model_type,
        f"{sum(weight.numel() for weight in weights):,}",
        size / 2**20,
        str(weights[0].dtype).removeprefix("torch.") if weights else "no dtype",
        "any" if grid is None else "{} x {}".format(*grid),
        attachment.unit,
        attachment.token.text if attachment.mode == "own" else "the model's image token",
        attachment.token_id,
    )


def detach(model: Model, processor: Any = None) -> Model:
    """Restores a model that `attach` changed, exactly: weights, methods, no hook left.

    Args:
        model: The model.
        processor: The processor that `attach` returned, to be an ordinary one again (its tokenizer keeps the reserved token).

    Raises:
        SpatialTokensError: If it has no spatial tokens; or a part of the base that trained with them was quantized since, so that
            its own weights cannot be given back. The model is then as it was.
    """
    attachment = attachment_of(model)
    for path in attachment.modules_to_save:
        if (name := quantized_parameter(attachment.parts.model.get_submodule(path))) is not None:
            raise SpatialTokensError(
                f"{path}.{name} was quantized after attach, so its own weights cannot be put back; detach first, then quantize"
            )
    attachment.remove()
    _forget_compiled_code()
    if processor is not None:
        without_placeholders(processor)
    return model


def attachment_of(model: Any) -> Attachment:
    """What `attach` left in a model.

    Raises:
        SpatialTokensError: If it has no spatial tokens.
    """
    found = getattr(unwrapped(model), ATTRIBUTE, None)
    if found is None:
        raise SpatialTokensError("the model has no spatial tokens; attach(model, ...) first")
    return found  # type: ignore[no-any-return]


def insert_placeholders(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    tokens_per_image: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    padding_side: str = "left",
) -> dict[str, Any]:
    """Puts the placeholders of an attached model before every image of ready `input_ids`; see `placeholders.insert`."""
    attachment = attachment_of(model)
    parts = attachment.parts
    each = attachment.num_spatial_tokens
    count: int | list[int] = each
    if attachment.unit == "tile" and parts.family.tiles == "anyres":
        count = [each * tiles for tiles in tiles_of(inputs, parts.model.config)]
    return placeholders.insert(
        inputs,
        token_id=attachment.token_id,
        count=count,
        image_token_id=parts.image_token_id,
        opening_ids=parts.opening_ids,
        tokens_per_image=tokens_per_image,
        pad_token_id=pad_token_id,
        padding_side=padding_side,
    )


def insert_slots(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The old name of `insert_placeholders`."""
    warnings.warn("insert_slots is called insert_placeholders now", FutureWarning, stacklevel=2)
    return insert_placeholders(*args, **kwargs)


def unwrapped(model: Any) -> Any:
    """The transformers model in one that DDP, torch.compile or PEFT wraps, or itself."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _new(parts: ModelParts, config: SPProjectorConfig | str, resize: Resize | None, fields: Mapping[str, Any]) -> SPProjector:
    """A new projector, in the dtype of the model's own and where that runs."""
    fitted = config_for(parts, config, resize, fields)
    weight = next(parts.projector.parameters(), None)
    weight = next(parts.model.parameters()) if weight is None or not weight.is_floating_point() else weight
    return SPProjector.from_config(fitted, device=device_of(parts.projector, weight), dtype=weight.dtype)


def _ready(parts: ModelParts, projector: SPProjector, resize: Resize | None, fields: Mapping[str, Any]) -> SPProjector:
    """The caller's projector, where the model's own runs.

    Raises:
        SpatialTokensError: If it has a patch head, or its widths or grid are not the model's.
    """
    if fields:
        raise SpatialTokensError(f"{', '.join(fields)} are for a preset, not for a ready projector")
    if projector.patch_head is not None:
        raise SpatialTokensError("the projector has a patch head, but the model projects its patches itself; give patch_head=None")
    _require_fit(
        parts, projector.extractor, resize, {"vision_hidden_size"} if projector.any_grid else {"vision_hidden_size", "grid_size"}
    )
    width = getattr(projector.spatial_head, "out_features", None)
    if width not in (None, parts.text_hidden_size):
        raise SpatialTokensError(f"the projector's tokens have {width} channels, the language model has {parts.text_hidden_size}")
    weight = next(parts.projector.parameters(), next(parts.model.parameters()))
    return projector.to(device=device_of(parts.projector, weight))


def config_for(
    parts: ModelParts, config: SPProjectorConfig | str, resize: Resize | None, fields: Mapping[str, Any]
) -> SPProjectorConfig:
    """The config of a model's spatial tokens: its widths, its grid, no patch head.

    Raises:
        SpatialTokensError: If the grid cannot be determined, or a whole config is not the model's.
    """
    names = {"vision_hidden_size", "text_hidden_size", "grid_size"}
    if isinstance(config, SPProjectorConfig):
        if fields:
            raise SpatialTokensError(f"{', '.join(fields)} are for a preset, not for a whole config")
        fitted = replace(config, patch_head=None)
    else:
        widths = {"vision_hidden_size": parts.vision_hidden_size, "text_hidden_size": parts.text_hidden_size}
        known = {name: value for name, value in widths.items() if value is not None}
        preset = SPProjectorConfig.from_preset(config)
        fitted = SPProjectorConfig.from_preset(config, **{**known, **_grid_fields(parts, preset, resize, fields), **fields})
    if "vision_hidden_size" in fields:  # which the user may know better than the first layer tells
        names.remove("vision_hidden_size")
    _require_fit(parts, fitted, resize, names - {"grid_size"} if fitted.any_grid else names)
    return fitted


def _require_fit(parts: ModelParts, given: Any, resize: Resize | None, names: set[str]) -> None:
    """Raises SpatialTokensError if a config, or a part that names its widths, is not the model's."""
    wrong = []
    for name in sorted(names):
        value, expected = getattr(given, name, None), getattr(parts, name)
        if None not in (value, expected) and value != expected and not (name == "grid_size" and resize is not None):
            wrong.append(f"{name} {value}, not {expected}")
    if wrong:
        raise SpatialTokensError(f"the config does not fit the model: it has {'; '.join(wrong)}")


def _require_nothing_lost(model: Any) -> None:
    """Raises SpatialTokensError if PEFT has loaded an adapter whose spatial tokens it had no place for."""
    for name, config in (getattr(unwrapped(model), "peft_config", None) or {}).items():
        if any(NAME in each for each in getattr(config, "modules_to_save", None) or []):
            raise SpatialTokensError(
                f"the PEFT adapter {name!r} has {NAME!r} among its modules_to_save, which a model without spatial tokens does not "
                "load; attach to the base first, then load the adapter"
            )


def _forget_compiled_code() -> None:
    """Drops what torch.compile has made: it does not check whether a module has gained or lost hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _require_image_mode(family: Family, unit: Unit) -> None:
    """Raises SpatialTokensError where the image's tokens are not ours to extend: each unit must have a run of its own."""
    if not family.image_mode:
        raise SpatialTokensError("spatial tokens cannot ride among this model's image tokens; use mode='own'")
    needed = {"anyres": "image", None: unit}.get(family.tiles, "tile")
    if unit != needed:
        raise SpatialTokensError(f"mode='image' needs unit={needed!r} in this model, as its image tokens come {needed} by {needed}")


def _grid_fields(parts: ModelParts, preset: SPProjectorConfig, resize: Resize | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The grid, and kernels for it where it is not the preset's; factorized kernels keep theirs, of which windows are shares."""
    if fields.get("rank", preset.rank) is not None and "grid_size" not in fields:
        return {"patch_head": None}
    grid = fields.get("grid_size", preset.grid_size if resize else parts.grid_size)
    if grid is None:
        raise SpatialTokensError(
            "the model takes images of any size, so its patch grids differ; give 'factorized-cropping', whose kernels read any "
            "grid, or resize='pool' or 'interpolate', to bring them all to the preset's "
            f"{preset.grid_size[0]}x{preset.grid_size[1]}"
            if parts.any_size
            else "cannot tell the model's patch grid from its config; give grid_size=(height, width)"
        )
    shape: dict[str, Any] = {"grid_size": grid, "patch_head": None}
    if as_size(grid, "grid_size") != preset.grid_size and "kernel_sizes" not in fields:
        shape["kernel_sizes"] = _sizes(grid, preset.num_spatial_tokens)
    return shape


def _sizes(grid: Any, count: int) -> Any:
    """The largest centered crops of a grid, two patches inward at a time as in the paper, or one where it is too small."""
    for stride in (2, 1):
        if len(sizes := crop_sizes(grid, stride)) >= count:
            return sizes[-count:]
    raise SpatialTokensError(f"a grid of {grid[0]}x{grid[1]} patches has no {count} centered crops; give kernel_sizes=")


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
