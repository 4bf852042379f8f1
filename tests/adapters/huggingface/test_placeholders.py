"""Placeholders in ready `input_ids`, against a row-by-row reference in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface.placeholders import Places, find_places, insert

PAD, IMAGE, OPEN, SLOT = 0, 7, 8, 9
WORDS = st.lists(st.integers(1, 6), max_size=3)


@st.composite
def rows(draw):
    """A row as pieces: words and images, each of the latter with its length and whether a token opens it."""
    pieces = [("words", draw(WORDS))]
    for _ in range(draw(st.integers(0, 3))):
        pieces += [("image", (draw(st.integers(1, 4)), draw(st.booleans()))), ("words", draw(WORDS))]
    return pieces


def spelled(pieces, count=0):
    """The row's ids, with `count` slots before each image, and the lengths of its images."""
    ids, lengths = [], []
    for kind, piece in pieces:
        if kind == "words":
            ids += piece
        else:
            length, opened = piece
            ids += [SLOT] * count + [OPEN] * opened + [IMAGE] * length
            lengths.append(length)
    return ids, lengths


def padded(row, length, value, left):
    padding = [value] * (length - len(row))
    return padding + row if left else row + padding


def batch_of(found, left):
    length = max(1, *map(len, found))
    return (torch.tensor([padded(row, length, PAD, left) for row in found]),
            torch.tensor([padded([1] * len(row), length, 0, left) for row in found]))  # fmt: skip


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans(), st.integers(1, 3))
def test_insert(pieces, left, count):
    ids, mask = batch_of([spelled(row)[0] for row in pieces], left)
    lengths = [length for row in pieces for length in spelled(row)[1]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    made = insert(
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100),
         "mm_token_type_ids": (ids == IMAGE).long(), "assistant_masks": (ids == 1).long(), "position_ids": positions,
         "pixel_values": torch.ones(1)},
        token_id=SLOT, count=count, image_token_id=IMAGE, opening_ids=[OPEN], tokens_per_image=lengths, pad_token_id=PAD,
    )  # fmt: skip
    for i, row in enumerate(pieces):
        expected, _ = spelled(row, count)
        kept = made["attention_mask"][i].bool()
        assert made["input_ids"][i][kept].tolist() == expected
        assert (made["input_ids"][i][~kept] == PAD).all()
        assert made["labels"][i][kept].tolist() == [-100 if each == SLOT else each for each in expected]
        assert (made["labels"][i][~kept] == -100).all()
        assert made["mm_token_type_ids"][i][kept].tolist() == [int(each == IMAGE) for each in expected]
        assert made["assistant_masks"][i].tolist() == (made["input_ids"][i] == 1).tolist()
        assert made["position_ids"][i][kept].tolist() == list(range(len(expected)))
        first = int(kept.int().argmax())
        assert kept[first : first + len(expected)].all(), "padding stands between words"
    assert torch.equal(made["pixel_values"], torch.ones(1))
    assert len({tuple(made[name].shape) for name in ("input_ids", "attention_mask", "labels", "position_ids")}) == 1


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_a_batch_is_its_rows(pieces, left, count, length):
    """All images are of one length here, and touch where no words lie between them."""
    pieces = [[(kind, (length, each[1]) if kind == "image" else each) for kind, each in row] for row in pieces]
    ids, mask = batch_of([spelled(row)[0] for row in pieces], left)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == IMAGE).long(), "labels": ids * mask - (1 - mask)}
    options = {"token_id": SLOT, "count": count, "image_token_id": IMAGE, "opening_ids": [OPEN], "tokens_per_image": length}
    made = insert(batch, **options)
    assert made["input_ids"].shape[1] == max(1, *(len(spelled(row, count)[0]) for row in pieces))
    for i in range(len(pieces)):
        there = mask[i].bool()
        alone = insert({name: each[i, there][None] for name, each in batch.items()}, **options)
        kept = made["attention_mask"][i].bool()
        assert all(torch.equal(made[name][i, kept], each[0]) for name, each in alone.items())
        assert not made["token_type_ids"][i, made["input_ids"][i] == SLOT].any()


def test_rows_with_as_many_images_need_no_mask():
    ids = torch.tensor([[1, IMAGE, 2], [IMAGE, 3, 4]])
    made = insert({"input_ids": ids, "attention_mask": None}, token_id=SLOT, count=1, image_token_id=IMAGE)
    assert made["input_ids"].tolist() == [[1, SLOT, IMAGE, 2], [SLOT, IMAGE, 3, 4]]
    assert made["attention_mask"] is None


