"""A processor that puts placeholders before every image.

The base's processor sees the caller's text alone, so all that it says of the text (offsets, masks of answers, what it cut off) is
its own. A mark of one character, which the tokenizer never sees, says where each image starts; placeholders are put into the tokens
there. Processors that put images before the text themselves leave no place for a mark: there, runs of image tokens tell.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from spatial_tokens.adapters.huggingface import placeholders
from spatial_tokens.adapters.huggingface.layouts import tiles_of
from spatial_tokens.adapters.huggingface.model_parts import ModelParts, tile_length_of
from spatial_tokens.adapters.huggingface.reserved_token import ReservedToken
from spatial_tokens.errors import SpatialTokensError, shown

TOKEN = "<|spatial|>"
PRIVATE_USE = range(0x10FFFD, 0x100000, -1)  # characters, of which the first that no text has is the mark
SANITIZE = "sanitize_control_tokens"  # an option of transformers 5.24:
SANITIZED = "\U000f0000"  # it puts this before a user's words that look like a token


@dataclass(frozen=True)
class Inserter:
    """How placeholders are put into what a processor returns.

    Args:
        token: The reserved token's text; None where image tokens are the placeholders.
        token_id: What marks a place in `input_ids`.
        count: Placeholders of an image (or tile), `K`.
        image_token: What stands for an image in a text.
        image_token_id: What stands for it in `input_ids`.
        opening_ids: Tokens that may stand right before it and belong to it, and
        openings: the same as text.
        pad_token_id: What pads.
        per_tile: Whether every tile has placeholders, and
        tile_length: how many image tokens it has; None where `image_sizes` and the model's
        config: tell how many tiles an image has.
    """

    token: str | None
    token_id: int
    count: int
    image_token: str
    image_token_id: int
    opening_ids: tuple[int, ...]
    openings: tuple[str, ...]
    pad_token_id: int
    per_tile: bool
    tile_length: int | None
    config: Any

    @property
    def pattern(self) -> re.Pattern[str]:
        """An image in a text."""
        opening = "|".join(re.escape(each) for each in self.openings)
        return re.compile(f"(?:{opening})?(?<!{SANITIZED}){re.escape(self.image_token)}")

    def check(self, texts: Sequence[str]) -> None:
        """Raises SpatialTokensError if a text holds what only this processor may write."""
        for row, text in enumerate(texts):
            if self.token is not None and re.search(f"(?<!{SANITIZED}){re.escape(self.token)}", text):
                raise SpatialTokensError(
                    f"text {row} holds {self.token!r}, which marks the places of spatial tokens; leave it out: the processor puts "
                    "it before every image"
                )

    def check_counts(self, texts: Sequence[str], images: Any) -> None:
        """Raises SpatialTokensError, naming the row, unless every image has its placeholder."""
        places = [len(self.pattern.findall(text)) for text in texts]
        given = _counts(images)
        if isinstance(given, list) and len(given) == len(places):
            for row, (place, image) in enumerate(zip(places, given, strict=True)):
                if place != image:
                    raise SpatialTokensError(f"text {row} has {self.image_token} {place} times for {image} images")
        total = sum(given) if isinstance(given, list) else given
        if sum(places) != total:
            raise SpatialTokensError(f"the texts have {self.image_token} {places} times, for {total} images in all")

    def at_runs(self, outputs: Any) -> list[placeholders.Runs]:
        """Before runs of image tokens: of an image, or of a tile."""
        rows = placeholders.rows_of(outputs["input_ids"])
        lengths = self.tile_length if self.per_tile else None
        count: int | list[int] = self.count
        if self.per_tile and self.tile_length is None:
            count = [self.count * tiles for tiles in tiles_of(outputs, self.config)]
        return placeholders.find_runs(rows, count, self.image_token_id, self.opening_ids, lengths)


class _Marks:
    """Where the marks of each text were, when it was ready to be tokenized, and what became of it.

    Args:
        mark: A character that is in none of the texts.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.marks: list[list[int]] = []
        self.texts: list[str] = []
        self.encoding: Any = None
        self.count: Callable[[str], int] = len  # tokens of a text
        self.left_truncated = False

    def take(self, texts: list[str]) -> list[str]:
        """The texts without their marks."""
        plain = [each.replace(self.mark, "") for each in texts]
        if any(self.mark in each for each in texts):
            self.marks, self.texts = [self.positions(each) for each in texts], plain
        return plain

    def positions(self, text: str) -> list[int]:
        """Where the marks of a text would be without them."""
        return [match.start() - number for number, match in enumerate(re.finditer(self.mark, text))]


