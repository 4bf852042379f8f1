"""Spatial tokens in a model that does not know of them: a reserved token marks their places, hooks fill these.

While the model encodes its images, the input of its projector is recorded; when its language model is called, spatial tokens are
made of that and written over the embeddings of the reserved token. Nothing else of the model is touched, so its own image tokens
are bit for bit what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from spatial_tokens.adapters.huggingface.anatomy import Anatomy
from spatial_tokens.adapters.huggingface.features import Maps, maps_of, tiles_of
from spatial_tokens.adapters.huggingface.slots import Places, find_places
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size

Mode = Literal["own", "image"]
Unit = Literal["image", "tile"]
Resize = Literal["pool", "interpolate"]
NAME = "spatial_tokens"  # of the projector in the model
NEVER = -1e4  # the reserved token's logit: no probability in any dtype, and no infinity in a loss that sums over the vocabulary
CARRIED = "_spatial_encoded"  # on what get_image_features returns: generate() encodes images before it calls the model


@dataclass(frozen=True)
class Encoded:
    """What a call of `get_image_features` left for the language model's call.

    Args:
        maps: Each image's or tile's patches, `(H, W, C)`.
        tile_length: The image tokens that one of them became.
    """

    maps: Maps
    tile_length: int


class Attachment:
    """What `attach` leaves in a model. Its methods are the hooks, so that a deep copy of the model has a copy of its own.

    Args:
        anatomy: The model's parts.
        config: The projector's.
        token: The reserved token.
        token_id: Its id; the image token's in mode "image".
        mode: "own": the places are of a token of ours; "image": of the model's own image token.
        unit: Spatial tokens for each "image" (of tiles: for its thumbnail) or for each "tile".
        resize: How maps of another size are brought to the projector's grid; None: they are refused.
    """

    def __init__(
        self, anatomy: Anatomy, config: SPProjectorConfig, token: str, token_id: int, mode: Mode, unit: Unit, resize: Resize | None
    ) -> None:
        self.anatomy, self.config, self.token, self.token_id = anatomy, config, token, token_id
        self.mode, self.unit, self.resize = mode, unit, resize
        self.encoded: Encoded | None = None
        self.ids: torch.Tensor | None = None
        self.captured: list[torch.Tensor] | None = None
        self.num_tokens = 0
        self.in_video = False
        self.grown: list[str] = []  # the parameters that gained a row for the reserved token
        self.modules_to_save: list[str] = []  # the base's own modules that train, and are saved, with the spatial tokens
        self.undo: list[Callable[[], Any]] = []
        self.head: nn.Module | None = None
        self.forget_head: Callable[[], Any] = _nothing

    @property
    def projector(self) -> nn.Module:
        """Looked up at every use: another library may have wrapped it."""
        return getattr(self.anatomy.model, NAME)  # type: ignore[no-any-return]

    def install(self) -> None:
        """Puts the hooks in place."""
        base, tap = self.anatomy.base, self.anatomy.tap
        hooks = [
            tap.register_forward_pre_hook(self.capture, with_kwargs=True),
            tap.register_forward_hook(self.measure),
            base.register_forward_pre_hook(self.begin, with_kwargs=True),
            base.register_forward_hook(self.end),
            self.anatomy.model.register_forward_pre_hook(self.spare, with_kwargs=True),
            self.anatomy.language_model.register_forward_pre_hook(self.write, with_kwargs=True),
        ]
        self.undo = [*(hook.remove for hook in hooks), self.release_head]
        self.hold_head()
        for name, around in (("get_image_features", self.encode), ("get_video_features", self.encode_video)):
            if hasattr(base, name):
                self.undo.append(_Restore(base, name, base.__dict__.get(name)))
                setattr(base, name, _Around(base, name, around))

    def remove(self) -> None:
        """Takes everything away again."""
        while self.undo:
            self.undo.pop()()

    def hold_head(self) -> None:
        """Hooks what gives the logits; again where resizing or an adapter has put another module in its place."""
        head = self.anatomy.model.get_output_embeddings() if self.mode == "own" else None  # type: ignore[operator]
        if head is not self.head:
            self.forget_head()
            self.head, self.forget_head = head, head.register_forward_hook(self.silence).remove if head is not None else _nothing

    def release_head(self) -> None:
        """Takes that hook away."""
        self.forget_head()
        self.head, self.forget_head = None, _nothing

    def silence(self, module: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        """After the head: the reserved token is never the next one, and takes no share of a loss."""
        if self.token_id < logits.shape[-1]:  # else the head has no row for it
            logits[..., self.token_id] = NEVER
        return logits

    def encode(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `get_image_features`: keeps the patches, or joins their tokens with the image's."""
        if self.in_video:
            return original(**arguments)
        self.captured, self.num_tokens = [], 0
        try:
            outputs = original(**arguments)
            captured = self.captured
        finally:
            self.captured = None
        maps = maps_of(self.anatomy.family.layout, captured, arguments, self.anatomy.vision_config)
        if self.anatomy.family.tiles == "anyres" and self.unit == "image":
            maps = _thumbnails(maps, arguments, self.anatomy.model.config)
        if self.mode == "image":
            return _joined(outputs, self.tokens(maps))
        self.encoded = Encoded(maps, self.num_tokens // max(1, len(maps)))
        if not isinstance(outputs, (tuple, list, torch.Tensor)):
            setattr(outputs, CARRIED, self.encoded)
        return outputs

    def encode_video(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `get_video_features`, which in some families calls `get_image_features`: frames are left alone."""
        self.in_video = True
        try:
            return original(**arguments)
        finally:
            self.in_video = False

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the projector: records its input."""
        if self.captured is None and not self.anatomy.family.own_generate:
            return
        features = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else (*args, *kwargs.values())[0]
        if self.captured is not None:
            self.captured.append(features)
        else:
            self.encoded = Encoded(maps_of(self.anatomy.family.layout, [features], {}, self.anatomy.vision_config), 0)

    def measure(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the projector: counts the tokens that it gives."""
        if self.captured is not None and isinstance(output, torch.Tensor):
            self.num_tokens += output.numel() // output.shape[-1]

    def spare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: slots are nobody's target, whatever the collator made of them."""
        labels = kwargs.get("labels")
        if self.mode == "image" or not isinstance(labels, torch.Tensor):
            return None
        return args, {**kwargs, "labels": labels.masked_fill(labels == self.token_id, -100)}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: what an interrupted call left is gone; what generate() has encoded is there."""
        self.hold_head()
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.ids = ids if isinstance(ids, torch.Tensor) else None
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        self.encoded = getattr(encoded, CARRIED, None)

    def end(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """After the model: nothing stays."""
        self.ids = self.encoded = None

    def write(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: spatial tokens in their places."""
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or self.mode == "image":
            return None
        encoded, self.encoded = self.encoded, None
        if encoded is None:
            if embeddings.shape[1] > 1 and not torch.compiler.is_compiling():
                self._require_no_places(embeddings, kwargs.get("cache", kwargs.get("past_key_values")))  # of that name before 5.24
            if not self._must_take_part():
                return None
            return args, {**kwargs, "inputs_embeds": embeddings + self._no_tokens(embeddings)}
        mask = self._mask(embeddings)
        if torch.compiler.is_compiling():
            tokens = self.tokens(encoded.maps)
            places = len(encoded.maps) * self.config.num_spatial_tokens
            torch._assert_async(mask.sum() == places, "not as many places for spatial tokens as maps of patches")
        else:
            tiles = self.anatomy.family.tiles if self.unit == "image" else None
            units = self.places(mask).units(len(encoded.maps), tiles if tiles != "anyres" else None, encoded.tile_length)
            distinct = sorted(set(units))
            if not distinct:
                return None
            tokens = self.tokens([encoded.maps[i] for i in distinct])[[distinct.index(i) for i in units]]
        written = embeddings.masked_scatter(mask.unsqueeze(-1), tokens.flatten(0, 1).to(embeddings))
        return args, {**kwargs, "inputs_embeds": written}

    def tokens(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps `(H, W, C)` each to spatial tokens `(maps, K, D)`."""
        patches = torch.stack([self._fitted(each, self.config.grid_size).flatten(0, 1) for each in maps])
        if patches.shape[-1] != self.config.vision_hidden_size:
            raise SpatialTokensError(
                f"the patch features have {patches.shape[-1]} channels, the projector's config says "
                f"{self.config.vision_hidden_size}; attach with vision_hidden_size of the former"
            )
        weight = next(self.projector.parameters())
        return self.projector(patches.to(device=weight.device, dtype=weight.dtype))  # type: ignore[no-any-return]

    def places(self, mask: torch.Tensor) -> Places:
        """Where the tokens go, row by row."""
        images = None if self.ids is None or self.ids.shape != mask.shape else self.ids == self.anatomy.image_token_id
        side_by_side = self.unit == "tile" and self.anatomy.family.tiles == "anyres"
        return find_places(mask, images, self.config.num_spatial_tokens, side_by_side=side_by_side)

    def _fitted(self, each: torch.Tensor, grid: Size) -> torch.Tensor:
        if tuple(each.shape[:2]) == tuple(grid):
            return each
        if self.resize is None:
            raise SpatialTokensError(
                f"an image has {each.shape[0]}x{each.shape[1]} patches, the projector's grid is {grid[0]}x{grid[1]}; attach with "
                "resize='pool' or 'interpolate', or with a config of that grid"
            )
        planes = each.movedim(-1, 0)[None]
        planes = (
            functional.adaptive_avg_pool2d(planes, grid)
            if self.resize == "pool"
            else functional.interpolate(planes, grid, mode="bilinear", antialias=True)
        )
        return planes[0].movedim(0, -1)

    def _mask(self, embeddings: torch.Tensor) -> torch.Tensor:
        if self.ids is not None and self.ids.shape == embeddings.shape[:2]:
            return self.ids == self.token_id
        token = self.anatomy.embeddings(torch.full((1,), self.token_id, device=embeddings.device))
        mask: torch.Tensor = (embeddings == token[0].to(embeddings)).all(-1)  # the caller embedded the ids
        return mask

    def _require_no_places(self, embeddings: torch.Tensor, cache: Any) -> None:
        if cache is not None and cache.get_seq_length() > 0:
            return  # drafted tokens may copy the prompt's slots; they are never accepted
        found = self._mask(embeddings).sum(1).tolist()
        row = next((row for row, count in enumerate(found) if count), None)
        if row is not None:
            raise SpatialTokensError(
                f"row {row} has {found[row]} places for spatial tokens, but no image was encoded in this call; give the images "
                "with their text (generate() separates them with prefill_chunk_size, and gives an assistant_model none)"
            )

    def _must_take_part(self) -> bool:
        """A batch without images must still give every parameter a gradient, of zeros: DDP and FSDP wait for it."""
        weights = self.projector.parameters()
        return self.projector.training and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)

    def _no_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        blank = embeddings.new_zeros(*self.config.grid_size, self.config.vision_hidden_size)
        own = self._own_without_images(embeddings)  # first, as in a batch with images: engines reduce gradients as they come
        return own + self.tokens([blank])[:, :0].sum().to(embeddings)

    def _own_without_images(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Zero, of what trains in the base's own projector."""
        if not self.modules_to_save:
            return embeddings.new_zeros(())
        tap: Any = self.anatomy.tap
        if isinstance(getattr(tap, "linear_1", None), nn.Linear):  # LLaVA's
            blank = torch.zeros(1, 1, tap.linear_1.in_features).to(tap.linear_1.weight)
            return tap(blank)[..., :0].sum().to(embeddings)  # type: ignore[no-any-return]
        trained = [each for each in tap.parameters() if each.requires_grad]
        return torch.stack([0 * each.sum() for each in trained]).sum() if trained else embeddings.new_zeros(())


def _nothing() -> None:
    pass


class _Around:
    """A method of a module, with something around it; it has the method's signature, which transformers reads."""

    def __init__(self, module: nn.Module, name: str, around: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
        self.module, self.name, self.around, self.before = module, name, around, module.__dict__.get(name)
        self.__signature__ = inspect.signature(getattr(module, name))
        self.names = [
            parameter.name
            for parameter in self.__signature__.parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes {len(self.names)} positional arguments at most, got {len(args)}")
        named = dict(zip(self.names[: len(args)], args, strict=True))
        return self.around(self._original, {**named, **kwargs})

    def _original(self, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(**kwargs)
        return getattr(type(self.module), self.name)(self.module, **kwargs)


class _Restore:
    """Gives an object the attribute that it had, or none; an object itself, so that it can be copied with the model."""

    def __init__(self, owner: Any, name: str, before: Any) -> None:
        self.owner, self.name, self.before = owner, name, before

    def __call__(self) -> None:
        delattr(self.owner, self.name)
        if self.before is not None:
            setattr(self.owner, self.name, self.before)


def _joined(outputs: Any, tokens: torch.Tensor) -> Any:
    """An encoder's outputs with each image's spatial tokens before its own."""
    own = outputs.pooler_output
    if len(own) != len(tokens):
        raise SpatialTokensError(f"the model gives {len(own)} images' tokens for {len(tokens)} maps; use mode='own'")
    if isinstance(own, torch.Tensor):
        outputs.pooler_output = torch.cat([tokens.to(own), own], dim=1)
    else:
        outputs.pooler_output = type(own)(torch.cat([ours.to(theirs), theirs]) for ours, theirs in zip(tokens, own, strict=True))
    deep = getattr(outputs, "deepstack_features", None)
    if deep is not None:
        outputs.deepstack_features = [_after_zeros(layer, tokens.shape[1], [len(each) for each in own]) for layer in deep]
    return outputs


def _after_zeros(layer: Any, count: int, lengths: list[int]) -> Any:
    """What an encoder's layer adds to the image tokens, with nothing for the `count` spatial tokens before each image."""
    images = torch.split(layer, lengths) if isinstance(layer, torch.Tensor) else layer
    joined = [torch.cat([each.new_zeros(count, each.shape[-1]), each]) for each in images]
    return torch.cat(joined) if isinstance(layer, torch.Tensor) else joined


def _thumbnails(maps: Maps, arguments: dict[str, Any], config: Any) -> Maps:
    """The first tile of each image."""
    counts = tiles_of(arguments, config)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    if sum(counts) != len(maps):
        raise SpatialTokensError(f"{len(maps)} tiles were encoded, but image_sizes tell of {sum(counts)}")
    return [maps[start] for start in starts]
