"""Conversations as tensors: images opened, placeholders in place, loss on the answers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from spatial_tokens.adapters.huggingface.placeholders import ALIGNED
from spatial_tokens.adapters.huggingface.processing import placeholder_of, reserved_id_of
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown
from spatial_tokens.pictures import read_picture
from spatial_tokens.storage.text import read_text
from spatial_tokens.training.conversations import (
    BadSampleError,
    Rendered,
    Sample,
    Template,
    check_words,
    num_words,
    parse,
    read_records,
    render,
    special_tokens,
)

IGNORED = -100
MOST_LISTED = 10  # bad samples that an error names
OnBadSample = Literal["stop", "skip"]


class ConversationDataset(Dataset[dict[str, torch.Tensor]]):
    """The samples of a file in LLaVA's format, each ready for the model.

    A bad sample (see `conversations.parse`; words that are a special token; an image that does not open or is outside the folder;
    a text longer than `max_length`) stops the run, or is left out: those known from the file at once, those found later by giving
    the next good one in their place. `bad_samples` lists all, including those that a data loader's processes found.

    Args:
        path: The file.
        image_folder: What the images' paths are relative to.
        processor: The model's, which inserts placeholders (`attach` returns it); its tokenizer must be a fast one.
        template: See `conversations.render`.
        max_length: The most tokens of a sample, image tokens and placeholders included; what is beyond is cut off.
        on_bad_sample: "stop" or "skip".
        bad_samples_file: Where "skip" writes what it leaves out, a JSON line each.
        allow_images_outside: Whether an image's path may leave `image_folder` (`../1.jpg`, `/data/1.jpg`). Links in the folder are
            followed in any case.

    Raises:
        SpatialTokensError: If the file cannot be read, has a bad sample and is to stop, or has no good one; or an option is wrong.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        image_folder: str | PathLike[str],
        processor: Any,
        *,
        template: Template = "vicuna",
        max_length: int = 2048,
        on_bad_sample: OnBadSample = "stop",
        bad_samples_file: str | PathLike[str] | None = None,
        allow_images_outside: bool = False,
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise SpatialTokensError(f"on_bad_sample must be 'stop' or 'skip', got {on_bad_sample!r}")
        if template not in ("plain", "vicuna", "chat"):
            raise SpatialTokensError(f"template must be 'plain', 'vicuna' or 'chat', got {template!r}")
        if on_bad_sample == "skip" and bad_samples_file is None:
            raise SpatialTokensError("on_bad_sample='skip' needs a bad_samples_file to say what was left out")
        if type(max_length) is not int or max_length < 1:
            raise SpatialTokensError(f"max_length must be a positive integer, got {shown(max_length)}")
        if not isinstance(image_folder, (str, PathLike)):
            raise SpatialTokensError(f"image_folder must be a path, got {shown(image_folder)}")
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise SpatialTokensError(f"a processor with a fast tokenizer is expected, got {type(processor).__name__}")
        self.image_folder, self.processor, self.template = Path(image_folder), processor, template
        self.max_length, self.on_bad_sample = max_length, on_bad_sample
        self.allow_images_outside = allow_images_outside
        self.bad_samples_file = None if bad_samples_file is None else Path(bad_samples_file)
        self.path = str(path)
        self.samples: list[Sample] = []
        self.indices: list[int] = []  # their places in the file
        self._noted: set[int] = set()
        special = special_tokens(processor)
        bad: list[tuple[int, BadSampleError]] = []
        for index, record in enumerate(read_records(path)):
            try:
                sample = parse(record, index)
                check_words(sample, special)
                self._require_files(sample)
                self.samples.append(sample)
                self.indices.append(index)
            except BadSampleError as error:
                bad.append((index, error))
        if bad and on_bad_sample == "stop":
            listed = "; ".join(str(error) for _, error in bad[:MOST_LISTED])
            more = f"; and {len(bad) - MOST_LISTED} more" if len(bad) > MOST_LISTED else ""
            raise SpatialTokensError(f"{path} has {len(bad)} bad samples (on_bad_sample='skip' leaves them out): {listed}{more}")
        if not self.samples:
            raise SpatialTokensError(f"{path} has no good sample: {bad[0][1]}")
        for index, each in bad:
            self._note(index, each)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self.tensors(self.samples[place])
            except BadSampleError as error:
                if self.on_bad_sample == "stop":
                    raise
                self._note(self.indices[place], error)
        raise SpatialTokensError("no sample is good; the bad samples' file says why")

    @property
    def lengths(self) -> list[int]:
        """About how long each sample is, in words and image tokens: for grouping, without opening an image."""
        image = int(getattr(self.processor, "image_seq_length", None) or 576)
        return [num_words(sample) + image * len(sample.images) for sample in self.samples]

    @property
    def bad_samples(self) -> dict[int, BadSampleError]:
        """What was left out so far, and why, by its place in the file."""
        if self.bad_samples_file is None or not self.bad_samples_file.is_file():
            return {}
        lines = (json.loads(line) for line in read_text(self.bad_samples_file).split("\n") if line.endswith("}"))
        return {line["index"]: BadSampleError(line["id"], line["why"]) for line in lines if line["data"] == self.path}

    def tensors(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What the model takes, `(L,)` each, with `labels`; and the images' tensors as the processor gives them.

        Raises:
            BadSampleError: If an image does not open, or no answer is left within `max_length`.
        """
        images = [self._open(sample, path) for path in sample.images]
        try:
            rendered = render(sample, self.template, self.processor)
            encoded = self.processor(text=[rendered.text], images=images or None, return_tensors="pt")
            ids = encoded["input_ids"][0]
            where, last_image = self._answers(rendered, ids.tolist())
        except BadSampleError:
            raise
        except Exception as error:  # processors and tokenizers raise what they like
            raise BadSampleError(sample.sample_id, reason(error)) from error
        labels = ids.new_full(ids.shape, IGNORED)
        labels[where] = ids[where]
        if last_image >= self.max_length:
            raise BadSampleError(sample.sample_id, f"its images do not fit in max_length={self.max_length} tokens")
        if bool((labels[: self.max_length] == IGNORED).all()):
            raise BadSampleError(sample.sample_id, f"no answer is left within max_length={self.max_length} tokens")
        aligned = {name: encoded[name][0][: self.max_length] for name in ALIGNED if name in encoded}
        others = {name: each for name, each in encoded.items() if name not in ALIGNED and isinstance(each, torch.Tensor)}
        return {**aligned, **others, "labels": labels[: self.max_length]}

    def _answers(self, rendered: Rendered, ids: Sequence[int]) -> tuple[list[int], int]:
        """Where the answers' tokens are among the ids, and the end of the last image; -1 without one.

        The text alone is tokenized for its words, whose characters are known; between two images they are found in the ids, from
        which they differ by what the processor wrote in place of each image.
        """
        placeholder = self.processor.tokenizer.convert_tokens_to_ids(placeholder_of(self.processor))
        alone = self.processor.tokenizer(rendered.text, return_offsets_mapping=True)
        learned = [any(start < last and first < end for start, end in rendered.answers) for first, last in alone["offset_mapping"]]
        runs: list[list[tuple[int, bool]]] = [[]]
        for word, is_learned in zip(alone["input_ids"], learned, strict=True):
            if word == placeholder:
                runs.append([])
            else:
                runs[-1].append((word, is_learned))
        reserved = reserved_id_of(self.processor)
        places = [place for place, each in enumerate(ids) if each != reserved]
        ids, where, at = [ids[place] for place in places], [], 0
        for number, run in enumerate(runs):
            words = [word for word, _ in run]
            last = number == len(runs) - 1
            starts = [0] if number == 0 else [len(ids) - len(words)] if last else range(at + 1, len(ids))
            start = next((each for each in starts if each >= at and ids[each : each + len(words)] == words), None)
            if start is None or (last and start + len(words) != len(ids)):
                raise SpatialTokensError(
                    f"{type(self.processor).__name__} changes the words around images, so the answers cannot be separated from the "
                    "prompt; does the text hold tokens of the model's own?"
                )
            where += [places[start + i] for i, (_, is_learned) in enumerate(run) if is_learned]
            end_of_image, at = start, start + len(words)
        return where, places[end_of_image - 1] if len(runs) > 1 else -1

    def _open(self, sample: Sample, path: str) -> Any:
        try:
            return read_picture(self._file(sample, path), extra="train")
        except (BadSampleError, MissingExtraError):
            raise
        except SpatialTokensError as error:
            raise BadSampleError(sample.sample_id, f"the image {path} does not open: {error}") from error

    def _file(self, sample: Sample, path: str) -> str:
        """Where an image is. What is checked is what is opened: `..` is taken out of the path before any link is followed."""
        folder = os.path.abspath(self.image_folder)
        file = os.path.abspath(os.path.join(folder, path))
        if not (self.allow_images_outside or Path(file).is_relative_to(folder)):
            raise BadSampleError(
                sample.sample_id, f"the image {path} is outside {self.image_folder}; allow_images_outside=True reads it"
            )
        return file

    def _require_files(self, sample: Sample) -> None:
        for path in sample.images:
            if not os.path.isfile(self._file(sample, path)):
                raise BadSampleError(sample.sample_id, f"the image {path} is not in {self.image_folder}")

    def _note(self, index: int, error: BadSampleError) -> None:
        if index in self._noted or self.bad_samples_file is None:
            return
        self._noted.add(index)
        self.bad_samples_file.parent.mkdir(parents=True, exist_ok=True)
        with self.bad_samples_file.open("a", encoding="utf-8") as file:  # one short write, whole beside other processes' writes
            line = {"data": self.path, "index": index, "id": error.sample_id, "why": error.why}
            file.write(json.dumps(line) + "\n")


class Collator:
    """Samples to a batch: texts padded on the right, images one after another.

    Args:
        pad_token_id: What fills `input_ids`.

    Shape:
        - Output: `input_ids`, `attention_mask`, `labels` `(B, L)`; `pixel_values` and what goes with them as the processor has
          them, for all images of the batch; nothing of images if it has none.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The batch."""
        batch: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for sample in samples for name in sample):
            each = [sample[name] for sample in samples if name in sample]
            if name in ALIGNED:
                filler = self.pad_token_id if name == "input_ids" else ALIGNED[name][1]
                batch[name] = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=filler)
            else:
                batch[name] = torch.cat(each)
        return batch
