"""A processor that puts placeholders before every image.

The base's processor sees the caller's text alone, so all that it says of the text (offsets, masks of answers, what it cut off) is
its own. A mark of one character, which the tokenizer never sees, says where each image starts; placeholders are put into the tokens
there. Processors that put images before the text themselves leave no place for a mark: there, runs of image tokens tell.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from spatial_tokens.adapters.huggingface import placeholders
from spatial_tokens.adapters.huggingface.layouts import tiles_of
from spatial_tokens.adapters.huggingface.model_parts import ModelParts
from spatial_tokens.adapters.huggingface.reserved_token import ReservedToken
from spatial_tokens.errors import SpatialTokensError, shown

TOKEN = "<|spatial|>"
MARK = "\U0010fffd"  # the last character for private use
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
            for word in filter(None, (self.token, MARK)):
                if re.search(f"(?<!{SANITIZED}){re.escape(word)}", text):
                    raise SpatialTokensError(
                        f"text {row} holds {word!r}, which marks the places of spatial tokens; leave it out: the processor puts "
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


class _Noted:
    """Where the marks of each text were, when it was ready to be tokenized, and what became of it."""

    def __init__(self) -> None:
        self.marks: list[list[int]] = []
        self.texts: list[str] = []
        self.encoding: Any = None
        self.count: Callable[[str], int] = len  # tokens of a text
        self.left_truncated = False

    def take(self, texts: list[str]) -> list[str]:
        """The texts without their marks."""
        plain = [each.replace(MARK, "") for each in texts]
        if any(MARK in each for each in texts):
            self.marks, self.texts = [_positions(each) for each in texts], plain
        return plain


class _MarkedTokenizer:
    """Mixed into the class of a tokenizer's copy for one call: it takes the marks out of the text."""

    _noted: _Noted

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str):
            text = self._noted.take([text])[0]
        elif isinstance(text, (list, tuple)) and all(isinstance(each, str) for each in text):
            text = self._noted.take(list(text))
        tokenize: Any = super().__call__  # type: ignore[misc]
        encoding = tokenize(text, *args, **kwargs)
        if self._noted.marks and self._noted.encoding is None:
            self._noted.encoding = encoding
            self._noted.left_truncated = getattr(self, "truncation_side", "right") == "left"
            self._noted.count = lambda part: len(tokenize(part, add_special_tokens=False, **_only(SANITIZE, kwargs))["input_ids"])
        return encoding


class _MarkedReplacements:
    """Mixed into the class of a processor's copy for one call: where it says how it expands images, the text is the caller's."""

    _noted: _Noted

    def get_text_with_replacements(self, text: list[str], *args: Any, **kwargs: Any) -> Any:
        given = [_positions(each) for each in text]
        text, replacements = super().get_text_with_replacements(text, *args, **kwargs)  # type: ignore[misc]
        plain = self._noted.take(text)
        for row, found in enumerate(replacements):
            for each in found:
                for name, marks in (("span", given[row]), ("new_span", self._noted.marks[row])):
                    starts = [place + number for number, place in enumerate(marks)]
                    each[name] = tuple(place - sum(start < place for start in starts) for place in each[name])
        return plain, replacements


class _SpatialProcessor:
    """Mixed into a processor's class: what it returns gets its placeholders."""

    _inserter: Inserter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inserter, kind = self._inserter, type(self).__mro__[2]
        given = inspect.signature(kind.__call__).bind_partial(self, *args, **kwargs)
        text, images = given.arguments.get("text"), given.arguments.get("images")
        if text is None:
            return kind.__call__(self, *args, **kwargs)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
            raise SpatialTokensError(f"text must be a string or a list of strings, got {shown(text)}")
        inserter.check(texts)
        has_places = any(inserter.pattern.search(each) for each in texts)
        if not has_places and images is None:
            return kind.__call__(self, *args, **kwargs)
        if has_places:
            inserter.check_counts(texts, images)
        processor, noted = _for_one_call(self)
        marked = [inserter.pattern.sub(lambda match: MARK + match[0], each) for each in texts]
        given.arguments["text"] = marked[0] if isinstance(text, str) else marked
        given.arguments["self"] = processor
        outputs = kind.__call__(*given.args, **given.kwargs)
        if not any(inserter.image_token_id in row for row in placeholders.rows_of(outputs["input_ids"])):
            raise SpatialTokensError(f"images were given, but no text has {inserter.image_token!r}; write it where an image goes")
        runs = _at_marks(noted, inserter.count) if has_places and not inserter.per_tile else inserter.at_runs(outputs)
        multiple = _option("pad_to_multiple_of", kwargs)
        placeholders.insert_runs(outputs, runs, inserter.token_id, inserter.pad_token_id, multiple=multiple)
        return outputs

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@cache
def _with(mixin: type, kind: Any) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _rebuild(kind: type) -> Any:
    return object.__new__(_with(_SpatialProcessor, kind))