def test_rows_padded_on_either_side():
    ids = torch.tensor([[PAD, IMAGE, 1], [IMAGE, 1, PAD], [1, 2, 3]])
    mask = (ids != PAD).long()
    made = insert({"input_ids": ids, "attention_mask": mask}, token_id=SLOT, count=1, image_token_id=IMAGE, pad_token_id=PAD)
    assert [row[kept].tolist() for row, kept in zip(made["input_ids"], made["attention_mask"].bool(), strict=True)] == [
        [SLOT, IMAGE, 1], [SLOT, IMAGE, 1], [1, 2, 3],
    ]  # fmt: skip


def test_the_inputs_are_left_as_they_were():
    inputs = {"input_ids": torch.tensor([[IMAGE, 1]]), "labels": torch.tensor([[IMAGE, 1]])}
    insert(inputs, token_id=SLOT, count=1, image_token_id=IMAGE)
    assert inputs["input_ids"].tolist() == inputs["labels"].tolist() == [[IMAGE, 1]]


def test_runs_are_images_when_no_lengths_are_given():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, OPEN, IMAGE, 3]])
    made = insert({"input_ids": ids}, token_id=SLOT, count=2, image_token_id=IMAGE, opening_ids=[OPEN])
    assert made["input_ids"].tolist() == [[1, SLOT, SLOT, IMAGE, IMAGE, 2, SLOT, SLOT, OPEN, IMAGE, 3]]


def test_images_that_touch_are_told_apart_by_their_length():
    ids = torch.tensor([[IMAGE] * 4])
    made = insert({"input_ids": ids}, token_id=SLOT, count=1, image_token_id=IMAGE, tokens_per_image=2)
    assert made["input_ids"].tolist() == [[SLOT, IMAGE, IMAGE, SLOT, IMAGE, IMAGE]]


def test_tokens_within_an_image_do_not_end_it():
    row_break = 5
    ids = torch.tensor([[1, IMAGE, IMAGE, row_break, IMAGE, IMAGE, 2]])
    made = insert({"input_ids": ids}, token_id=SLOT, count=1, image_token_id=IMAGE, tokens_per_image=4)
    assert made["input_ids"].tolist() == [[1, SLOT, IMAGE, IMAGE, row_break, IMAGE, IMAGE, 2]]


def test_a_number_of_slots_for_each_image():
    ids, mask = torch.tensor([[IMAGE, 1, IMAGE], [IMAGE, 2, 3]]), torch.ones(2, 3, dtype=torch.long)
    made = insert(
        {"input_ids": ids, "attention_mask": mask}, token_id=SLOT, count=[1, 2, 1], image_token_id=IMAGE, padding_side="right"
    )
    assert made["input_ids"].tolist() == [[SLOT, IMAGE, 1, SLOT, SLOT, IMAGE], [SLOT, IMAGE, 2, 3, PAD, PAD]]
    with pytest.raises(SpatialTokensError, match=r"the rows have \[2, 1\] images, placeholders are given for 2"):
        insert({"input_ids": ids, "attention_mask": mask}, token_id=SLOT, count=[1, 2], image_token_id=IMAGE)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[1, SLOT, IMAGE]], {}, "row 0 has placeholders already"),
        ([[1, 2, IMAGE], [1, SLOT, IMAGE]], {}, "row 1 has placeholders already"),
        ([[IMAGE, 1], [1, IMAGE]], {"tokens_per_image": [1, 2]}, "row 1 has 1 image tokens"),
        ([[IMAGE, 1]], {"tokens_per_image": 0}, "row 0 has 1 image tokens"),
        ([[IMAGE, IMAGE], [IMAGE, 1]], {"tokens_per_image": 2}, "row 1 has 1 image tokens"),
        ([[IMAGE, IMAGE]], {"tokens_per_image": [1]}, "row 0 has 2 image tokens"),
        ([[IMAGE, 1]], {"tokens_per_image": [1, 1]}, "tokens_per_image names 2 images, input_ids have 1"),
        ([[IMAGE, 1], [2, 3]], {}, r"the rows have \[1, 0\] images; give the attention_mask"),
        ([1, 2], {}, r"input_ids must be a tensor \(B, L\)"),
    ],
)
def test_mistakes(ids, options, message):
    with pytest.raises(SpatialTokensError, match=message):
        insert({"input_ids": torch.tensor(ids)}, token_id=SLOT, count=2, image_token_id=IMAGE, **options)


def test_a_tensor_of_another_length():
    inputs = {"input_ids": torch.tensor([[IMAGE, 1]]), "labels": torch.tensor([[1]])}
    with pytest.raises(SpatialTokensError, match=r"labels \(1, 1\) must be of the shape of input_ids, \(1, 2\)"):
        insert(inputs, token_id=SLOT, count=1, image_token_id=IMAGE)


