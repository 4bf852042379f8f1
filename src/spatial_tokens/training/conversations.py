r"""Conversations in LLaVA's format: checked, and rendered as text whose answers are known.

A sample is `{"id": ..., "image": "path" or ["path", ...] or absent, "conversations": [{"from": "human", "value": "<image>\nWhat is
this?"}, {"from": "gpt", "value": "A circle."}, ...]}`; a file is a JSON list of them, or one a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from spatial_tokens.adapters.huggingface.processing import placeholder_of
from spatial_tokens.errors import SpatialTokensError, reason, shown
from spatial_tokens.storage.text import read_text

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Template = Literal["plain", "vicuna", "chat"]
MEDIA_TOKENS = ("image_token", "boi_token", "eoi_token", "video_token", "audio_token")  # a tokenizer may not mark them as special


class BadSampleError(SpatialTokensError):
    """A sample that cannot be trained on.

    Args:
        sample_id: Which.
        why: What is wrong with it.
    """

    def __init__(self, sample_id: str, why: str | None = None) -> None:
        if why is None:  # a data loader makes it again from its worker's traceback
            super().__init__(sample_id.strip().splitlines()[-1].partition(f"{type(self).__name__}: ")[2] or sample_id)
        else:
            super().__init__(f"sample {sample_id!r}: {why}")
        self.sample_id, self.why = sample_id, why

    def __reduce__(self) -> Any:
        return type(self), (self.sample_id, self.why)


@dataclass(frozen=True)
class Sample:
    """A checked conversation: turns of user and assistant in turn, user first, with a placeholder for each image.

    Args:
        sample_id: Its "id", or its place in the file.
        turns: What each says.
        images: The images' paths, as the file has them.
    """

    sample_id: str
    turns: tuple[str, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A conversation as a text, with its images' placeholders in it.

    Args:
        text: All of it.
        answers: What carries loss, as ranges of characters.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def read_records(path: str | PathLike[str]) -> list[Any]:
    """The samples of a `.json` file (a list) or a `.jsonl` file (one a line), unchecked.

    Raises:
        SpatialTokensError: If the file cannot be read, or is neither.
    """
    text = read_text(path).removeprefix("\ufeff")
    try:
        records = [json.loads(line) for line in text.split("\n") if line.strip()] if _is_lines(path) else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpatialTokensError(f"{path} is not valid JSON: {reason(error)}") from error
    if not isinstance(records, list) or not records:
        raise SpatialTokensError(f"{path} must hold a list of samples, got {shown(records)}")
    return records


def parse(record: Any, index: int) -> Sample:
    """A checked sample.

    Raises:
        BadSampleError: If a field is missing or of another kind, the turns do not alternate, or the conversation has not one
            placeholder for each image.
    """
    sample_id = str(record.get("id", index)) if isinstance(record, Mapping) else str(index)
    if not isinstance(record, Mapping):
        raise BadSampleError(sample_id, f"must be an object, got {shown(record)}")
    images = record.get("image", record.get("images")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(each, str) and each for each in images):
        raise BadSampleError(sample_id, f"image must be a path or a list of paths, got {shown(images)}")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSampleError(sample_id, f"conversations must be a list of turns, got {shown(turns)}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadSampleError(sample_id, f"turn {number} must be {{'from': ..., 'value': text}}, got {shown(turn)}")
        expected = ("user", "assistant")[number % 2]
        if ROLES.get(str(turn.get("from"))) != expected:
            raise BadSampleError(sample_id, f"turn {number} is from {shown(turn.get('from'))}, expected the {expected}")
    if len(turns) % 2:
        raise BadSampleError(sample_id, "the last turn is the user's; there is no answer to learn")
    values = [turn["value"] for turn in turns]
    placed = [value.count(PLACEHOLDER) for value in values]
    if any(placed[1::2]):
        raise BadSampleError(sample_id, f"an answer holds {PLACEHOLDER}")
    if sum(placed) != len(images):
        raise BadSampleError(sample_id, f"{sum(placed)} placeholders {PLACEHOLDER} for {len(images)} images")
    return Sample(sample_id, tuple(values), tuple(images))


def special_tokens(processor: Any) -> re.Pattern[str]:
    """Matches every special token of a processor and its tokenizer, whatever the tokenizer's class."""
    tokenizer = processor.tokenizer
    added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    of_media = [getattr(processor, name, None) for name in MEDIA_TOKENS]
    names = {str(name) for name in (*tokenizer.all_special_tokens, *added, *of_media) if name}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")  # (?!) matches nothing