def _for_one_call(processor: Any) -> tuple[Any, _Noted]:
    """A shallow copy of a processor that takes marked texts, and what it notes of them."""
    from transformers import PreTrainedTokenizerBase

    noted, kind = _Noted(), type(processor).__mro__[2]
    processor = copy.copy(processor)
    processor._noted = noted
    processor.__class__ = _with(_MarkedReplacements, kind) if hasattr(kind, "get_text_with_replacements") else kind
    for name, each in vars(processor).items():
        if isinstance(each, PreTrainedTokenizerBase):
            tokenizer: Any = copy.copy(each)
            kind_of_tokenizer: Any = type(each)
            tokenizer.__class__ = _with(_MarkedTokenizer, kind_of_tokenizer)
            tokenizer._noted = noted if name == "tokenizer" else _Noted()
            setattr(processor, name, tokenizer)
    return processor, noted


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
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    elif not _is_unused(processor, token):
        raise SpatialTokensError(
            f"{token!r} has a use of its own in the tokenizer; give a token that it does not have, or leave token out ({TOKEN!r})"
        )
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
    tile_length = getattr(processor, "image_seq_length", None) or getattr(processor, "image_seq_len", None)
    by_sizes = parts.family.tiles == "anyres"
    if per_tile and not by_sizes and tile_length is None:
        raise SpatialTokensError(
            f"{name} does not say how many tokens a tile has; attach without it, and use insert_placeholders()"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SpatialTokensError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which alone tells where its tokens are in a text; attach without "
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


def _positions(text: str) -> list[int]:
    """Where the marks of a text would be without them."""
    return [match.start() - number for number, match in enumerate(re.finditer(MARK, text))]


def _only(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _at_marks(noted: _Noted, count: int) -> list[placeholders.Runs]:
    """Before the first token that starts at, or after, each mark.

    Raises:
        SpatialTokensError: If that was cut off.
    """
    encoding = noted.encoding
    samples = encoding.get("overflow_to_sample_mapping")
    rows = placeholders.rows_of(encoding["input_ids"])
    numbers = range(len(rows)) if samples is None else [int(each) for each in samples]
    made = []
    for row, text in enumerate(numbers):
        token_of = _token_at if encoding.encodings else _token_after
        found = [token_of(noted, row, place) for place in noted.marks[text]]
        if None in found and samples is None:
            raise SpatialTokensError(f"text {row} was cut off before one of its images; raise max_length")
        made.append([(index, count) for index in found if index is not None])  # an image is in one of the parts of a long text
    return made


def _token_at(noted: _Noted, row: int, place: int) -> int | None:
    encoding = noted.encoding
    index = encoding.char_to_token(row, place)
    if index is None:
        return None
    span = encoding.token_to_chars(row, index)
    return int(index) + (span is not None and span.start < place)


def _token_after(noted: _Noted, row: int, place: int) -> int | None:
    """Of an encoding that does not know where its tokens were, as with `sanitize_control_tokens`: the tokens before are counted."""
    text, mask = noted.texts[row], placeholders.rows_of(noted.encoding["attention_mask"])[row]
    kept, before = sum(mask), noted.count(text[:place])
    cut_off = noted.count(text) - kept if noted.left_truncated else 0
    index = before - cut_off
    return mask.index(1) + index if 0 <= index < kept else None


def _option(name: str, kwargs: dict[str, Any]) -> Any:
    """A tokenizer's option, as a processor takes it."""
    groups = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((group[name] for group in groups if group.get(name) is not None), None)


def _counts(images: Any) -> int | list[int]:
    """How many images: in each row, if they are given so, else in all."""
    if images is None:
        return 0
    if not isinstance(images, (list, tuple)):
        return len(images) if getattr(images, "ndim", 0) == 4 else 1
    if any(isinstance(each, (list, tuple)) or each is None for each in images):
        return [len(each) if isinstance(each, (list, tuple)) else int(each is not None) for each in images]
    return len(images)
