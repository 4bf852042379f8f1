"""From what a model's projector is given to maps of patches `(H, W, C)`, rows from the top, each from the left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch.nn import functional

from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.grid import Size

Arguments = Mapping[str, Any]
Maps = list[torch.Tensor]


def maps_of(layout: str, captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """One map for each image or tile, in the order in which the model was given them.

    Args:
        layout: A key of `LAYOUTS`.
        captured: The inputs of the projector's calls, one after another.
        arguments: What `get_image_features` was called with, by name.
        vision_config: The vision encoder's config.

    Raises:
        SpatialTokensError: If the features are not what the layout says.
    """
    return LAYOUTS[layout](captured, arguments, vision_config)


def square(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """`(T, N, C)`, N a square."""
    given = [name for name in OF_SEQUENCES if arguments.get(name) is not None]
    if given or any(found.ndim < 3 for found in captured):
        raise SpatialTokensError(
            f"the projector is given {tuple(captured[0].shape)}, with {' and '.join(given) or 'no sizes'}: patches of images one "
            "after another; this model's features lie in a way that is not known"
        )
    features = torch.cat([found.reshape(-1, *found.shape[-2:]) for found in captured])
    side = isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise SpatialTokensError(
            f"the projector is given {tuple(features.shape)}: {features.shape[1]} patches are no square; this model's features lie "
            "in a way that is not known"
        )
    return list(torch.unflatten(features, 1, (side, side)))


def after_class_token(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """`(T, 1 + N, C)`."""
    return square([found[:, 1:] for found in captured], arguments, vision_config)


def channels_first(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """`(T, C, H, W)`."""
    return [each for found in captured for each in _four_dimensions(found).permute(0, 2, 3, 1)]


def side_by_side(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `spatial_shapes` patches: `(1, H, W, C)` each or, since transformers 5.24, a row of the blocks that will be merged.

    Such a row is `(1, merge, T * merge, C)`, with as many of its `T` blocks for each image as the largest could have.
    """
    shapes = _rows(arguments, "spatial_shapes")
    if [list(_four_dimensions(found).shape[1:3]) for found in captured] == shapes:
        return [each for found in captured for each in found]
    (row,) = captured[0]
    merge = row.shape[0]
    blocks = row.reshape(merge, len(shapes), -1, merge, row.shape[-1]).permute(1, 2, 0, 3, 4).flatten(1, 3)
    return [_from_blocks(image[: h * w].unflatten(0, (h, w)), merge) for image, (h, w) in zip(blocks, shapes, strict=True)]


