"""`attach` and `detach`: spatial tokens for a Hugging Face vision-language model, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spatial_tokens.adapters.huggingface import slots
from spatial_tokens.adapters.huggingface.anatomy import Anatomy, dissect
from spatial_tokens.adapters.huggingface.attachment import NAME, Attachment, Mode, Resize, Unit
from spatial_tokens.adapters.huggingface.clean_save import CleanSave
from spatial_tokens.adapters.huggingface.families import Family
from spatial_tokens.adapters.huggingface.features import tiles_of
from spatial_tokens.adapters.huggingface.processing import TOKEN, add_token, with_slots, without_slots
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, shown
from spatial_tokens.grid import as_size, crop_sizes
from spatial_tokens.modules import SPProjector

ATTRIBUTE = "_spatial_attachment"


def attach(
    model: Any,
    processor: Any = None,
    config: SPProjectorConfig | str = "llava-sp-cropping",
    *,
    mode: str = "auto",
    unit: Unit = "image",
    resize: Resize | None = None,
    token: str = TOKEN,
    token_id: int | None = None,
    **fields: Any,
) -> tuple[Any, Any]:
    """Gives a vision-language model spatial tokens: in forward, loss and `generate`, in training and on disk.

    The model is changed in place: it gains a submodule `spatial_tokens` (an SPProjector without a patch head, on the device and
    in the dtype of the model's own projector) and hooks. Its weights and its own image tokens stay as they are, bit for bit.
    `detach` restores it. The processor is copied.

    Args:
        model: A transformers model with `get_image_features`, such as `LlavaForConditionalGeneration`, or a PEFT model of one.
        processor: Its processor; the one returned inserts the slots. Without one, use `insert_slots` on ready `input_ids`.
        config: A preset's name, whose widths and grid are those of the model; or a whole config.
        mode: "own" ("auto" too): a reserved token of its own marks the places. "image": the model's image token does.
        unit: "image": K spatial tokens for an image, from the whole of it (of images cut into tiles: from the thumbnail, the
            paper's InternVL setting). "tile": K for each tile.
        resize: How patch features of another grid are brought to the config's: "pool" (adaptive average pooling) or
            "interpolate" (bilinear, antialiased); None refuses them. Models that take images of any size need one of them.
        token: The reserved token's text.
        token_id: Its id, if `input_ids` are made without a processor; when left out, the row after the embeddings' last.
        **fields: Fields of an SPProjectorConfig in place of the preset's, or of what was found in the model.

    Returns:
        The model, and a copy of the processor that inserts slots (None without one).

    Raises:
        SpatialTokensError: If the model is one that spatial tokens cannot be attached to (it says what was looked for and not
            found), has them already, or the config does not fit it.

    Example:
        model, processor = attach(model, processor, "llava-sp-cropping")
        inputs = processor(images=image, text="<image> What is this?", return_tensors="pt")
        model.generate(**inputs)
    """
    _require_transformers()
    if mode not in ("auto", "own", "image"):
        raise SpatialTokensError(f"mode must be 'auto', 'own' or 'image', got {shown(mode)}")
    if unit not in ("image", "tile"):
        raise SpatialTokensError(f"unit must be 'image' or 'tile', got {shown(unit)}")
    if resize not in (None, "pool", "interpolate"):
        raise SpatialTokensError(f"resize must be None, 'pool' or 'interpolate', got {shown(resize)}")
    inner = unwrapped(model)
    if hasattr(inner, ATTRIBUTE) or hasattr(inner, NAME):
        raise SpatialTokensError("the model has spatial tokens already; detach(model) first")
    anatomy = dissect(inner)
    chosen: Mode = "image" if mode == "image" else "own"
    if chosen == "image":
        _require_image_mode(anatomy.family, unit)
    fitted = config_for(anatomy, config, resize, fields)

    copied = None
    if processor is not None:
        copied, found = add_token(processor, token)
        if token_id is not None and token_id != found:
            raise SpatialTokensError(f"the tokenizer gives {token!r} the id {found}, not {token_id}; leave token_id out")
        token_id = found
        per_tile = unit == "tile" and anatomy.family.tiles is not None
        copied = with_slots(copied, anatomy, token, found, fitted.num_spatial_tokens, as_image=chosen == "image", per_tile=per_tile)
    weight = next(anatomy.tap.parameters(), None)
    weight = next(inner.parameters()) if weight is None or not weight.is_floating_point() else weight
    projector = SPProjector.from_config(fitted, device=_device_of(anatomy.tap, weight), dtype=weight.dtype)

    clean_save = CleanSave(inner, NAME)
    token_id, grown, undo = (anatomy.image_token_id, [], []) if chosen == "image" else _reserve(anatomy, token_id)
    setattr(inner, NAME, projector.train(inner.training))
    attachment = Attachment(anatomy, fitted, token, token_id, chosen, unit, resize)
    attachment.grown = clean_save.grown = grown
    clean_save.grown_to = token_id + 1
    attachment.install()
    attachment.undo[:0] = undo
    inner.save_pretrained = clean_save
    setattr(inner, ATTRIBUTE, attachment)
    return model, copied


def detach(model: Any, processor: Any = None) -> Any:
    """Restores a model that `attach` changed, exactly: weights, embeddings, generation config, no hook left.

    Args:
        model: The model.
        processor: The processor that `attach` returned, to be an ordinary one again (its tokenizer keeps the reserved token).

    Raises:
        SpatialTokensError: If it has no spatial tokens.
    """
    inner = unwrapped(model)
    attachment = attachment_of(inner)
    attachment.remove()
    del inner.save_pretrained
    delattr(inner, NAME)
    delattr(inner, ATTRIBUTE)
    if processor is not None:
        without_slots(processor)
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


def insert_slots(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    tokens_per_image: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    padding_side: str = "left",
) -> dict[str, Any]:
    """Puts the slots of an attached model before every image of ready `input_ids`; see `slots.insert`."""
    attachment = attachment_of(model)
    anatomy = attachment.anatomy
    each = attachment.config.num_spatial_tokens
    count: int | list[int] = each
    if attachment.unit == "tile" and anatomy.family.tiles == "anyres":
        count = [each * tiles for tiles in tiles_of(inputs, anatomy.model.config)]
    return slots.insert(
        inputs,
        token_id=attachment.token_id,
        count=count,
        image_token_id=anatomy.image_token_id,
        opening_ids=anatomy.opening_ids,
        tokens_per_image=tokens_per_image,
        pad_token_id=pad_token_id,
        padding_side=padding_side,
    )


def unwrapped(model: Any) -> Any:
    """The transformers model in a PEFT or DDP model, or itself."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def config_for(
    anatomy: Anatomy, config: SPProjectorConfig | str, resize: Resize | None, fields: Mapping[str, Any]
) -> SPProjectorConfig:
    """The config of a model's spatial tokens: its widths, its grid, no patch head.

    Raises:
        SpatialTokensError: If the grid cannot be told, or a whole config is not the model's.
    """
    found = {"vision_hidden_size": anatomy.vision_hidden_size, "text_hidden_size": anatomy.text_hidden_size}
    known: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if isinstance(config, SPProjectorConfig):
        if fields:
            raise SpatialTokensError(f"{', '.join(fields)} go with a preset, not with a whole config")
        fitted = replace(config, patch_head=None)
    else:
        fitted = SPProjectorConfig.from_preset(config, **{**known, **_grid_fields(anatomy, config, resize, fields), **fields})
    if "vision_hidden_size" in fields:  # which the user may know better than the first layer tells
        known.pop("vision_hidden_size", None)
    if anatomy.grid_size is not None and resize is None:
        known["grid_size"] = anatomy.grid_size
    wrong = [f"{name} {getattr(fitted, name)}, not {value}" for name, value in known.items() if getattr(fitted, name) != value]
    if wrong:
        raise SpatialTokensError(f"the config does not fit the model: it has {'; '.join(wrong)}")
    return fitted


def _device_of(tap: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them for its calls."""
    hooks = [getattr(part, "_hf_hook", None) for part in tap.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    found = next((device for device in devices if device is not None), None)
    return weight.device if found is None else torch.device(found)


def _require_image_mode(family: Family, unit: Unit) -> None:
    """Raises SpatialTokensError where the image's tokens are not ours to extend: each unit must have a run of its own."""
    if not family.image_mode:
        raise SpatialTokensError("spatial tokens cannot ride among this model's image tokens; use mode='own'")
    needed = {"anyres": "image", None: unit}.get(family.tiles, "tile")
    if unit != needed:
        raise SpatialTokensError(f"mode='image' needs unit={needed!r} in this model, as its image tokens come {needed} by {needed}")


def _grid_fields(anatomy: Anatomy, preset_name: str, resize: Resize | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The grid, and kernels for it where it is not the preset's."""
    preset = SPProjectorConfig.from_preset(preset_name)
    grid = fields.get("grid_size", preset.grid_size if resize else anatomy.grid_size)
    if grid is None:
        raise SpatialTokensError(
            "the model takes images of any size, so its patch grids differ; give resize='pool' or 'interpolate', to bring them "
            f"all to the preset's {preset.grid_size[0]}x{preset.grid_size[1]}"
            if anatomy.any_size
            else "cannot tell the model's patch grid from its config; give grid_size=(height, width)"
        )
    shape: dict[str, Any] = {"grid_size": grid, "patch_head": None}
    if as_size(grid, "grid_size") != preset.grid_size and "kernel_sizes" not in fields:
        shape["kernel_sizes"] = _sizes(grid, preset.num_spatial_tokens)
    return shape


def _sizes(grid: Any, count: int) -> Any:
    """The largest centred crops of a grid, two patches inward at a time as in the paper, or one where it is too small."""
    for stride in (2, 1):
        if len(sizes := crop_sizes(grid, stride)) >= count:
            return sizes[-count:]
    raise SpatialTokensError(f"a grid of {grid[0]}x{grid[1]} patches has no {count} centred crops; give kernel_sizes=")


def _reserve(anatomy: Anatomy, token_id: int | None) -> tuple[int, list[str], list[Callable[[], Any]]]:
    """A row of the embeddings for the reserved token, which is never generated.

    Returns:
        Its id, the names of the parameters that gained a row, and what undoes it all.
    """
    model: Any = anatomy.model
    rows = {name: each.shape[0] for name, each in model.named_parameters(remove_duplicate=False) if each.ndim}
    old = int(anatomy.embeddings.weight.shape[0])
    token_id = old if token_id is None else token_id
    if type(token_id) is not int or token_id < 0 or token_id == anatomy.image_token_id:
        raise SpatialTokensError(f"token_id must be the id of a token that stands for nothing else, got {shown(token_id)}")
    undo: list[Callable[[], Any]] = []
    if token_id >= old:
        undo.append(_Shrink(model, old, token_id + 1, model.__dict__.get("vocab_size")))
        with torch.random.fork_rng():
            _resize(model, token_id + 1)
    grown = [name for name, each in model.named_parameters(remove_duplicate=False) if each.ndim and each.shape[0] != rows[name]]
    with torch.no_grad():
        for name in grown:
            model.get_parameter(name)[old:] = 0
        if grown:  # a row unlike any other, padding's zeros too: where the caller embeds the ids, it marks the places
            row = torch.randn(anatomy.text_hidden_size, generator=torch.Generator().manual_seed(token_id))
            anatomy.embeddings.weight[token_id] = 0.02 * row.to(anatomy.embeddings.weight)
    return token_id, grown, undo


def _resize(model: Any, rows: int) -> None:
    """Resizes the embeddings and, if it has as many rows, the head: Inkling 2's has fewer, without padding, and stays as it is."""
    head = model.get_output_embeddings()
    apart = head is not None and head.weight.shape[0] != model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    if apart:
        model.set_output_embeddings(head)


class _Shrink:
    def __init__(self, model: Any, rows: int, grown_to: int, vocab_size: int | None) -> None:
        self.model, self.rows, self.grown_to, self.vocab_size = model, rows, grown_to, vocab_size

    def __call__(self) -> None:
        if int(self.model.get_input_embeddings().weight.shape[0]) != self.grown_to:
            return  # somebody has added rows of their own since
        _resize(self.model, self.rows)
        if self.vocab_size is None:
            self.model.__dict__.pop("vocab_size", None)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