class _MarkedTokenizer:
    """Mixed into the class of a tokenizer's copy for one call: it takes the marks out of the text."""

    _marks: _Marks

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str):
            text = self._marks.take([text])[0]
        elif isinstance(text, (list, tuple)) and all(isinstance(each, str) for each in text):
            text = self._marks.take(list(text))
        tokenize: Any = super().__call__  # type: ignore[misc]
        encoding = tokenize(text, *args, **kwargs)
        if self._marks.marks and self._marks.encoding is None:
            self._marks.encoding = encoding
            self._marks.left_truncated = getattr(self, "truncation_side", "right") == "left"
            sanitized = {SANITIZE: kwargs[SANITIZE]} if SANITIZE in kwargs else {}
            self._marks.count = lambda part: len(tokenize(part, add_special_tokens=False, **sanitized)["input_ids"])
        return encoding


class _MarkedReplacements:
    """Mixed into the class of a processor's copy for one call: where it says how it expands images, the text is the caller's."""

    _marks: _Marks

    def get_text_with_replacements(self, text: list[str], *args: Any, **kwargs: Any) -> Any:
        given = [self._marks.positions(each) for each in text]
        text, replacements = super().get_text_with_replacements(text, *args, **kwargs)  # type: ignore[misc]
        plain = self._marks.take(text)
        if not self._marks.marks:
            return plain, replacements
        for row, found in enumerate(replacements):
            for each in found:
                for name, marks in (("span", given[row]), ("new_span", self._marks.marks[row])):
                    starts = [place + number for number, place in enumerate(marks)]
                    each[name] = tuple(place - sum(start < place for start in starts) for place in each[name])
        return plain, replacements


class _SpatialProcessor:
    """Mixed into a processor's class: what it returns gets its placeholders."""

    _inserter: Inserter
    tokenizer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inserter, kind = self._inserter, type(self).__mro__[2]
        given = inspect.signature(kind.__call__).bind_partial(self, *args, **kwargs)
        text, images = given.arguments.get("text"), given.arguments.get("images")
        texts = [text] if isinstance(text, str) else [] if text is None else text
        if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
            raise SpatialTokensError(f"text must be a string or a list of strings, got {shown(text)}")
        inserter.check(texts)
        has_places = any(inserter.pattern.search(each) for each in texts)
        if not has_places and images is None:
            return kind.__call__(self, *args, **kwargs)
        if has_places:
            inserter.check_counts(texts, images)
        processor, marks = _for_one_call(self, texts)
        marked = [inserter.pattern.sub(lambda match: marks.mark + match[0], each) for each in texts]
        if text is not None:
            given.arguments["text"] = marked[0] if isinstance(text, str) else marked
        given.arguments["self"] = processor
        outputs = kind.__call__(*given.args, **given.kwargs)
        if outputs.get("input_ids") is None:
            return outputs
        padding, side, multiple = (_option(name, kwargs) for name in ("padding", "padding_side", "pad_to_multiple_of"))
        placeholders.insert_runs(
            outputs, self._runs(outputs, marks, images), inserter.token_id, inserter.pad_token_id,
            pad=padding not in (None, False, "do_not_pad"), padding_side=side or self.tokenizer.padding_side, multiple=multiple,
        )  # fmt: skip
        return outputs

    def _runs(self, outputs: Any, marks: _Marks, images: Any) -> list[placeholders.Runs]:
        """Where placeholders go."""
        inserter = self._inserter
        if marks.marks and not (inserter.per_tile and inserter.tile_length is not None):
            return _at_marks(marks, inserter, outputs)
        runs, given = inserter.at_runs(outputs), _counts(images)
        found, total = sum(map(len, runs)), sum(given) if isinstance(given, list) else given
        if not inserter.per_tile and found != total:
            raise SpatialTokensError(
                f"{total} images were given, {found} found in the text; write {inserter.image_token!r} where each goes"
            )
        return runs

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@cache
def _with(mixin: type, kind: Any) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _rebuild(kind: type) -> Any:
    return object.__new__(_with(_SpatialProcessor, kind))