def by_image_sizes(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `image_sizes` pixels, one after another."""
    patch = _one(vision_config.patch_size)
    return _split(captured, [(height // patch, width // patch) for height, width in _rows(arguments, "image_sizes")])


def by_target_sizes(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `target_sizes` patches, or a quarter as many where the encoder has merged them."""
    sizes = _rows(arguments, "target_sizes")
    merged = _count(captured) * 4 == sum(height * width for height, width in sizes)
    return _split(captured, [(height // 2, width // 2) if merged else (height, width) for height, width in sizes])


def by_positions(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of the patches that `image_position_ids` names (x first; -1 is padding), averaged over squares."""
    sizes = [(1 + max(y for _, y in image), 1 + max(x for x, _ in image)) for image in arguments["image_position_ids"].tolist()]
    side = isqrt(sum(height * width for height, width in sizes) // max(1, _count(captured)))
    return _split(captured, [(height // side, width // side) for height, width in sizes])


def by_pixel_mask(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """`(T, N, C)`, the images at the top left of maps of the largest; `pixel_attention_mask` tells their sizes."""
    patch, pixels = _one(vision_config.patch_size), arguments["pixel_values"].flatten(0, 1)
    there, mask = pixels.flatten(1).any(1), arguments.get("pixel_attention_mask")
    mask = torch.ones_like(pixels[:, 0]) if mask is None else mask.flatten(0, 1)
    size = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    maps = _split(captured, [size] * int(there.sum()))
    sizes = [(int(each[:, 0].sum()) // patch, int(each[0].sum()) // patch) for each in mask[there]]
    return [each[:height, :width] for each, (height, width) in zip(maps, sizes, strict=True)]


def by_grid(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `image_grid_thw` patches."""
    return _split(captured, [(height, width) for _, height, width in _rows(arguments, "image_grid_thw")])


def by_merged_grid(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `image_grid_thw` patches, already merged."""
    merge = _merge(vision_config)
    return _split(captured, [(height // merge, width // merge) for _, height, width in _rows(arguments, "image_grid_thw")])


def by_pooled_grid(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `image_grid_thw` patches, already merged, each by its `image_merge_sizes`."""
    merges = arguments["image_merge_sizes"].tolist()
    grids = _rows(arguments, "image_grid_thw")
    return _split(captured, [(height // by, width // by) for (_, height, width), by in zip(grids, merges, strict=True)])


def by_blocks(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """Images of `image_grid_thw` patches, in blocks of the patches that will be merged."""
    return [_from_blocks(image, _merge(vision_config)) for image in by_grid(captured, arguments, vision_config)]


def by_windows(captured: Sequence[torch.Tensor], arguments: Arguments, vision_config: Any) -> Maps:
    """The same, and the blocks in the order of the encoder's attention windows."""
    merge = _merge(vision_config)
    window = vision_config.window_size // merge // vision_config.patch_size
    return [_from_blocks(_from_windows(image, merge, window), merge) for image in by_grid(captured, arguments, vision_config)]


LAYOUTS: dict[str, Callable[[Sequence[torch.Tensor], Arguments, Any], Maps]] = {
    "square": square,
    "class token": after_class_token,
    "channels first": channels_first,
    "side by side": side_by_side,
    "image sizes": by_image_sizes,
    "target sizes": by_target_sizes,
    "positions": by_positions,
    "padded": by_pixel_mask,
    "grid": by_grid,
    "grid of blocks": by_blocks,
    "grid of windows": by_windows,
    "merged grid": by_merged_grid,
    "pooled grid": by_pooled_grid,
}
OF_ANY_SIZE = ("side by side", "image sizes", "target sizes", "positions", "grid", "grid of blocks", "grid of windows",
               "merged grid", "padded", "pooled grid")  # fmt: skip

# Arguments that go with images of different sizes, whose patches no family that is not known may be thought to lie in squares.
OF_SEQUENCES = (
    "image_grid_thw",
    "grid_thw",
    "image_grid_hw",
    "image_grids",
    "target_sizes",
    "spatial_shapes",
    "image_position_ids",
)


def _from_blocks(image: torch.Tensor, merge: int) -> torch.Tensor:
    """Patches `(H, W, C)` that lie block after block, to raster order."""
    height, width, _ = image.shape
    blocks = image.reshape(height // merge, width // merge, merge, merge, -1)
    return blocks.transpose(1, 2).reshape(height, width, -1)


def _from_windows(image: torch.Tensor, merge: int, window: int) -> torch.Tensor:
    """Blocks of `(H, W, C)` that lie window after window, to block after block."""
    height, width = image.shape[0] // merge, image.shape[1] // merge
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    order = ((y // window) * width + x // window).flatten().argsort(stable=True)
    blocks = torch.unflatten(image.flatten(0, 1), 0, (height * width, merge**2))
    return blocks[order.argsort().to(image.device)].reshape(image.shape)


def _split(captured: Sequence[torch.Tensor], sizes: Iterable[tuple[int, int]]) -> Maps:
    """One sequence of patches, cut into maps of these sizes."""
    patches = torch.cat([found.reshape(-1, found.shape[-1]) for found in captured])
    sizes = list(sizes)
    lengths = [height * width for height, width in sizes]
    if sum(lengths) != len(patches):
        raise SpatialTokensError(
            f"the projector is given {len(patches)} patches, but the images' grids {sizes} have {sum(lengths)}; this model's "
            "features lie in a way that is not known"
        )
    return [torch.unflatten(each, 0, size) for each, size in zip(torch.split(patches, lengths), sizes, strict=True)]


def _rows(arguments: Arguments, name: str) -> list[list[int]]:
    rows: list[list[int]] = torch.as_tensor(arguments[name]).tolist()
    return rows


def _count(captured: Sequence[torch.Tensor]) -> int:
    return sum(found.numel() // found.shape[-1] for found in captured)


def _four_dimensions(found: torch.Tensor) -> torch.Tensor:
    if found.ndim != 4:
        raise SpatialTokensError(f"the projector is given {tuple(found.shape)}, not a map of four dimensions")
    return found


def _merge(vision_config: Any) -> int:
    """Patches along the side of a block that is merged."""
    found = (getattr(vision_config, name, None) for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"))
    return next(_one(each) for each in found if each is not None)


def _one(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def tiles_of(arguments: Arguments, config: Any) -> list[int]:
    """How many tiles each image is cut into, its thumbnail included, by what the model is called with."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    counts = arguments.get("batch_num_images")
    in_row = [1] * len(sizes) if counts is None else [n for n in torch.as_tensor(counts).tolist() for _ in range(n)]
    # LLaVA-OneVision cuts the one image of a row, and none of several
    return [int(image_size_to_num_patches(size, pinpoints, side)) if n == 1 else 1 for size, n in zip(sizes, in_row, strict=True)]


def joined(outputs: Any, tokens: torch.Tensor) -> Any:
    """An encoder's outputs with each image's spatial tokens before its own."""
    own = outputs.pooler_output
    if len(own) != len(tokens):
        raise SpatialTokensError(f"the model gives {len(own)} images' tokens for {len(tokens)} maps; use mode='own'")
    if isinstance(own, torch.Tensor):
        outputs.pooler_output = torch.cat([tokens.to(own), own], dim=1)
    else:
        outputs.pooler_output = type(own)(torch.cat([ours.to(theirs), theirs]) for ours, theirs in zip(tokens, own, strict=True))
    deep = getattr(outputs, "deepstack_features", None)
    if deep is not None:
        outputs.deepstack_features = [_with_zeros_before(layer, tokens.shape[1], [len(each) for each in own]) for layer in deep]
    return outputs


def _with_zeros_before(layer: Any, count: int, lengths: list[int]) -> Any:
    """What an encoder's layer adds to the image tokens, with nothing for the `count` spatial tokens before each image."""
    images = torch.split(layer, lengths) if isinstance(layer, torch.Tensor) else layer
    joined = [torch.cat([each.new_zeros(count, each.shape[-1]), each]) for each in images]
    return torch.cat(joined) if isinstance(layer, torch.Tensor) else joined


def thumbnails(maps: Maps, counts: Sequence[int], *, last: bool = False) -> Maps:
    """The first tile, or the last, of each image of so many tiles.

    Raises:
        SpatialTokensError: If these are not all tiles.
    """
    if sum(counts) != len(maps):
        raise SpatialTokensError(f"{len(maps)} tiles were encoded, but the images have {sum(counts)}: {list(counts)}")
    ends = list(accumulate(counts))
    return [maps[end - 1 if last else end - count] for end, count in zip(ends, counts, strict=True)]


def fitted(patches: torch.Tensor, grid: Size | None, resize: str | None) -> torch.Tensor:
    """A map `(H, W, C)` on another grid: averaged ("pool") or interpolated, in float32.

    Raises:
        SpatialTokensError: If it is on another and may not be resized.
    """
    if grid is None or tuple(patches.shape[:2]) == tuple(grid):
        return patches
    if resize is None:
        raise SpatialTokensError(
            f"an image has {patches.shape[0]}x{patches.shape[1]} patches, the projector's grid is {grid[0]}x{grid[1]}; attach with "
            "resize='pool' or 'interpolate', or with a config of that grid"
        )
    planes = patches.movedim(-1, 0)[None].float()  # torch interpolates no 16 bits on a CPU
    planes = (
        functional.adaptive_avg_pool2d(planes, grid)
        if resize == "pool"
        else functional.interpolate(planes, grid, mode="bilinear", antialias=True)
    )
    return planes[0].movedim(0, -1).to(patches)


def packed(maps: Maps) -> tuple[torch.Tensor, Size | list[Size]]:
    """Maps `(H, W, C)` as an SPProjector takes them: `(B, N, C)` and their grid, or `(sum of N, C)` and the grid of each."""
    grids: list[Size] = [(each.shape[0], each.shape[1]) for each in maps]
    patches = [each.flatten(0, 1) for each in maps]
    if all(grid == grids[0] for grid in grids):
        return torch.stack(patches), grids[0]
    return torch.cat(patches), grids
