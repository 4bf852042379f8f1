"""Placeholders: the positions in a sequence that spatial tokens take, as runs of a reserved token before each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spatial_tokens.errors import SpatialTokensError, shown

IGNORED = -100  # a label that is no target

# What goes with input_ids, and its value at a placeholder and in padding; positions count on.
ALIGNED: dict[str, tuple[int | None, int]] = {
    "input_ids": (0, 0),
    "attention_mask": (1, 0),
    "token_type_ids": (0, 0),
    "mm_token_type_ids": (0, 0),
    "special_tokens_mask": (1, 1),
    "assistant_masks": (0, 0),
    "labels": (IGNORED, IGNORED),
    "position_ids": (None, 0),
}
WRAP = "wrap the collator: MaskPlaceholders(collator, model), as trainer_callback() does"
OFFSETS = "offset_mapping"  # pairs; a placeholder has the start of the token after it, twice
Runs = list[tuple[int, int]]  # of a row: before which position how many placeholders go


@dataclass(frozen=True)
class Places:
    """The groups of placeholders of each row, each group by the number of image tokens that follow it before the next.

    Args:
        rows: One list for each row.
    """

    rows: Sequence[Sequence[int]]

    def units(self, num_maps: int, tiles: str | None = None, tile_length: int = 0) -> list[int]:
        """Which map's tokens go into each group, in the order of the groups.

        generate() repeats rows for beams and samples, but not what was encoded: then the maps of each distinct row serve all its
        copies, which lie side by side.

        Args:
            num_maps: Maps that were encoded, in the order of the distinct rows.
            tiles: Where an image's thumbnail is among its tiles, "first" or "last"; None if every map has a group of its own.
            tile_length: Image tokens of one tile.

        Raises:
            SpatialTokensError: If groups and maps do not go together; it names the rows.
        """
        counts = [[length // tile_length for length in row] if tiles else [1] * len(row) for row in self.rows]
        per_row = [sum(row) for row in counts]
        copies = sum(per_row) // max(1, num_maps)
        if (
            bool(copies) != bool(num_maps)
            or copies * num_maps != sum(per_row)
            or any(per_row[i] != per_row[i - i % max(1, copies)] for i in range(len(per_row)))
        ):
            raise SpatialTokensError(
                f"the rows have places for the spatial tokens of {per_row} {'tiles' if tiles else 'images'}, but {num_maps} were "
                "encoded; insert placeholders once before every image, as attach()'s processor and insert_placeholders() do"
            )
        units, start = [], 0
        for row in counts[:: max(1, copies)]:
            found = []
            for count in row:
                found.append(start + count - 1 if tiles == "last" else start)
                start += count
            units += found * copies
        return units


def find_places(placeholders: torch.Tensor, images: torch.Tensor | None, group: int, *, side_by_side: bool = False) -> Places:
    """The groups of placeholders in a batch.

    Args:
        placeholders: Where they are, `(B, L)`.
        images: Where the image tokens are, `(B, L)`; None if that is not known.
        group: Placeholders of one group, `K`.
        side_by_side: Whether several groups may stand before one image.

    Raises:
        SpatialTokensError: If a row's placeholders are no multiple of it, or an image and its placeholders do not go together.
    """
    kinds = placeholders.to(torch.uint8) if images is None else placeholders.to(torch.uint8) + 2 * images.to(torch.uint8)
    rows = []
    for number, row in enumerate(kinds.tolist()):
        found: list[int] = []
        seen = 0
        for kind in row:
            if kind == 1:
                if seen % group == 0:
                    found.append(0)
                seen += 1
            elif kind == 2:
                if not found:
                    raise SpatialTokensError(f"row {number} has an image without places for spatial tokens before it")
                found[-1] += 1
        if seen % group:
            raise SpatialTokensError(f"row {number} has {seen} places for spatial tokens, which is no multiple of {group}")
        if images is not None and found and (not found[-1] or (0 in found and not side_by_side)):
            raise SpatialTokensError(f"row {number} has places for spatial tokens without an image after them")
        rows.append(found)
    return Places(rows)


def insert(
    inputs: Mapping[str, Any],
    *,
    token_id: int,
    count: int | Sequence[int],
    image_token_id: int,
    opening_ids: Sequence[int] = (),
    tokens_per_image: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    padding_side: str = "left",
) -> dict[str, Any]:
    """Puts placeholders before every image of ready `input_ids`, and makes everything else as long.

    Args:
        inputs: `input_ids` `(B, L)`, and what of `ALIGNED` goes with them, of the same shape. All else (pixels, grids) passes
            through.
        token_id: The reserved token.
        count: Placeholders of an image, `K`; or of each image in turn.
        image_token_id: The image token.
        opening_ids: Tokens that may stand right before an image and belong to it.
        tokens_per_image: Image tokens of an image, or of each image in turn; needed where images touch, or where other tokens
            stand within one. When left out, every run of image tokens is an image.
        pad_token_id: What makes rows with fewer images as long as the others,
        padding_side: on the side where the attention mask has zeros, or if it has none on this one.

    Returns:
        The inputs, as long as the longest row with its placeholders.

    Raises:
        SpatialTokensError: If a row has placeholders already, its image tokens are not those of whole images, or a tensor that
            goes with the ids is of another shape.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise SpatialTokensError("input_ids must be a tensor (B, L)")
    if padding_side not in ("left", "right"):
        raise SpatialTokensError(f"padding_side must be 'left' or 'right', got {shown(padding_side)}")
    aligned = {name: inputs[name] for name in ALIGNED if inputs.get(name) is not None}
    wrong = [
        f"{name} {tuple(getattr(each, 'shape', ()))}" for name, each in aligned.items() if getattr(each, "shape", ()) != ids.shape
    ]
    if wrong:
        raise SpatialTokensError(f"{', '.join(wrong)} must be of the shape of input_ids, {tuple(ids.shape)}")
    rows = ids.tolist()
    for number, row in enumerate(rows):
        if token_id in row and token_id != image_token_id:
            raise SpatialTokensError(f"row {number} has placeholders already")
    made = dict(inputs)
    runs = find_runs(rows, count, image_token_id, opening_ids, tokens_per_image)
    insert_runs(made, runs, token_id, pad_token_id, padding_side=padding_side)
    return made


