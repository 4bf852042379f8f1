"""Slots: the positions in a sequence that spatial tokens take, as runs of a reserved token before each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spatial_tokens.errors import SpatialTokensError, shown

# What goes with input_ids, and its value in a slot and in padding; a position has none: it counts on.
ALIGNED: dict[str, tuple[int | None, int]] = {
    "input_ids": (0, 0),
    "attention_mask": (1, 0),
    "token_type_ids": (0, 0),
    "mm_token_type_ids": (0, 0),
    "special_tokens_mask": (1, 1),
    "labels": (-100, -100),
    "position_ids": (None, 0),
}


@dataclass(frozen=True)
class Places:
    """The groups of slots of each row, each group by the number of image placeholders that follow it before the next.

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
            tile_length: Image placeholders of one tile.

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
                "encoded; insert slots once before every image (the processor that attach() returned does, and insert_slots())"
            )
        units, start = [], 0
        for row in counts[:: max(1, copies)]:
            found = []
            for count in row:
                found.append(start + count - 1 if tiles == "last" else start)
                start += count
            units += found * copies
        return units


def find_places(slots: torch.Tensor, images: torch.Tensor | None, group: int, *, side_by_side: bool = False) -> Places:
    """The groups of slots in a batch.

    Args:
        slots: Where the slots are, `(B, L)`.
        images: Where the image placeholders are, `(B, L)`; None if that is not known.
        group: Slots of one group, `K`.
        side_by_side: Whether several groups may stand before one image.

    Raises:
        SpatialTokensError: If a row's slots are no multiple of it, or an image and its slots do not go together.
    """
    kinds = slots.to(torch.uint8) if images is None else slots.to(torch.uint8) + 2 * images.to(torch.uint8)
    rows = []
    for number, row in enumerate(kinds.tolist()):
        found: list[int] = []
        slot = 0
        for kind in row:
            if kind == 1:
                if slot % group == 0:
                    found.append(0)
                slot += 1
            elif kind == 2:
                if not found:
                    raise SpatialTokensError(f"row {number} has an image without places for spatial tokens before it")
                found[-1] += 1
        if slot % group:
            raise SpatialTokensError(f"row {number} has {slot} places for spatial tokens, which is no multiple of {group}")
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
    """Puts slots before every image of ready `input_ids`, and makes everything else as long.

    Args:
        inputs: `input_ids` `(B, L)`, and what of `ALIGNED` goes with them, of the same shape. All else (pixels, grids) passes
            through.
        token_id: The reserved token.
        count: Slots of an image, `K`; or of each image in turn.
        image_token_id: The image placeholder.
        opening_ids: Tokens that may stand right before an image and belong to it.
        tokens_per_image: Placeholders of an image, or of each image in turn; needed where images touch, or where other tokens
            stand within one. When left out, every run of placeholders is an image.
        pad_token_id: What makes rows with fewer images as long as the others,
        padding_side: on the side where the attention mask has zeros, or if it has none on this one.

    Returns:
        The inputs, `(B, L + K * images)`.

    Raises:
        SpatialTokensError: If a row has slots already, its placeholders are not those of whole images, or a tensor that goes with
            the ids is of another shape.
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
    mask = inputs.get("attention_mask")
    lengths = [tokens_per_image] if isinstance(tokens_per_image, int) else list(tokens_per_image or [])
    starts, used = [], 0
    for number, row in enumerate(ids.tolist()):
        if token_id in row and token_id != image_token_id:
            raise SpatialTokensError(f"row {number} has slots already")
        found, taken = _images(
            row, number, image_token_id, lengths if isinstance(tokens_per_image, int) else lengths[used:], tokens_per_image
        )
        used += taken
        starts.append([start - 1 if start and row[start - 1] in opening_ids else start for start in found])
    if not isinstance(tokens_per_image, int) and used < len(lengths):
        raise SpatialTokensError(f"tokens_per_image names {len(lengths)} images, input_ids have {used}")
    counts = _shared_out(count, [len(row) for row in starts])
    most = max(map(sum, counts), default=0)
    if mask is None and any(sum(row) != most for row in counts):
        raise SpatialTokensError(f"the rows have {[len(row) for row in starts]} images; give the attention_mask, to pad them")
    left = padding_side == "left" if mask is None or bool(mask.all()) else bool((mask[:, 0] == 0).any())
    made = {}
    for name, each in aligned.items():
        in_slots, in_padding = (token_id, pad_token_id) if name == "input_ids" else ALIGNED[name]
        rows = [_with_runs(row, at, lengths, in_slots) for row, at, lengths in zip(each, starts, counts, strict=True)]
        made[name] = torch.stack([_padded(row, ids.shape[1] + most, in_padding, left=left) for row in rows])
    return {**inputs, **made}


def _images(
    row: Sequence[int], number: int, image_token_id: int, lengths: Sequence[int], given: int | Sequence[int] | None
) -> tuple[list[int], int]:
    """Where a row's images start, and how many it has."""
    at = [i for i, each in enumerate(row) if each == image_token_id]
    if given is None:
        starts = [i for i in at if i == 0 or row[i - 1] != image_token_id]
        return starts, len(starts)
    starts, done = [], 0
    while done < len(at):
        length = given if isinstance(given, int) else lengths[len(starts)] if len(starts) < len(lengths) else 0
        if length <= 0 or done + length > len(at):
            raise SpatialTokensError(
                f"row {number} has {len(at)} image tokens, which are not those of whole images of tokens_per_image"
            )
        starts.append(at[done])
        done += length
    return starts, len(starts)


def _shared_out(count: int | Sequence[int], images: Sequence[int]) -> list[list[int]]:
    """The slots of each image, row by row."""
    if isinstance(count, int):
        return [[count] * number for number in images]
    if sum(images) != len(count):
        raise SpatialTokensError(f"the rows have {list(images)} images, slots are given for {len(count)}; do images touch?")
    starts = [sum(images[:row]) for row in range(len(images))]
    return [list(count[start : start + number]) for start, number in zip(starts, images, strict=True)]


def _with_runs(row: torch.Tensor, starts: Sequence[int], counts: Sequence[int], value: int | None) -> torch.Tensor:
    """A row with runs of a value before these positions; without a value they count on, as positions do."""
    parts, last, added = [], 0, 0
    for start, count in zip(starts, counts, strict=True):
        if value is not None:
            parts += [row[last:start], row.new_full((count,), value)]
        else:
            parts += [row[last:start] + added, row[start] + added + torch.arange(count).to(row)]
            added += count
        last = start
    return torch.cat([*parts, row[last:] + added])


def _padded(row: torch.Tensor, length: int, value: int, *, left: bool) -> torch.Tensor:
    padding = row.new_full((length - len(row),), value)
    return torch.cat([padding, row] if left else [row, padding])
