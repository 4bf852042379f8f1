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

from spatial_tokens.errors import SpatialTokensError, shown

TOKEN = "<|spatial|>"


@dataclass(frozen=True)
class SlotText:
    """How slots are written into a text.

    Args:
        token: The reserved token.
        token_id: Its id.
        count: Slots of an image, `K`.
        placeholder: What stands for an image in a text.
        openings: Tokens that may stand right before it and belong to it.
        image_token_id: What the slots become in `input_ids` where spatial tokens ride among the image tokens; else None.
    """

    token: str
    token_id: int
    count: int
    placeholder: str
    openings: tuple[str, ...]
    image_token_id: int | None

    def insert(self, text: str) -> str:
        """The text with exactly K slots before each placeholder, and none elsewhere; what is there already stays.

        Raises:
            SpatialTokensError: If it has slots elsewhere, or another number of them.
        """
        opening = "|".join(re.escape(each) for each in self.openings)
        token = re.escape(self.token)
        pattern = re.compile(
            f"((?:{token})*)((?:{opening})?{re.escape(self.placeholder)})"
            if opening
            else f"((?:{token})*)({re.escape(self.placeholder)})"
        )
        slots = self.token * self.count
        if any(match[1] not in ("", slots) for match in pattern.finditer(text)):
            raise SpatialTokensError(f"the text has {self.token} before an image, but not {self.count} times; leave it out")
        written = pattern.sub(lambda match: slots + match[2], text)
        if written.count(self.token) != self.count * len(pattern.findall(text)):
            raise SpatialTokensError(f"the text has {self.token} where no image {self.placeholder} follows; leave it out")
        return written


class _SpatialProcessor:
    """Mixed into a processor's class: the text gets its slots before the processor sees it."""

    _slot_text: SlotText

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        given = inspect.signature(call).bind_partial(*args, **kwargs)
        if given.arguments.get("text") is not None:
            given.arguments["text"] = self._with_slots(given.arguments["text"], given.arguments.get("images"))
        outputs = call(*given.args, **given.kwargs)
        if self._slot_text.image_token_id is not None and "input_ids" in outputs:
            outputs["input_ids"] = _replaced(outputs["input_ids"], self._slot_text.token_id, self._slot_text.image_token_id)
        return outputs

    def _with_slots(self, text: Any, images: Any) -> Any:
        if isinstance(text, str):
            return self._with_slots([text], images)[0]
        if not isinstance(text, Sequence) or not all(isinstance(each, str) for each in text):
            raise SpatialTokensError(f"text must be a string or a list of strings, got {shown(text)}")
        slots = self._slot_text
        if (
            images is not None
            and len(images if isinstance(images, (list, tuple)) else [images])
            and not any(slots.placeholder in each for each in text)
        ):
            raise SpatialTokensError(
                f"images were given, but no text has the placeholder {slots.placeholder!r}; write it where the image goes"
            )
        return [slots.insert(each) for each in text]

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@cache
def _with_slots(kind: type) -> type:
    return type(kind.__name__, (_SpatialProcessor, kind), {"__module__": kind.__module__})


def _rebuild(kind: type) -> Any:
    return object.__new__(_with_slots(kind))


def add_token(processor: Any, token: str) -> tuple[Any, int]:
    """A copy of a processor (or tokenizer) whose tokenizer knows the token, and the token's id."""
    processor = copy.copy(processor)
    tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    if hasattr(processor, "tokenizer"):
        processor.tokenizer = tokenizer
    else:
        processor = tokenizer
    return processor, int(tokenizer.convert_tokens_to_ids(token))


def with_slots(processor: Any, token: str, token_id: int, count: int, config: Any, *, as_image: bool) -> Any:
    """The processor, now inserting slots.

    Raises:
        SpatialTokensError: If it has no placeholder for an image.
    """
    placeholder = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if placeholder is None:
        raise SpatialTokensError(
            f"{type(processor).__name__} has no image_token to put slots before; attach without a processor, and use insert_slots()"
        )
    tokenizer = processor.tokenizer
    names = opening_ids(config)
    openings = tuple(
        str(each) for each in tokenizer.convert_ids_to_tokens(names) if each is not None and str(each) != str(placeholder)
    )
    kind: type = type(processor)
    processor.__class__ = _with_slots(kind)
    processor._slot_text = SlotText(
        token, token_id, count, str(placeholder), openings, config_image_id(config) if as_image else None
    )
    return processor


def without_slots(processor: Any) -> Any:
    """The processor's own class again; its tokenizer keeps the token."""
    if isinstance(processor, _SpatialProcessor):
        processor.__class__ = type(processor).__mro__[2]
        del processor._slot_text
    return processor


def opening_ids(config: Any) -> list[int]:
    """Tokens that open an image, by a model's config."""
    names = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    return [found for name in names if isinstance(found := getattr(config, name, None), int)]


def config_image_id(config: Any) -> int:
    """The image placeholder's id."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


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