def test_positions_of_several_kinds():
    """Qwen's positions have three rows for each of ours; the model makes them anew."""
    inputs = {"input_ids": torch.tensor([[IMAGE, 1]]), "position_ids": torch.zeros(3, 1, 2, dtype=torch.long)}
    with pytest.raises(SpatialTokensError, match=r"position_ids \(3, 1, 2\) must be of the shape of input_ids, \(1, 2\)"):
        insert(inputs, token_id=SLOT, count=1, image_token_id=IMAGE)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.tensor([[IMAGE, 1]]), "attention_mask": [[1, 1]]},
        {"input_ids": torch.tensor([[IMAGE, 1]]), "labels": [[IMAGE, 1]]},
        {"labels": torch.tensor([[IMAGE, 1]])},
    ],
    ids=["mask", "labels", "no ids"],
)
def test_what_is_no_tensor(inputs):
    with pytest.raises(SpatialTokensError):
        insert(inputs, token_id=SLOT, count=1, image_token_id=IMAGE)


def test_a_side_that_is_none():
    with pytest.raises(SpatialTokensError, match="padding_side"):
        insert({"input_ids": torch.tensor([[IMAGE, 1]])}, token_id=SLOT, count=1, image_token_id=IMAGE, padding_side="rigth")


# Which map goes where


@given(st.lists(rows(), min_size=1, max_size=4), st.integers(1, 3))
def test_places(pieces, count):
    ids, _ = batch_of([spelled(row, count)[0] for row in pieces], left=False)
    found = find_places(ids == SLOT, ids == IMAGE, count)
    assert [list(row) for row in found.rows] == [spelled(row)[1] for row in pieces]
    unknown = find_places(ids == SLOT, None, count)
    assert [len(row) for row in unknown.rows] == [len(spelled(row)[1]) for row in pieces]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([IMAGE, SLOT, SLOT], "row 1 has an image without places for spatial tokens before it"),
        ([SLOT, SLOT, 1], "row 1 has places for spatial tokens without an image after them"),
        ([SLOT] * 4 + [IMAGE], "row 1 has places for spatial tokens without an image after them"),
    ],
)
def test_slots_and_images_that_do_not_go_together(row, message):
    good = [SLOT, SLOT, IMAGE]
    ids, _ = batch_of([good, row], left=False)
    with pytest.raises(SpatialTokensError, match=message):
        find_places(ids == SLOT, ids == IMAGE, 2)
    if row[:4] == [SLOT] * 4:
        assert [list(each) for each in find_places(ids == SLOT, ids == IMAGE, 2, side_by_side=True).rows] == [[1], [0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_where_there_was_none(side):
    ids = torch.tensor([[IMAGE, 1], [2, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = insert(inputs, token_id=SLOT, count=1, image_token_id=IMAGE, padding_side=side)
    assert made["input_ids"][1].tolist() == ([PAD, 2, 3] if side == "left" else [2, 3, PAD])


def test_slots_that_are_no_whole_groups():
    with pytest.raises(SpatialTokensError, match="row 1 has 3 places for spatial tokens, which is no multiple of 2"):
        find_places(torch.tensor([[0, 0, 0], [1, 1, 1]]).bool(), None, 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 3))
def test_units_of_images(images, copies):
    """Rows are repeated side by side for beams; what was encoded is not."""
    repeated = Places([[5] * number for number in images for _ in range(copies)])
    if not sum(images):
        assert repeated.units(0) == []
        return
    starts = [sum(images[:row]) for row in range(len(images))]
    expected = [start + i for start, number in zip(starts, images, strict=True) for _ in range(copies) for i in range(number)]
    assert repeated.units(sum(images)) == expected


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 5), st.booleans()
)
def test_units_of_tiles(tiles, copies, length, last):
    """Of an image's tiles the thumbnail's map is taken: the first or the last."""
    total = sum(map(sum, tiles))
    places = Places([[number * length for number in row] for row in tiles for _ in range(copies)])
    if not total:
        return
    expected, start = [], 0
    for row in tiles:
        thumbnails = []
        for number in row:
            thumbnails.append(start + (number - 1 if last else 0))
            start += number
        expected += thumbnails * copies
    assert places.units(total, "last" if last else "first", length) == expected


@pytest.mark.parametrize(("rows_of", "maps"), [([[1], []], 2), ([[]], 1), ([[1, 1], [1]], 2), ([[1]], 0), ([[1, 1], []], 1)])
def test_counts_that_do_not_go_together(rows_of, maps):
    with pytest.raises(SpatialTokensError, match="the rows have places for the spatial tokens of"):
        Places(rows_of).units(maps)
