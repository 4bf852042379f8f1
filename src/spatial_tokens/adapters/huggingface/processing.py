"""A processor that puts slots before every image: the text's image placeholder is preceded by the reserved token, K times."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from spatial_tokens.adapters.huggingface import slots
from spatial_tokens.adapters.huggingface.anatomy import Anatomy
from spatial_tokens.adapters.huggingface.features import tiles_of
from spatial_tokens.errors import SpatialTokensError, shown

TOKEN = "<|spatial|>"


@dataclass(frozen=True)
class SlotWriter:
    """How slots are written, into texts or into what a processor made of them.

    Args:
        token: The reserved token.
        token_id: Its id.
        count: Slots of an image (or tile), `K`.
        placeholder: What stands for an image in a text.
        image_token_id: What stands for it in `input_ids`.
        opening_ids: Tokens that may stand right before it and belong to it, and
        openings: the same as text.
        pad_token_id: What pads.
        as_image: Whether slots become image tokens in `input_ids`: spatial tokens ride among these.
        per_tile: Whether every tile has slots, and
        tile_length: how many image tokens it has; None where `image_sizes` and the model's
        config: tell how many tiles an image has.
    """

    token: str
    token_id: int
    count: int
    placeholder: str
    image_token_id: int
    opening_ids: tuple[int, ...]
    openings: tuple[str, ...]
    pad_token_id: int
    as_image: bool
    per_tile: bool
    tile_length: int | None
    config: Any

    @property
    def pattern(self) -> re.Pattern[str]:
        """Slots, if any, and the image that they belong to."""
        opening = "|".join(re.escape(each) for each in self.openings)
        return re.compile(f"((?:{re.escape(self.token)})*)((?:{opening})?{re.escape(self.placeholder)})")

    def write(self, texts: Sequence[str]) -> list[str]:
        """The texts with exactly K slots before each placeholder, and none elsewhere; what is there already stays.

        Raises:
            SpatialTokensError: If one has slots elsewhere, or another number of them.
        """
        run, written = self.token * self.count, []
        for row, text in enumerate(texts):
            found = self.pattern.findall(text)
            in_place = "".join(there for there, _ in found).count(self.token)
            if any(there not in ("", run) for there, _ in found) or text.count(self.token) != in_place:
                raise SpatialTokensError(
                    f"text {row} has {self.token}, but not {self.count} times before an image {self.placeholder}; leave it out"
                )
            written.append(self.pattern.sub(lambda match: run + match[2], text))
        return written

    def insert(self, outputs: Any) -> Any:
        """A processor's outputs with slots before the image tokens."""
        if not isinstance(outputs["input_ids"], torch.Tensor):
            raise SpatialTokensError("slots are put into tensors here; give return_tensors='pt'")
        count: int | list[int] = self.count
        if self.per_tile and self.tile_length is None:
            count = [self.count * tiles for tiles in tiles_of(outputs, self.config)]
        made = slots.insert(
            outputs, token_id=self.token_id, count=count, image_token_id=self.image_token_id, opening_ids=self.opening_ids,
            tokens_per_image=self.tile_length if self.per_tile else None, pad_token_id=self.pad_token_id,
        )  # fmt: skip
        outputs.update(made)
        return outputs

    def check_counts(self, texts: Sequence[str], images: Any) -> None:
        """Raises SpatialTokensError, naming the row, unless every image has its placeholder."""
        places = [len(self.pattern.findall(text)) for text in texts]
        given = _counts(images)
        if isinstance(given, list) and len(given) == len(places):
            for row, (place, image) in enumerate(zip(places, given, strict=True)):
                if place != image:
                    raise SpatialTokensError(f"text {row} has {self.placeholder} {place} times for {image} images")
        total = sum(given) if isinstance(given, list) else given
        if sum(places) != total:
            raise SpatialTokensError(f"the texts have {self.placeholder} {places} times, for {total} images in all")


class _SpatialProcessor:
    """Mixed into a processor's class: the text gets its slots before the processor sees it, or the ids after."""

    _slot_writer: SlotWriter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        writer, call = self._slot_writer, super().__call__  # type: ignore[misc]
        given = inspect.signature(call).bind_partial(*args, **kwargs)
        text, images = given.arguments.get("text"), given.arguments.get("images")
        if text is None:
            return call(*args, **kwargs)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
            raise SpatialTokensError(f"text must be a string or a list of strings, got {shown(text)}")
        has_places = any(writer.placeholder in each for each in texts)
        if has_places:
            writer.check_counts(texts, images)
        if has_places and not writer.per_tile:
            written = writer.write(texts)
            given.arguments["text"] = written[0] if isinstance(text, str) else written
        outputs = call(*given.args, **given.kwargs)
        if images is not None and (writer.per_tile or not has_places):  # some processors put images before the text themselves
            if not has_places and not (torch.as_tensor(outputs["input_ids"]) == writer.image_token_id).any():
                raise SpatialTokensError(f"images were given, but no text has {writer.placeholder!r}; write it where an image goes")
            outputs = writer.insert(outputs)
        if writer.as_image:
            outputs["input_ids"] = _replaced(outputs["input_ids"], writer.token_id, writer.image_token_id)
        return outputs

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@cache
def _with_slots(kind: type) -> type:
    return type(kind.__name__, (_SpatialProcessor, kind), {"__module__": kind.__module__})