def find_runs(
    rows: Sequence[Sequence[int]],
    count: int | Sequence[int],
    image_token_id: int,
    opening_ids: Sequence[int] = (),
    tokens_per_image: int | Sequence[int] | None = None,
) -> list[Runs]:
    """Where the placeholders of each image go in rows of ids; the arguments are those of `insert`.

    Raises:
        SpatialTokensError: If a row's image tokens are not those of whole images.
    """
    lengths = None if tokens_per_image is None or isinstance(tokens_per_image, int) else list(tokens_per_image)
    starts: list[list[int]] = []
    used = 0
    for number, row in enumerate(rows):
        given = tokens_per_image if lengths is None else lengths[used:]
        found = _images(row, number, image_token_id, given)
        used += len(found)
        starts.append([start - 1 if start and row[start - 1] in opening_ids else start for start in found])
    if lengths is not None and used < len(lengths):
        raise SpatialTokensError(f"tokens_per_image names {len(lengths)} images, input_ids have {used}")
    counts = _counts_by_row(count, [len(row) for row in starts])
    return [list(zip(at, each, strict=True)) for at, each in zip(starts, counts, strict=True)]


def insert_runs(
    outputs: Any, runs: Sequence[Runs], token_id: int, pad_token_id: int, *, pad: bool | None = None, padding_side: str = "left",
    multiple: int | None = None,
) -> None:  # fmt: skip
    """Puts placeholders into `input_ids` and what goes with them: tensors, arrays or lists, which stay what they are.

    Args:
        outputs: A mapping; its values are replaced.
        runs: Where, for each row.
        token_id: The reserved token.
        pad_token_id: What pads,
        pad: Whether rows are padded: lists may be left of different lengths. None: they are padded if the attention mask allows it,
        padding_side: on the side where the mask has zeros, or if it has none on this one.
        multiple: What the length is a multiple of.

    Raises:
        SpatialTokensError: If rows must be padded, and neither `pad` nor an attention mask says that they may.
    """
    rows = rows_of(outputs["input_ids"])
    counts = [sum(count for _, count in run) for run in runs]
    mask = None if outputs.get("attention_mask") is None else rows_of(outputs["attention_mask"])
    kept = [len(row) for row in rows] if mask is None else [sum(row) for row in mask]
    padded = [not row[0] for row in mask or [] if not all(row)]  # whether on the left
    usual = padded[0] if padded else padding_side == "left"
    on_left = [usual if mask is None or all(mask[i]) else not mask[i][0] for i in range(len(rows))]
    if pad is None and mask is None and len(set(counts)) > 1:
        raise SpatialTokensError(f"the rows have {[len(run) for run in runs]} images; give the attention_mask, to pad them")
    if isinstance(outputs["input_ids"], list) and not pad:
        lengths = [len(row) + count for row, count in zip(rows, counts, strict=True)]
    else:
        spare = max(map(len, rows), default=0) - max(kept, default=0)  # of a length that was asked for
        length = max((real + count for real, count in zip(kept, counts, strict=True)), default=0)
        length += spare if multiple is None or spare >= multiple else 0
        lengths = [-(-length // multiple) * multiple if multiple else length] * len(rows)
    for name in (*ALIGNED, OFFSETS):
        if outputs.get(name) is None:
            continue
        at_placeholder, in_padding = (token_id, pad_token_id) if name == "input_ids" else ALIGNED.get(name, (None, 0))
        made = []
        for row, run, length, left in zip(rows_of(outputs[name]), runs, lengths, on_left, strict=True):
            longer: list[Any] = _with_offsets(row, run) if name == OFFSETS else _with_runs(row, run, at_placeholder)
            padding: list[Any] = [(0, 0) if name == OFFSETS else in_padding] * (length - len(longer))
            made.append((padding + longer)[-length:] if left else (longer + padding)[:length])
        outputs[name] = _as(outputs[name], made)
    if outputs.get("length") is not None:
        outputs["length"] = lengths if isinstance(outputs["length"], list) else _as(outputs["length"], lengths)


def rows_of(values: Any) -> list[Any]:
    """A batch as lists; one row of ids as a batch of it."""
    rows = values.tolist() if hasattr(values, "tolist") else values
    return [rows] if rows and isinstance(values, list) and isinstance(rows[0], int) else list(rows)


def _as(like: Any, rows: list[Any]) -> Any:
    """Rows as what was given: a tensor, an array, lists, or the one row itself."""
    if isinstance(like, torch.Tensor):
        return like.new_tensor(rows) if rows else like
    if hasattr(like, "dtype"):
        return torch.tensor(rows).numpy().astype(like.dtype)
    return rows[0] if like and isinstance(like[0], int) else rows


def _images(row: Sequence[int], number: int, image_token_id: int, given: int | Sequence[int] | None) -> list[int]:
    """Where a row's images start."""
    at = [i for i, each in enumerate(row) if each == image_token_id]
    if given is None:
        return [i for i in at if i == 0 or row[i - 1] != image_token_id]
    starts: list[int] = []
    done = 0
    while done < len(at):
        length = given if isinstance(given, int) else given[len(starts)] if len(starts) < len(given) else 0
        if length <= 0 or done + length > len(at):
            raise SpatialTokensError(
                f"row {number} has {len(at)} image tokens, which are not those of whole images of tokens_per_image"
            )
        starts.append(at[done])
        done += length
    return starts


def _counts_by_row(count: int | Sequence[int], images: Sequence[int]) -> list[list[int]]:
    """The placeholders of each image, row by row."""
    if isinstance(count, int):
        return [[count] * number for number in images]
    if sum(images) != len(count):
        raise SpatialTokensError(f"the rows have {list(images)} images, placeholders are given for {len(count)}; do images touch?")
    starts = [sum(images[:row]) for row in range(len(images))]
    return [list(count[start : start + number]) for start, number in zip(starts, images, strict=True)]


def _with_runs(row: Sequence[int], runs: Runs, value: int | None) -> list[int]:
    """A row with runs of a value before these positions; without a value they count on, as positions do."""
    made: list[int] = []
    last = added = 0
    for start, count in runs:
        made += [each + added for each in row[last:start]]
        if value is not None:
            made += [value] * count
        else:
            made += [row[start] + added + i for i in range(count)]
            added += count
        last = start
    return made + [each + added for each in row[last:]]


def _with_offsets(row: Sequence[Sequence[int]], runs: Runs) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    last = 0
    for start, count in runs:
        place = row[start][0]
        made += [(each[0], each[1]) for each in row[last:start]] + [(place, place)] * count
        last = start
    return made + [(each[0], each[1]) for each in row[last:]]


def count_without_placeholders(counted: Any, labels: torch.Tensor, mask: torch.Tensor) -> Any:
    """Trainer's `num_items_in_batch` without placeholders, which a collator has left among the labels where the mask is.

    Raises:
        SpatialTokensError: If it is of more batches than this one, whose placeholders are not known here.
    """
    if not bool(mask.any()):
        return counted
    for first in (0, 1):  # since transformers 5.24 the first of a row, which nothing predicts, is not counted
        if int(counted) == int((labels[..., first:] != IGNORED).sum()):
            return counted - int(mask[..., first:].sum())
    raise SpatialTokensError(
        f"labels of placeholders of spatial tokens are not -100, and num_items_in_batch ({int(counted)}), which is of several "
        f"batches or processes, counts them; {WRAP}"
    )
