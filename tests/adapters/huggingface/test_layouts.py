"""Maps of patches where the families' matrix does not reach: several images in a row of LLaVA-OneVision, wrong shapes."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface.layouts import joined, maps_of, tiles_of

CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=32), image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])


def test_tiles_of_images_by_their_sizes():
    sizes = torch.tensor([[32, 64], [64, 64], [60, 30]])
    assert tiles_of({"image_sizes": sizes}, CONFIG) == [3, 5, 3]


def test_several_images_of_a_row_are_not_cut():
    sizes = torch.tensor([[64, 64]] * 4)
    assert tiles_of({"image_sizes": sizes, "batch_num_images": torch.tensor([2, 1, 1])}, CONFIG) == [1, 1, 5, 5]


@pytest.mark.parametrize(
    ("layout", "shape", "arguments", "message"),
    [
        ("square", (2, 15, 4), {}, "15 patches are no square"),
        ("channels first", (2, 16, 4), {}, "not a map of four dimensions"),
        ("grid", (20, 4), {"image_grid_thw": [[1, 4, 6]]}, r"given 20 patches, but the images' grids \[\(4, 6\)\] have 24"),
    ],
)
def test_features_that_are_not_what_the_layout_says(layout, shape, arguments, message):
    with pytest.raises(SpatialTokensError, match=message):
        maps_of(layout, [torch.zeros(shape)], arguments, SimpleNamespace(model_type="x"))


def test_blocks_of_images_side_by_side():
    """As LFM2-VL gives them to its projector since transformers 5.24: blocks of 2 x 2, with room for the largest image in each."""
    maps, room = [torch.randn(height, width, 3) for height, width in ((4, 6), (2, 4), (6, 2))], 8
    row = torch.full((1, 2, len(maps) * room * 2, 3), 9.0)
    for number, each in enumerate(maps):
        for block in range(each.shape[0] * each.shape[1] // 4):
            top, left = 2 * (block // (each.shape[1] // 2)), 2 * (block % (each.shape[1] // 2))
            at = 2 * (number * room + block)
            row[0, :, at : at + 2] = each[top : top + 2, left : left + 2]
    arguments = {"spatial_shapes": torch.tensor([each.shape[:2] for each in maps])}
    for captured in ([row], [each[None] for each in maps]):
        found = maps_of("side by side", captured, arguments, SimpleNamespace())
        assert all(torch.equal(*pair) for pair in zip(found, maps, strict=True))


@pytest.mark.parametrize("layer_of", [torch.cat, list], ids=["tensor", "list"])
def test_what_layers_add_to_image_tokens_they_do_not_add_to_spatial_tokens(layer_of):
    """Qwen3-VL's deepstack, in mode "image": spatial tokens first, to which nothing is added."""
    own, added = ([torch.randn(length, 3) for length in (2, 4)] for _ in range(2))
    tokens = torch.randn(2, 5, 3)
    made = joined(SimpleNamespace(pooler_output=own, deepstack_features=[layer_of(added)]), tokens)
    (layer,) = made.deepstack_features
    assert torch.equal(torch.cat(made.pooler_output), torch.cat([tokens[0], own[0], tokens[1], own[1]]))
    layer = layer if isinstance(layer, torch.Tensor) else torch.cat(layer)
    assert torch.equal(layer, torch.cat([torch.zeros(5, 3), added[0], torch.zeros(5, 3), added[1]]))