def _rebuild(kind: type) -> Any:
    return object.__new__(_with_slots(kind))


def add_token(processor: Any, token: str) -> tuple[Any, int]:
    """A copy of a processor whose tokenizer knows the token, and the token's id.

    Raises:
        SpatialTokensError: If it has no tokenizer.
    """
    if not hasattr(processor, "tokenizer"):
        raise SpatialTokensError(f"a processor with a tokenizer is expected, got a {type(processor).__name__}")
    processor = without_slots(copy.copy(processor))
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    if token not in processor.tokenizer.get_vocab():
        processor.tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return processor, int(processor.tokenizer.convert_tokens_to_ids(token))


def placeholder_of(processor: Any) -> str | None:
    """What stands for an image in a text that a processor takes; None if there is no such token."""
    found = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    return None if found is None else str(found)


def slot_id_of(processor: Any) -> int | None:
    """The reserved token that a processor puts before images; None if it puts none, or the image's own token."""
    writer: SlotWriter | None = getattr(processor, "_slot_writer", None)
    return None if writer is None or writer.as_image else writer.token_id


def with_slots(processor: Any, anatomy: Anatomy, token: str, token_id: int, count: int, *, as_image: bool, per_tile: bool) -> Any:
    """The processor, now inserting slots.

    Raises:
        SpatialTokensError: If it has no placeholder for an image, or slots for each tile are asked for and it does not say how
            many image tokens a tile has.
    """
    placeholder = placeholder_of(processor)
    if placeholder is None:
        raise SpatialTokensError(
            f"{type(processor).__name__} has no image_token to put slots before; attach without a processor, and use insert_slots()"
        )
    tile_length = getattr(processor, "image_seq_length", None) or getattr(processor, "image_seq_len", None)
    by_sizes = anatomy.family.tiles == "anyres"
    if per_tile and not by_sizes and tile_length is None:
        raise SpatialTokensError(
            f"{type(processor).__name__} does not say how many tokens a tile has; attach without it, and use insert_slots()"
        )
    tokenizer = processor.tokenizer
    openings = [str(each) for each in tokenizer.convert_ids_to_tokens(anatomy.opening_ids) if each is not None]
    writer = SlotWriter(
        token=token,
        token_id=token_id,
        count=count,
        placeholder=placeholder,
        image_token_id=anatomy.image_token_id,
        opening_ids=tuple(anatomy.opening_ids),
        openings=tuple(each for each in openings if each != placeholder),
        pad_token_id=tokenizer.pad_token_id or 0,
        as_image=as_image,
        per_tile=per_tile,
        tile_length=None if by_sizes else tile_length,
        config=anatomy.model.config if per_tile and by_sizes else None,
    )
    kind: type = type(processor)
    processor.__class__ = _with_slots(kind)
    processor._slot_writer = writer
    return processor


def without_slots(processor: Any) -> Any:
    """The processor's own class again; its tokenizer keeps the token."""
    if isinstance(processor, _SpatialProcessor):
        processor.__class__ = type(processor).__mro__[2]
        del processor._slot_writer
    return processor


def _counts(images: Any) -> int | list[int]:
    """How many images: in each row, if they are given so, else in all."""
    if images is None:
        return 0
    if not isinstance(images, (list, tuple)):
        return len(images) if getattr(images, "ndim", 0) == 4 else 1
    if any(isinstance(each, (list, tuple)) or each is None for each in images):
        return [len(each) if isinstance(each, (list, tuple)) else int(each is not None) for each in images]
    return len(images)


def _replaced(ids: Any, old: int, new: int) -> Any:
    if isinstance(ids, torch.Tensor):
        return ids.masked_fill(ids == old, new)
    if isinstance(ids, list):
        return [_replaced(each, old, new) for each in ids]
    if isinstance(ids, int):
        return new if ids == old else ids
    ids = ids.copy()  # numpy
    ids[ids == old] = new
    return ids
