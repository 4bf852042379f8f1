"""The hooks that put spatial tokens into a model that does not know of them. Nothing of a call is kept on the model.

What runs when, in one call of an attached model (`mode="own"`):

| when | hook | reads | leaves |
|---|---|---|---|
| around `generate` | `generate` | the prompt | a `Call` that knows the prompt's placeholders; a prompt without the reserved token |
| before the model | `mask_labels` | `labels` | labels of -100 at placeholders |
| around the base model | `run_base` | `input_ids`, encodings | a `Call`, until it ends; `input_ids` without the reserved token |
| around `get_image_features` | `encode` | what was recorded in it | `Call.features`, on the outputs too: `generate` encodes first |
| before the model's projector | `record` | its input | the patch features |
| after the model's projector | `count` | its output | how many image tokens they became |
| before the language model | `scatter_tokens` | `Call.features`, the placeholders | spatial tokens in `inputs_embeds` |

Where the caller looks up word embeddings himself, `mask_ids` and `mark_embeddings` give placeholders a row that no other token has.
With `mode="image"` tokens are joined to what `get_image_features` returns; `scatter_tokens` only lets a batch without images train.

A `Call` is kept in an object per thread (`PerThread`). torch.compile cannot trace a `ContextVar`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from spatial_tokens.adapters.huggingface.around import Around
from spatial_tokens.adapters.huggingface.call import Call, Features, PerThread, Recording, is_ids, length_of
from spatial_tokens.adapters.huggingface.layouts import joined, maps_of, thumbnails, tiles_of
from spatial_tokens.adapters.huggingface.maps_to_tokens import MapsToTokens, Resize
from spatial_tokens.adapters.huggingface.model_parts import ModelParts
from spatial_tokens.adapters.huggingface.placeholders import IGNORED, WRAP, Places, count_without_placeholders, find_places
from spatial_tokens.adapters.huggingface.reserved_token import PromptStreamer, ReservedToken, with_prompt
from spatial_tokens.adapters.huggingface.training_warnings import TrainingWarnings
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.modules import SPProjector

Mode = Literal["own", "image"]
Unit = Literal["image", "tile"]
NAME = "spatial_tokens"  # of the projector in the model
FEATURES_ATTRIBUTE = "_spatial_features"  # on what get_image_features returns: generate() encodes images before it calls the model


class Attachment:
    """What `attach` leaves in a model. Its methods are the hooks, so that a deep copy of the model has a copy of its own.

    Args:
        parts: The model's parts.
        projector: The spatial tokens' own.
        token: The reserved token; the image token in mode "image".
        mode: "own": the places are of a token of ours; "image": of the model's own image token.
        unit: Spatial tokens for each "image" (of tiles: for its thumbnail) or for each "tile".
        resize: How maps of another size are brought to the projector's grid; None: they are refused, or read as they are by a
            projector of any grid.
        is_new: Whether the projector's weights are random.
    """

    def __init__(
        self, parts: ModelParts, projector: SPProjector, token: ReservedToken, mode: Mode, unit: Unit, resize: Resize | None,
        *, is_new: bool,
    ) -> None:  # fmt: skip
        self.parts, self.token, self.mode, self.unit, self.resize = parts, token, mode, unit, resize
        self.num_spatial_tokens = projector.num_spatial_tokens
        self.to_tokens = MapsToTokens.of(projector, resize)
        self.modules_to_save: list[str] = []  # the base's own modules that train, and are saved, with the spatial tokens
        self.undo: list[Callable[[], Any]] = []  # in order; called from the last to the first
        self.training_warnings = TrainingWarnings(projector, is_new=is_new)
        self.threads = PerThread()

    @property
    def token_id(self) -> int:
        """What marks the places in `input_ids`."""
        return self.token.id

    @property
    def projector(self) -> nn.Module:
        """Looked up at every use: another library may have wrapped it."""
        return getattr(self.parts.model, NAME)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy for a copy of the model; a part of it that is copied alone (PEFT's modules_to_save) keeps the model's hooks."""
        if id(self.parts.model) not in memo:
            return self
        memo[id(self)] = made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def install(self) -> None:
        """Registers the hooks."""
        base, tap, model = self.parts.base, self.parts.projector, self.parts.model
        hooks = [
            tap.register_forward_pre_hook(self.record, with_kwargs=True),
            tap.register_forward_hook(self.count),
            base.register_forward_pre_hook(self.refuse_replicas),
            model.register_state_dict_post_hook(partial(self.leave_out)),  # type: ignore[no-untyped-call]  # it sets an attribute
            self.parts.language_model.register_forward_pre_hook(self.scatter_tokens, with_kwargs=True),
        ]
        around = {
            (base, "forward"): self.run_base,
            (base, "get_image_features"): self.encode,
            (base, "get_video_features"): self.encode_video,
            (model, "save_pretrained"): self.save_base,
        }
        if self.mode == "own":
            hooks += [
                model.register_forward_pre_hook(self.mask_labels, with_kwargs=True),
                self.parts.embeddings.register_forward_pre_hook(self.mask_ids),
                self.parts.embeddings.register_forward_hook(self.mark_embeddings),
            ]
            around[(model, "generate")] = self.generate
        self.undo += [hook.remove for hook in hooks]
        for (owner, name), method in around.items():
            if hasattr(owner, name):
                self.replace(owner, name, Around(owner, name, method))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, until `remove`."""
        before = vars(owner).get(name)
        setattr(owner, name, value)
        self.undo.append(partial(delattr, owner, name) if before is None else partial(setattr, owner, name, before))

    def remove(self) -> None:
        """Undoes everything."""
        while self.undo:
            self.undo.pop()()

    def save_base(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `save_pretrained`: the base alone is written, as it was."""
        current, given = self.threads.current, arguments.get("state_dict")
        given = self.parts.model.state_dict() if given is None else given
        arguments["state_dict"] = {name: each for name, each in given.items() if not name.startswith(f"{NAME}.")}
        current.saving_base = True
        try:
            return original(**arguments)
        finally:
            current.saving_base = False

    def leave_out(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """After the model's `state_dict`, which transformers asks for itself when it saves a quantized base."""
        if self.threads.current.saving_base:
            for name in [name for name in state if name.startswith(f"{prefix}{NAME}.")]:
                del state[name]

    # generate

    def generate(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `generate`, which sees ids of the base's vocabulary alone: for penalties, drafts and assistants as without us."""
        current, call = self.threads.current, Call(generating=True)
        before = current.call
        names = [name for name in ("input_ids", "inputs", "negative_prompt_ids") if is_ids(arguments.get(name))]
        hidden = {name: self.token.hidden(arguments[name]) for name in names}
        name = next((name for name in ("input_ids", "inputs") if name in hidden), None)
        ids: Any = None if name is None else arguments[name]
        if ids is not None:
            cached, mask = length_of(arguments.get("past_key_values")), arguments.get("attention_mask")
            is_new = cached >= ids.shape[1] if mask is None else mask.shape[-1] == cached + ids.shape[1]
            call.start = cached if is_new else 0  # a prompt follows what was cached, or holds it
            if arguments.get("inputs_embeds") is None:
                call.placeholders = (ids == self.token.id).cpu()
            if arguments.get("streamer") is not None:
                arguments = {**arguments, "streamer": PromptStreamer(arguments["streamer"], ids)}
        arguments = {**arguments, **hidden}
        arguments["logits_processor"] = self.token.never_generated(arguments.get("logits_processor"))
        current.call = call
        try:
            made = original(**arguments)
        finally:
            current.call = before
        return made if name is None else with_prompt(made, arguments[name], ids)

    # One call of the model

    def mask_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: a placeholder is not a target, and is not counted as one."""
        labels = kwargs.get("labels")
        if not isinstance(labels, torch.Tensor):
            return None
        mask = labels == self.token.id
        replaced = {"labels": labels.masked_fill(mask, IGNORED)}
        if kwargs.get("num_items_in_batch") is not None:
            replaced["num_items_in_batch"] = count_without_placeholders(kwargs["num_items_in_batch"], labels, mask)
        elif "fused_lm_head" in kwargs and bool(mask.any()):  # TRL divides by a count that the model does not see
            raise SpatialTokensError(f"labels of placeholders of spatial tokens are not -100, but TRL counts them; {WRAP}")
        return args, {**kwargs, **replaced}

    def refuse_replicas(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the base model: `nn.DataParallel` copies modules, but not what the hooks know of them."""
        if getattr(module, "_is_replica", False):
            raise SpatialTokensError("nn.DataParallel copies modules but not their hooks; use DistributedDataParallel")

    def run_base(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around the base model's forward: a new call; `input_ids` without the reserved token.

        Raises:
            SpatialTokensError: If the language model did not take what was encoded.
        """
        current = self.threads.current
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.training_warnings.check(self.projector)
        outer = current.call
        call = Call(outer if outer is not None and outer.generating else None)
        ids = arguments.get("input_ids")
        ids = ids if is_ids(ids) else None
        if call.generate is not None and ids is not None and ids.shape[1] > 1 and self._has_placeholders(ids):
            call.generate = None  # generate() was given others: somebody calls the model while it generates
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        call.features = getattr(encoded, FEATURES_ATTRIBUTE, None)
        if call.generate is not None and encoded is not None:  # accelerate copies it, without what is carried on it
            call.features, call.generate.features = call.features or call.generate.features, None
        call.input_ids = ids
        if ids is not None and call.generate is None and self.mode == "own":
            call.placeholders = ids == self.token.id
            arguments = {**arguments, "input_ids": self.token.hidden(ids)}
        try:
            current.call = call
            outputs = original(**arguments)
        finally:
            current.call = outer
        if call.features is not None:
            raise SpatialTokensError(
                "images were encoded, but the language model that attach() found was not called: it was replaced; detach and "
                "attach again"
            )
        return outputs

    def encode(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `get_image_features`: keeps the patches, or joins their tokens with the image's."""
        current, recording = self.threads.current, Recording()
        if current.in_video:
            return original(**arguments)
        current.recording = recording
        try:
            outputs = original(**arguments)
        finally:
            current.recording = None
        if not recording.inputs:
            path = self.parts.projector_path
            raise SpatialTokensError(f"the {path} that attach() found was not called: it was replaced; detach and attach again")
        maps = maps_of(self.parts.family.layout, recording.inputs, arguments, self.parts.vision_config)
        if self.parts.family.tiles == "anyres" and self.unit == "image":
            maps = thumbnails(maps, tiles_of(arguments, self.parts.model.config))
        if self.mode == "image":
            if current.call is not None:
                current.call.filled = True
            return joined(outputs, self.tokens(maps))
        features = Features(maps, recording.num_tokens // max(1, len(maps)))
        if current.call is not None:
            current.call.features = features
        if not isinstance(outputs, (tuple, list, torch.Tensor)):
            setattr(outputs, FEATURES_ATTRIBUTE, features)
        return outputs

    def encode_video(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Around `get_video_features`, which in some families calls `get_image_features`: frames are left alone."""
        current = self.threads.current
        current.in_video = True
        try:
            return original(**arguments)
        finally:
            current.in_video = False

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's projector: records its input."""
        current = self.threads.current
        if current.recording is None and not (self.parts.family.own_generate and current.call is not None):
            return
        inputs = patches_in(args, kwargs)
        if current.recording is not None:
            current.recording.inputs.append(inputs)
        elif current.call is not None:
            current.call.features = Features(maps_of(self.parts.family.layout, [inputs], {}, self.parts.vision_config), 0)

    def count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's projector: counts the tokens that it returned."""
        recording = self.threads.current.recording
        if recording is not None and isinstance(output, torch.Tensor):
            recording.num_tokens += output.numel() // output.shape[-1]

    def scatter_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: spatial tokens in their places."""
        embeddings, call = kwargs.get("inputs_embeds"), self.threads.current.call
        if embeddings is None:
            ids: Any = kwargs.get("input_ids", args[0] if args else None)
            if call is None and self.mode == "own" and is_ids(ids) and self._has_placeholders(ids):
                raise SpatialTokensError("input_ids have places for spatial tokens; call the whole model, not its language model")
            return None
        call = call or Call()
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # of that name before transformers 5.24
        features, call.features = call.features, None
        if features is None:
            if self.mode == "own":
                self._require_no_places(call, embeddings, cache)
            if call.filled or not self._must_take_part():
                return None
            return args, {**kwargs, "inputs_embeds": embeddings + self._no_tokens(embeddings)}
        mask = self._mask(call, embeddings, cache)
        for each in (call, call.generate):
            if each is not None:
                each.filled = True
        if torch.compiler.is_compiling():
            tokens = self.tokens(features.maps)
            places = len(features.maps) * self.num_spatial_tokens
            torch._assert_async(mask.sum() == places, "not as many places for spatial tokens as maps of patches")
        else:
            tiles = self.parts.family.tiles if self.unit == "image" else None
            found = self._places(call, mask).units(len(features.maps), tiles if tiles != "anyres" else None, features.tile_length)
            distinct = sorted(set(found))
            if not distinct:
                return None
            tokens = self.tokens([features.maps[i] for i in distinct])[[distinct.index(i) for i in found]]
        written = embeddings.masked_scatter(mask.unsqueeze(-1), tokens.flatten(0, 1).to(embeddings))
        return args, {**kwargs, "inputs_embeds": written}

    def mask_ids(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the word embeddings, where the caller looks ids up himself: the reserved token has no row."""
        current = self.threads.current
        current.marked = None
        if current.call is not None or not args or not is_ids(args[0], dimensions=None):
            return None
        current.marked = args[0] == self.token.id
        return (self.token.hidden(args[0]), *args[1:])

    def mark_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        """After them: the placeholders' rows, by which `scatter_tokens` finds them."""
        current = self.threads.current
        marked, current.marked = current.marked, None
        return None if marked is None else torch.where(marked.unsqueeze(-1), self.token.row.to(output), output)

    # The tokens and their places

    def tokens(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps `(H, W, C)` each to spatial tokens `(maps, K, D)`."""
        return self.to_tokens(self.projector, maps)

    def _mask(self, call: Call, embeddings: torch.Tensor, cache: Any) -> torch.Tensor:
        """Where the placeholders are in a sequence `(B, L)`."""
        if call.generate is not None and call.generate.placeholders is not None:
            if call.input_ids is None and embeddings.shape[1] > call.generate.placeholders.shape[1]:
                raise SpatialTokensError("generate() with virtual tokens before the prompt (prompt tuning) is not supported")
            seen = 0 if call.generating else length_of(cache)
            return call.generate.part_of_prompt(embeddings.shape[0], seen, embeddings.shape[1]).to(embeddings.device)
        if call.placeholders is not None and call.placeholders.shape == embeddings.shape[:2]:
            return call.placeholders
        return (embeddings == self.token.row.to(embeddings)).all(-1)  # the caller embedded the ids

    def _places(self, call: Call, mask: torch.Tensor) -> Places:
        """Where the tokens go, row by row."""
        ids = call.input_ids
        images = None if ids is None or ids.shape != mask.shape else ids == self.parts.image_token_id
        side_by_side = self.unit == "tile" and self.parts.family.tiles == "anyres"
        return find_places(mask, images, self.num_spatial_tokens, side_by_side=side_by_side)

    def _has_placeholders(self, ids: torch.Tensor) -> bool:
        return not torch.compiler.is_compiling() and bool((ids == self.token.id).any())

    def _require_no_places(self, call: Call, embeddings: torch.Tensor, cache: Any) -> None:
        """Raises SpatialTokensError if there are placeholders in a sequence; it does not look at the single tokens of a loop."""
        length, generate = embeddings.shape[1], call.generate
        if generate is not None and (generate.filled or generate.placeholders is None):
            return
        if torch.compiler.is_compiling():
            if call.placeholders is not None:
                torch._assert_async(~call.placeholders.any(), "places for spatial tokens, but no image was encoded in this call")
            return
        if length == 1 and generate is None:
            return
        found = self._mask(call, embeddings, cache).sum(1).tolist()
        if generate is not None and generate.placeholders is not None:
            seen = length_of(cache) - generate.start
            generate.filled = seen + length >= generate.placeholders.shape[1]  # nothing of the prompt is left to look at
        row = next((row for row, count in enumerate(found) if count), None)
        if row is not None:
            raise SpatialTokensError(
                f"row {row} has {found[row]} places for spatial tokens, but no image was encoded in this call; give the images "
                "with their text (generate() separates them with prefill_chunk_size)"
            )

    # Training

    def _must_take_part(self) -> bool:
        """A batch without images must still give every parameter a gradient, of zeros: DDP and FSDP wait for it."""
        weights = self.projector.parameters()
        return self.projector.training and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)

    def _no_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        weight = next(self.projector.parameters())
        channels = self.to_tokens.vision_hidden_size or self.parts.vision_hidden_size or weight.shape[-1]
        blank = embeddings.new_zeros(*(self.to_tokens.grid_size or self.parts.grid_size or (1, 1)), channels)
        own = self.parts.zero(embeddings) if self.modules_to_save else 0  # first, as with images: engines reduce as they come
        return own + self.tokens([blank])[:, :0].sum().to(embeddings)


def patches_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The patch features, among what a model's projector is called with."""
    return kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else (*args, *kwargs.values())[0]  # type: ignore[no-any-return]