def _for_one_call(processor: Any, texts: Sequence[str]) -> tuple[Any, _Marks]:
    """A shallow copy of a processor that takes these texts with marks, and what it notes of them."""
    from transformers import PreTrainedTokenizerBase

    used: set[str] = set().union(*texts)
    marks, kind = _Marks(next(each for each in map(chr, PRIVATE_USE) if each not in used)), type(processor).__mro__[2]
    processor = copy.copy(processor)
    processor._marks = marks
    processor.__class__ = _with(_MarkedReplacements, kind) if hasattr(kind, "get_text_with_replacements") else kind
    for name, each in vars(processor).items():
        if isinstance(each, PreTrainedTokenizerBase):
            tokenizer: Any = copy.copy(each)
            kind_of_tokenizer: Any = type(each)
            tokenizer.__class__ = _with(_MarkedTokenizer, kind_of_tokenizer)
            tokenizer._marks = marks if name == "tokenizer" else _Marks(marks.mark)
            setattr(processor, name, tokenizer)
    return processor, marks


def add_token(processor: Any, token: str | None) -> tuple[Any, int | None]:
    """A copy of a processor whose tokenizer knows the token, and the token's id; without a token, the copy alone.

    Raises:
        SpatialTokensError: If it has no tokenizer, or the token has another use in it.
    """
    if not hasattr(processor, "tokenizer"):
        raise SpatialTokensError(f"a processor with a tokenizer is expected, got a {type(processor).__name__}")
    processor = without_placeholders(copy.copy(processor))
    if token is None:
        return processor, None
    processor.tokenizer = tokenizer = copy.deepcopy(processor.tokenizer)
    others = {str(each) for each in tokenizer.added_tokens_decoder.values()} - {token}
    is_there = token in tokenizer.get_vocab()
    if (is_there and not _is_unused(processor, token)) or any(token in each or each in token for each in others):
        raise SpatialTokensError(
            f"{token!r} has a use of its own in the tokenizer, or is a part of a token that has; leave token out ({TOKEN!r})"
        )
    if not is_there:
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return processor, int(tokenizer.convert_tokens_to_ids(token))


def _is_unused(processor: Any, token: str) -> bool:
    """Whether a token of the vocabulary is a special one that was added, and that neither a name nor a chat template uses."""
    tokenizer = processor.tokenizer
    added = next((each for each in tokenizer.added_tokens_decoder.values() if str(each) == token), None)
    templates = [getattr(each, "chat_template", None) for each in (processor, tokenizer)]
    named = [value for name, value in vars(processor).items() if name.endswith("_token")]
    named += [value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)]
    if added is None or not added.special or token in map(str, named):
        return False
    return not any(token in str(each) for each in templates)


def placeholder_of(processor: Any) -> str | None:
    """What stands for an image in a text that a processor takes; None if there is no such token."""
    found = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    return None if found is None else str(found)


def reserved_id_of(processor: Any) -> int | None:
    """The reserved token that a processor puts before images; None if it puts none, or the image's own token."""
    inserter: Inserter | None = getattr(processor, "_inserter", None)
    return None if inserter is None or inserter.token is None else inserter.token_id