def check_words(sample: Sample, special: re.Pattern[str]) -> None:
    """Refuses words that the tokenizer would read as a special token, such as an end of sequence within an answer.

    Raises:
        BadSampleError: If a turn holds one other than its image placeholders.
    """
    for number, turn in enumerate(sample.turns):
        if found := special.search(turn.replace(PLACEHOLDER, "")):  # joined, as the templates do: "</<image>s>" hides "</s>"
            raise BadSampleError(sample.sample_id, f"turn {number} holds the special token {found[0]!r}; remove or rewrite it")


def render(sample: Sample, template: Template, processor: Any) -> Rendered:
    """The text of a conversation.

    Args:
        sample: Which.
        template: "plain": the images and the answers alone, as in alignment; "vicuna": LLaVA-1.5's; "chat": the processor's own
            chat template.
        processor: The model's.

    Raises:
        BadSampleError: If the chat template cannot render it.
        SpatialTokensError: If the template is "vicuna", and the tokenizer has no token that ends an answer.
    """
    placeholder = placeholder_of(processor) or PLACEHOLDER
    if template == "chat":
        return _chat(sample, processor)
    pieces = _plain(sample) if template == "plain" else _vicuna(sample, processor.tokenizer.eos_token)
    return _joined((text.replace(PLACEHOLDER, placeholder) if not learned else text, learned) for text, learned in pieces)


def _plain(sample: Sample) -> Iterator[tuple[str, bool]]:
    for question, answer in _rounds(sample):
        yield PLACEHOLDER * question.count(PLACEHOLDER), False
        yield f"{answer}\n", True


def _vicuna(sample: Sample, end: str | None) -> Iterator[tuple[str, bool]]:
    if end is None:
        raise SpatialTokensError("template 'vicuna' ends answers with the tokenizer's eos_token, and it has none; set one")
    yield f"{SYSTEM} ", False
    for question, answer in _rounds(sample):
        images = question.count(PLACEHOLDER)
        words = question.replace(PLACEHOLDER, "").strip()
        yield f"USER: {f'{PLACEHOLDER}{chr(10)}' * images}{words} ASSISTANT:", False
        yield f" {answer}{end}", True


def _chat(sample: Sample, processor: Any) -> Rendered:
    """Each answer is what the template adds when its turn is added."""
    apply: Callable[..., str] = processor.apply_chat_template
    messages = [{"role": ("user", "assistant")[number % 2], "content": _content(text)} for number, text in enumerate(sample.turns)]
    answers = []
    try:
        whole = apply(messages, tokenize=False)
        for number in range(1, len(messages), 2):
            before = apply(messages[:number], tokenize=False, add_generation_prompt=True)
            after = apply(messages[: number + 1], tokenize=False)
            if not (whole.startswith(before) and whole.startswith(after)) or len(after) < len(before):
                raise ValueError("it is no longer what it was when a turn is added")
            answers.append((len(before), len(after)))
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise BadSampleError(sample.sample_id, f"the chat template cannot render it: {reason(error)}") from error
    return Rendered(whole, tuple(answers))


def _content(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if words.strip():
            parts.append({"type": "text", "text": words.strip() if PLACEHOLDER in text else words})
    return parts


def _rounds(sample: Sample) -> Iterator[tuple[str, str]]:
    return zip(sample.turns[::2], sample.turns[1::2], strict=True)


def _joined(pieces: Iterator[tuple[str, bool]]) -> Rendered:
    texts: list[str] = []
    answers: list[tuple[int, int]] = []
    length = 0
    for text, learned in pieces:
        if learned:
            answers.append((length, length + len(text)))
        texts.append(text)
        length += len(text)
    return Rendered("".join(texts), tuple(answers))


def _is_lines(path: str | PathLike[str]) -> bool:
    return Path(path).suffix == ".jsonl"


def num_words(sample: Sample) -> int:
    """About how long the text is: for grouping by length, which needs no more."""
    return sum(len(turn.split()) for turn in _texts(sample.turns))


def _texts(turns: Sequence[str]) -> Iterator[str]:
    return (turn.replace(PLACEHOLDER, " ") for turn in turns)