def with_placeholders(processor: Any, parts: ModelParts, token: ReservedToken, count: int, *, per_tile: bool) -> Any:
    """The processor, now inserting placeholders.

    Raises:
        SpatialTokensError: If it has no image token, its tokenizer is not a fast one, or placeholders for each tile are asked for
            and it does not say how many image tokens a tile has.
    """
    image_token = placeholder_of(processor)
    name, tokenizer = type(processor).__name__, processor.tokenizer
    if image_token is None:
        raise SpatialTokensError(
            f"{name} has no image_token to put placeholders before; attach without a processor, and use insert_placeholders()"
        )
    tile_length = tile_length_of(processor)
    by_sizes = parts.family.tiles == "anyres"
    if per_tile and not by_sizes and tile_length is None:
        raise SpatialTokensError(
            f"{name} does not say how many tokens a tile has; attach without it, and use insert_placeholders()"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SpatialTokensError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which is needed to find its tokens in a text; attach without "
            "a processor, and use insert_placeholders()"
        )
    openings = [str(each) for each in tokenizer.convert_ids_to_tokens(parts.opening_ids) if each is not None]
    inserter = Inserter(
        token=token.text or None,
        token_id=token.id,
        count=count,
        image_token=image_token,
        image_token_id=parts.image_token_id,
        opening_ids=tuple(parts.opening_ids),
        openings=tuple(each for each in openings if each != image_token),
        pad_token_id=tokenizer.pad_token_id or 0,
        per_tile=per_tile,
        tile_length=None if by_sizes else tile_length,
        config=parts.model.config if per_tile and by_sizes else None,
    )
    kind: type = type(processor)
    processor.__class__ = _with(_SpatialProcessor, kind)
    processor._inserter = inserter
    return processor


def without_placeholders(processor: Any) -> Any:
    """The processor's own class again; its tokenizer keeps the token."""
    if isinstance(processor, _SpatialProcessor):
        processor.__class__ = type(processor).__mro__[2]
        del processor._inserter
    return processor


def _at_marks(marks: _Marks, inserter: Inserter, outputs: Any) -> list[placeholders.Runs]:
    """Before the first token of each image: the first that starts at, or after, its mark.

    Raises:
        SpatialTokensError: If that was cut off.
    """
    encoding, of_image = marks.encoding, {inserter.image_token_id, *inserter.opening_ids}
    samples = encoding.get("overflow_to_sample_mapping")
    rows = placeholders.rows_of(encoding["input_ids"])
    numbers = range(len(rows)) if samples is None else [int(each) for each in samples]
    tiles = tiles_of(outputs, inserter.config) if inserter.per_tile else [1] * sum(map(len, marks.marks))
    made = []
    for row, text in enumerate(numbers):
        first, found = sum(map(len, marks.marks[:text])), []
        for number, place in enumerate(marks.marks[text], first):
            index = _token_at(marks, row, place, of_image) if encoding.encodings else _token_after(marks, row, place)
            if index is None and samples is None:
                raise SpatialTokensError(f"text {row} was cut off before one of its images; raise max_length")
            if index is not None:  # else it is in another part of a long text
                found.append((index, inserter.count * tiles[number]))
        made.append(found)
    return made


def _token_at(marks: _Marks, row: int, place: int, of_image: set[int]) -> int | None:
    encoding = marks.encoding
    index = encoding.char_to_token(row, place)
    if index is None:
        return None
    before = encoding.token_to_chars(row, index).start < place  # of another word, unless the image's token took a space before it
    return int(index) + (before and encoding.encodings[row].ids[index] not in of_image)


def _token_after(marks: _Marks, row: int, place: int) -> int | None:
    """Of an encoding that does not know where its tokens were, as with `sanitize_control_tokens`: the tokens before are counted."""
    text, mask = marks.texts[row], placeholders.rows_of(marks.encoding["attention_mask"])[row]
    kept, before = sum(mask), marks.count(text[:place])
    cut_off = marks.count(text) - kept if marks.left_truncated else 0
    index = before - cut_off
    return mask.index(1) + index if 0 <= index < kept else None


def _option(name: str, kwargs: dict[str, Any]) -> Any:
    """A tokenizer's option, as a processor takes it."""
    groups = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((group[name] for group in groups if group.get(name) is not None), None)


def _counts(images: Any) -> int | list[int]:
    """How many images: in each row, if they are given so, else in all."""
    if not isinstance(images, (list, tuple)):
        return _count(images)
    if any(isinstance(each, (list, tuple)) or each is None for each in images):
        return [sum(map(_count, each)) if isinstance(each, (list, tuple)) else _count(each) for each in images]
    return sum(map(_count, images))


def _count(image: Any) -> int:
    """One, or as many as an array of four dimensions has."""
    return 0 if image is None else len(image) if getattr(image, "ndim", 0) == 4 else 1
