"""Tiny models with random weights, one for each family: how they are built, and what they are given for a row of pictures.

A picture is `(tiles, 3, height, width)`, of one tile where the family does not cut pictures up. What is written here about where
patches pass and how they are laid out is found out from the families' own code, apart from `families.py` and `features.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from einops import rearrange
from packaging.version import Version
from torch import nn

SINCE = "5.17"  # the models' inputs, and what each family can do, are those of this version and newer ones
needs_known_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version(SINCE), reason=f"the table of families is that of transformers {SINCE} and newer"
)

PAD, IMAGE, VIDEO, START, END, BREAK, SEPARATOR = 0, 100, 102, 103, 104, 105, 106
WORDS = 128

Picture = torch.Tensor
Captured = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family.

    Args:
        family: Its `model_type`.
        build: Makes the model.
        ids: A picture's tokens in `input_ids`.
        pixels: The pictures of each row, as the model takes them.
        tap: The module whose input is the patch features, by its path below `model.base_model`.
        maps: That input, as one map `(H, W, C)` for each tile.
        shapes: `(tiles, height, width)` of the pictures that the tests make, in turn.
        cell: Pixels of a map's cell along a side.
        attach: What `attach` is told.
        around: What goes with `input_ids`.
        thumbnail: The tile that is the whole picture.
        tile_length: The image tokens of a tile; 0 where tiles are not one after another; None where pictures are not cut.
        padding: The side on which rows are padded.
        since: The first version of transformers that has the family, as it is built here.
        broken: A version of transformers (5.24: with all its patches) in which the model itself cannot run.
        together: Cells along a side that the vision tower computes from the same pixels.
        raster_shapes: More shapes for the test of the patches' order.
    """

    family: str
    build: Callable[[], nn.Module]
    ids: Callable[[Picture], list[int]]
    pixels: Callable[[list[list[Picture]]], dict[str, torch.Tensor]] = lambda rows: {"pixel_values": stacked(rows)}
    tap: str = "multi_modal_projector"
    maps: Callable[[nn.Module, Captured, list[Picture], int], list[torch.Tensor]] = lambda *given: square(*given)
    shapes: tuple[tuple[int, int, int], ...] = ((1, 32, 32),)
    cell: int = 8
    attach: dict[str, Any] = field(default_factory=dict)
    around: Callable[[torch.Tensor, list[list[Picture]]], dict[str, torch.Tensor]] = lambda ids, rows: {}
    thumbnail: int = 0
    tile_length: int | None = None
    padding: str = "left"
    since: str = "5.0"
    broken: str | None = None
    together: int = 1
    raster_shapes: tuple[tuple[int, int, int], ...] = ()

    def model(self) -> nn.Module:
        """Built anew, always the same."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for each in model.parameters():
                if each.is_floating_point() and each.numel() and each.abs().max() < 1e-3:  # weights that start from nothing
                    each.normal_(std=0.02)
        return model

    def pictures(self, counts: Sequence[int], seed: int = 0) -> list[list[Picture]]:
        """Random pictures for rows, their shapes in turn."""
        generator, rows, made = torch.Generator().manual_seed(seed), [], 0
        for count in counts:
            row = []
            for _ in range(count):
                tiles, height, width = self.shapes[made % len(self.shapes)]
                row.append(torch.rand(tiles, 3, height, width, generator=generator) + 0.01)
                made += 1
            rows.append(row)
        return rows

    def inputs(self, rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        """Everything that the model is given for rows of these pictures; the text of a row goes by its pictures."""
        texts = []
        for row in rows:
            text = [1, 5 + len(row), 6]
            for picture in row:
                text += [*self.ids(picture), 20 + int(picture.sum()) % 50]
            texts.append([*text, 7, 8, 9 + len(row)])
        length = max(map(len, texts))
        pads = [[PAD] * (length - len(text)) for text in texts]
        left = self.padding == "left"
        ids = torch.tensor([pad + text if left else text + pad for pad, text in zip(pads, texts, strict=True)])
        real = [
            [0] * len(pad) + [1] * len(text) if left else [1] * len(text) + [0] * len(pad)
            for pad, text in zip(pads, texts, strict=True)
        ]
        pixels = self.pixels(rows) if any(rows) else {}
        return {"input_ids": ids, "attention_mask": torch.tensor(real), **self.around(ids, rows), **pixels}

    def tokens_per_image(self, rows: list[list[Picture]], *, tiles: bool = False) -> list[int]:
        """The image tokens of each picture, or of each tile where they are one after another."""
        if tiles and self.tile_length:
            return [self.tile_length] * sum(len(picture) for picture in flat(rows))
        return [self.ids(picture).count(IMAGE) for picture in flat(rows)]

    def grid(self, picture: Picture) -> tuple[int, int]:
        """The map's rows and columns."""
        return picture.shape[-2] // self.cell, picture.shape[-1] // self.cell


MODELS: dict[str, Tiny] = {}


@cache
def prototype(name: str) -> nn.Module:
    """A model to make deep copies of."""
    tiny = MODELS[name]
    if Version(transformers.__version__) < Version(tiny.since):
        pytest.skip(f"transformers {transformers.__version__} has no {tiny.family} as it is built here; {tiny.since} has")
    if tiny.broken is not None and Version(transformers.__version__).release[:2] == Version(tiny.broken).release:
        pytest.skip(f"transformers {transformers.__version__} cannot run its own {tiny.family}")
    return tiny.model()


def register(make: Callable[[], Tiny]) -> Callable[[], Tiny]:
    """Puts a family's tiny model into `MODELS`, under its function's name."""
    MODELS[make.__name__] = make()
    return make


# How patch features lie in a tap's input.


def square(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """`(tiles, H * W, C)`."""
    tiles = torch.cat([each.reshape(-1, *each.shape[-2:]) for each in captured])
    return [rearrange(each, "(h w) c -> h w c", h=pictures[0].shape[-2] // cell) for each in tiles]


def class_token_first(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """`(tiles, 1 + H * W, C)`."""
    return square(model, [each[:, 1:] for each in captured], pictures, cell)


def channels_first(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """`(tiles, C, H, W)`."""
    return [rearrange(each, "c h w -> h w c") for each in torch.cat(list(captured))]


def side_by_side(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """`(1, H, W, C)` for each picture; since transformers 5.24 all in one row of blocks of 2 x 2, with room for the largest."""
    sizes = [(each.shape[-2] // cell, each.shape[-1] // cell) for each in pictures]
    if Version(transformers.__version__) < Version("5.24"):
        return [each[0] for each in captured]
    images = rearrange(captured[0][0], "a (n t b) c -> n t a b c", n=len(pictures), b=2)
    return [
        rearrange(each[: h * w // 4], "(h w) a b c -> (h a) (w b) c", h=h // 2) for each, (h, w) in zip(images, sizes, strict=True)
    ]


def packed(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """All pictures' patches, one after another, row by row."""
    return [
        rearrange(each, "(h w) c -> h w c", h=picture.shape[-2] // cell)
        for each, picture in zip(_pieces(captured, pictures, cell), pictures, strict=True)
    ]


def blocks(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """All pictures' patches, one after another, in blocks of 2 x 2."""
    return [
        rearrange(each, "(h w a b) c -> (h a) (w b) c", a=2, b=2, h=picture.shape[-2] // cell // 2)
        for each, picture in zip(_pieces(captured, pictures, cell), pictures, strict=True)
    ]


def windows(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """Blocks, in the order of attention windows of 2 x 2 blocks; the pictures' sides are multiples of a window's."""
    return [
        rearrange(each, "(h w i j a b) c -> (h i a) (w j b) c", i=2, j=2, a=2, b=2, h=picture.shape[-2] // cell // 4)
        for each, picture in zip(_pieces(captured, pictures, cell), pictures, strict=True)
    ]


def cropped(model: nn.Module, captured: Captured, pictures: list[Picture], cell: int) -> list[torch.Tensor]:
    """Maps of the largest height and width, each picture at the top left of its own."""
    height, width = (max(picture.shape[side] for picture in pictures) // cell for side in (-2, -1))
    maps = rearrange(torch.cat(list(captured)), "t (h w) c -> t h w c", h=height, w=width)
    sizes = [(picture.shape[-2] // cell, picture.shape[-1] // cell) for picture in pictures for _ in picture]
    return [each[:h, :w] for each, (h, w) in zip(maps, sizes, strict=True)]


def _pieces(captured: Captured, pictures: list[Picture], cell: int) -> Sequence[torch.Tensor]:
    patches = torch.cat([each.reshape(-1, each.shape[-1]) for each in captured])
    return patches.split([picture.shape[-2] * picture.shape[-1] // cell**2 for picture in pictures])


# How pictures lie in what a model is given.


def flat(rows: list[list[Picture]]) -> list[Picture]:
    return [picture for row in rows for picture in row]


def stacked(rows: list[list[Picture]]) -> torch.Tensor:
    """`(tiles, 3, H, W)`."""
    return torch.cat(flat(rows))


def with_image_sizes(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    """Padded on the right and below, with the sizes beside."""
    pictures = flat(rows)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (-2, -1))
    padded = [nn.functional.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in pictures]
    return {"pixel_values": torch.cat(padded), "image_sizes": torch.tensor([list(each.shape[-2:]) for each in pictures])}


def with_tiles(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    """Any-resolution: tiles padded to the most, and the size of the picture that they were cut from."""
    pictures = flat(rows)
    most = max(map(len, pictures))
    padded = [torch.cat([each, each.new_zeros(most - len(each), *each.shape[1:])]) for each in pictures]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([uncut(each) for each in pictures])}


def uncut(picture: Picture) -> list[int]:
    """The size of a picture that is cut into a thumbnail and 2 or 4 tiles of 32 x 32."""
    return {3: [32, 64], 5: [64, 64]}[len(picture)]


def by_row(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    """`(rows, most tiles of a row, 3, H, W)`, with a mask of the pixels that are there."""
    pictures = flat(rows)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (-2, -1))
    most = max(sum(map(len, row)) for row in rows)
    pixels = torch.zeros(len(rows), most, 3, height, width)
    mask = torch.zeros(len(rows), most, height, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, tile in enumerate(tile for picture in row for tile in picture):
            pixels[i, j, :, : tile.shape[-2], : tile.shape[-1]] = tile
            mask[i, j, : tile.shape[-2], : tile.shape[-1]] = True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def in_blocks(patch: int, frames: int = 2) -> Callable[[list[list[Picture]]], dict[str, torch.Tensor]]:
    """Patches in blocks of 2 x 2, a still picture being two equal frames, as Qwen2-VL's processor lays them."""

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        patches = [
            rearrange(each.expand(frames, -1, -1, -1), "t c (h a p) (w b q) -> (h w a b) (c t p q)", a=2, b=2, p=patch, q=patch)
            for each in flat(rows)
        ]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grids(rows, patch)}

    return pixels


def in_raster(patch: int, frames: int = 0) -> Callable[[list[list[Picture]]], dict[str, torch.Tensor]]:
    """Patches `(3, p, p)`, row by row; flattened, where there are frames."""

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        patches = [rearrange(each[0], "c (h p) (w q) -> (h w) c p q", p=patch, q=patch) for each in flat(rows)]
        if frames:
            patches = [each.unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1) for each in patches]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grids(rows, patch)}

    return pixels


def grids(rows: list[list[Picture]], patch: int) -> torch.Tensor:
    return torch.tensor([[1, each.shape[-2] // patch, each.shape[-1] // patch] for each in flat(rows)])


def padded_patches(rows: list[list[Picture]], patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(pictures, most patches, 3 * p * p)`, channels last in a patch, and which of them are there."""
    patches = [rearrange(each[0], "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch) for each in flat(rows)]
    there = [torch.ones(len(each), dtype=torch.long) for each in patches]
    pad = nn.utils.rnn.pad_sequence
    return pad(patches, batch_first=True), pad(there, batch_first=True)


# What goes with input_ids.


def media_types(ids: torch.Tensor, rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


# Language models.

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
PARTIAL_MROPE = {**MROPE, "partial_rotary_factor": 1.0}


def text(kind: str | None = "llama", **fields: Any) -> dict[str, Any]:
    """A language model's config; a field None is left out."""
    values = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": WORDS, "max_position_embeddings": 512, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": 2, **fields,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def opt() -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": WORDS, "max_position_embeddings": 256, "word_embed_proj_dim": 32, "pad_token_id": PAD, "bos_token_id": 1,
        "eos_token_id": 2, "dropout": 0.0,
    }  # fmt: skip


# Vision towers.


def vision(kind: str | None = None, **fields: Any) -> dict[str, Any]:
    values = {
        "model_type": kind, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, **fields,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def clip() -> dict[str, Any]:
    return vision("clip_vision_model", num_hidden_layers=3)


def siglip(**fields: Any) -> dict[str, Any]:
    return vision("siglip_vision_model", vision_use_head=False, **fields)


def pixtral() -> dict[str, Any]:
    return vision("pixtral", num_attention_heads=3, head_dim=8, image_size=64)


def qwen_vision(**fields: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
        "out_hidden_size": 32, **fields,
    }  # fmt: skip


def made(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Builds the model class of a name from the config class that goes with it."""
    kind = fields.pop("kind", f"{name}ForConditionalGeneration")
    return lambda: getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**deepcopy(fields)))


def loud(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """With convolutions that pass on what they see: many small ones in a row would leave nothing of it."""

    def built() -> nn.Module:
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return model

    return built


# What `attach` is told: a grid of 4 x 4 patches, and small widths.
SMALL = {"kernel_sizes": (2, 4), "detail_kernel_size": 2, "spatial_hidden_size": 8}
POOLED = {**SMALL, "grid_size": (4, 4), "resize": "pool"}
TWO_BY_TWO = {"kernel_sizes": (2,), "detail_kernel_size": 1, "detail_stride": 1, "spatial_hidden_size": 8}

DYNAMIC = ((1, 32, 48), (1, 48, 32), (1, 32, 32))


def images(count: int) -> Callable[[Picture], list[int]]:
    """So many image tokens for each tile."""
    return lambda picture: [IMAGE] * count * len(picture)


def lines(side: int) -> Callable[[Picture], list[int]]:
    """Pixtral's lines of tokens, each with a break after it and the last with an end."""

    def ids(picture: Picture) -> list[int]:
        height, width = picture.shape[-2] // side, picture.shape[-1] // side
        return [*([*[IMAGE] * width, BREAK] * height)[:-1], END]

    return ids


def area(side: int, *, opened: bool = True) -> Callable[[Picture], list[int]]:
    """A token for each square of so many pixels, between start and end."""

    def ids(picture: Picture) -> list[int]:
        run = [IMAGE] * (picture.shape[-2] // side * (picture.shape[-1] // side))
        return [START, *run, END] if opened else run

    return ids


# The families.


@register
def llava() -> Tiny:
    build = made("Llava", vision_config=clip(), text_config=text(), image_token_index=IMAGE, vision_feature_layer=-2)
    return Tiny("llava", build, images(16), attach=SMALL)


@register
def llava_siglip() -> Tiny:
    build = made(
        "Llava", vision_config=siglip(), text_config=text(), image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return Tiny("llava", build, images(16), attach=SMALL)


@register
def llava_pixtral() -> Tiny:
    build = made(
        "Llava", vision_config=pixtral(), text_config=text("mistral"), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return Tiny("llava", build, lines(8), pixels=with_image_sizes, maps=packed, shapes=DYNAMIC, attach=POOLED)


@register
def vipllava() -> Tiny:
    build = made("VipLlava", vision_config=clip(), text_config=text(), image_token_index=IMAGE, vision_feature_layers=[-1, -2])
    return Tiny("vipllava", build, images(16), attach=SMALL)


ANYRES = {"image_token_index": IMAGE, "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}


def anyres_ids(picture: Picture) -> list[int]:
    """The thumbnail's tokens, and the lines of the whole with a newline after each."""
    height, width = (side // 8 for side in uncut(picture))
    return [IMAGE] * (16 + height * (width + 1))


@register
def llava_next() -> Tiny:
    build = made("LlavaNext", vision_config=clip(), text_config=text(), vision_feature_layer=-2, **ANYRES)
    return Tiny(
        "llava_next", build, anyres_ids, pixels=with_tiles, shapes=((5, 32, 32), (3, 32, 32)), attach=SMALL,
        tile_length=0,
    )  # fmt: skip


@register
def llava_next_video() -> Tiny:
    build = made(
        "LlavaNextVideo", vision_config=clip(), text_config=text(), vision_feature_layer=-2, video_token_index=VIDEO,
        spatial_pool_mode="average", spatial_pool_stride=2, **ANYRES,
    )  # fmt: skip
    return replace(MODELS["llava_next"], family="llava_next_video", build=build)


@register
def llava_onevision() -> Tiny:
    build = made(
        "LlavaOnevision", vision_config=siglip(), text_config=text("qwen2"), video_token_index=VIDEO, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", **ANYRES,
    )  # fmt: skip
    return replace(MODELS["llava_next"], family="llava_onevision", build=build)


@register
def video_llava() -> Tiny:
    build = made(
        "VideoLlava", vision_config=clip(), text_config=text(), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-2,
    )  # fmt: skip
    return Tiny("video_llava", build, images(16), pixels=lambda rows: {"pixel_values_images": stacked(rows)}, attach=SMALL)


@register
def internvl() -> Tiny:
    build = made(
        "InternVL", vision_config=vision(image_size=[32, 32], patch_size=[8, 8]), text_config=text("qwen2"), image_token_id=IMAGE,
        downsample_ratio=0.5,
    )  # fmt: skip
    return Tiny(
        "internvl", build, images(4), shapes=((3, 32, 32), (1, 32, 32), (2, 32, 32)), cell=16, attach=TWO_BY_TWO, thumbnail=-1,
        tile_length=4,
    )  # fmt: skip


def qwen(family: str, build: Callable[[], nn.Module], **fields: Any) -> Tiny:
    values = {
        "pixels": in_blocks(4), "tap": "visual.merger", "maps": blocks, "shapes": DYNAMIC, "cell": 4, "attach": POOLED,
        "around": media_types,
    }  # fmt: skip
    return Tiny(family, build, **{"ids": area(8), **values, **fields})


QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@register
def qwen2_vl() -> Tiny:
    tower = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
    }
    return qwen("qwen2_vl", made("Qwen2VL", text_config=text(None, rope_parameters=MROPE), vision_config=tower, **QWEN))


@register
def qwen2_5_vl() -> Tiny:
    tower = qwen_vision(window_size=16, fullatt_block_indexes=[1])
    build = made("Qwen2_5_VL", text_config=text(None, rope_parameters=MROPE), vision_config=tower, **QWEN)
    return qwen("qwen2_5_vl", build, maps=windows, raster_shapes=((1, 40, 24),))  # windows cut off at the edges


@register
def qwen3_vl() -> Tiny:
    tower = qwen_vision(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    return qwen("qwen3_vl", made("Qwen3VL", text_config=text(None, rope_parameters=MROPE), vision_config=tower, **QWEN))


HYBRID = {
    "rope_parameters": PARTIAL_MROPE, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
}  # fmt: skip


@register
def qwen3_5() -> Tiny:
    tower = qwen_vision(num_position_embeddings=64)
    return qwen("qwen3_5", made("Qwen3_5", text_config=text(None, **HYBRID), vision_config=tower, **QWEN))


GLM = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": 107, "video_end_token_id": 108,
}  # fmt: skip


@register
def glm4v() -> Tiny:
    build = made("Glm4v", text_config=text(None, rope_parameters=PARTIAL_MROPE), vision_config=qwen_vision(image_size=48), **GLM)
    return qwen("glm4v", build, maps=packed, cell=8)


@register
def glm46v() -> Tiny:
    build = made(
        "Glm46V", text_config=text("glm4v_text", rope_parameters=PARTIAL_MROPE),
        vision_config={"model_type": "glm4v_vision", **qwen_vision(image_size=48)}, **GLM,
    )  # fmt: skip
    return qwen("glm46v", build, maps=packed, cell=8)


@register
def paddleocr_vl() -> Tiny:
    tower = vision(hidden_size=32, spatial_merge_size=2)
    build = made("PaddleOCRVL", text_config=text(None, rope_parameters=MROPE), vision_config=tower, **QWEN)
    return qwen("paddleocr_vl", build, ids=area(16), pixels=in_raster(8), tap="projector", maps=packed, cell=8)


@register
def video_llama_3() -> Tiny:
    build = made(
        "VideoLlama3", text_config=text("qwen2"), vision_config=vision(hidden_size=32, patch_size=4, image_size=None),
        image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        return {**in_blocks(4, frames=1)(rows), "image_merge_sizes": torch.tensor([2] * len(flat(rows)))}

    return qwen(
        "video_llama_3", build, ids=area(8, opened=False), pixels=pixels, tap="projector", maps=packed, cell=8,
        around=lambda ids, rows: {},
    )  # fmt: skip


@register
def gemma3() -> Tiny:
    build = made(
        "Gemma3", vision_config=siglip(), image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
        mm_tokens_per_image=4,
        text_config=text(
            "gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
    )  # fmt: skip
    return Tiny(
        "gemma3", build, lambda picture: [START, *[IMAGE] * 4, END], attach=SMALL,
        around=lambda ids, rows: {"token_type_ids": (ids == IMAGE).long()},
    )  # fmt: skip


@register
def shieldgemma2() -> Tiny:
    gemma = {"vision_config": siglip(), "mm_tokens_per_image": 4}
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    language = text("gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
    build = made("ShieldGemma2", kind="Gemma3ForConditionalGeneration", text_config=language, **gemma, **tokens)
    return replace(MODELS["gemma3"], family="shieldgemma2", build=build)


@register
def paligemma() -> Tiny:
    build = made(
        "PaliGemma", vision_config=siglip(projection_dim=32), text_config=text("gemma"), projection_dim=32, image_token_index=IMAGE
    )
    return Tiny("paligemma", build, images(16), attach=SMALL, around=lambda ids, rows: {"token_type_ids": torch.zeros_like(ids)})


@register
def gemma4() -> Tiny:
    language = text(
        None, sliding_window=16, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=WORDS, num_kv_shared_layers=0, global_head_dim=8, num_global_key_value_heads=2,
    )  # fmt: skip
    tower = vision(
        num_attention_heads=3, num_key_value_heads=3, head_dim=8, patch_size=4, image_size=None, pooling_kernel_size=2,
        default_output_length=16, position_embedding_size=64,
    )  # fmt: skip
    build = made(
        "Gemma4", text_config=language, vision_config=tower, audio_config=None, image_token_id=IMAGE, boi_token_id=START,
        eoi_token_id=END,
    )  # fmt: skip

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        patches, there = padded_patches(rows, 4)
        positions = torch.full((*there.shape, 2), -1)
        for i, picture in enumerate(flat(rows)):
            width = picture.shape[-1] // 4
            numbers = torch.arange(int(there[i].sum()))
            positions[i, : len(numbers)] = torch.stack([numbers % width, numbers // width], dim=-1)
        return {"pixel_values": patches, "image_position_ids": positions}

    return Tiny(
        "gemma4", build, area(8), pixels=pixels, tap="embed_vision", maps=packed, shapes=((1, 32, 32), (1, 16, 64), (1, 64, 16)),
        cell=8, attach=POOLED, around=media_types,
    )  # fmt: skip


@register
def gemma3n() -> Tiny:
    language = text(
        None, num_hidden_layers=2, intermediate_size=[64, 64], sliding_window=16, num_kv_shared_layers=0, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8, vocab_size_per_layer_input=WORDS,
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    build = made(
        "Gemma3n", text_config=language, image_token_id=IMAGE, audio_token_id=110, vision_soft_tokens_per_image=256,
        vision_config={
            "hidden_size": 2048, "vocab_size": 8, "vocab_offset": WORDS, "architecture": "mobilenetv5_300m_enc",
            "do_pooling": False, "model_args": {"channel_multiplier": 0.05},
        },
        audio_config={
            "hidden_size": 16, "vocab_size": 8, "vocab_offset": WORDS + 8, "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1, "conf_attention_context_left": 2, "sscp_conv_channel_size": [8, 4],
        },
    )  # fmt: skip

    def padded_with_something() -> nn.Module:
        """The gradient of a row of zeros is not a number."""
        model = build()
        with torch.no_grad():
            for each in (model.get_input_embeddings(), model.model.language_model.embed_tokens_per_layer):
                each.weight[PAD] = each.weight[WORDS - 1]
        return model

    return Tiny(
        "gemma3n",
        padded_with_something,
        images(256),
        tap="embed_vision",
        shapes=((1, 256, 256),),
        cell=16,
        together=2,
        attach=POOLED,
    )


@register
def idefics2() -> Tiny:
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16,
        "num_key_value_heads": 1, "hidden_act": "silu",
    }  # fmt: skip
    build = made(
        "Idefics2", text_config=text("mistral"), vision_config=vision(hidden_size=32), perceiver_config=perceiver,
        image_token_id=IMAGE,
    )  # fmt: skip

    return Tiny(
        "idefics2", build, lambda picture: [START, *[IMAGE] * 4] * len(picture) + [START], pixels=by_row, tap="connector",
        maps=cropped, shapes=((1, 32, 24), (3, 16, 32), (1, 32, 32)), attach=POOLED, thumbnail=-1, tile_length=4,
    )  # fmt: skip


def idefics_ids(picture: Picture) -> list[int]:
    """Tiles with their places named, then the thumbnail."""
    tiles = [token for i in range(len(picture) - 1) for token in (START, 110 + i, *[IMAGE] * 4)]
    return [*tiles, START, 109, *[IMAGE] * 4, START]


IDEFICS = {"text_config": text(), "vision_config": vision(), "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": PAD}


@register
def idefics3() -> Tiny:
    return Tiny(
        "idefics3", made("Idefics3", **IDEFICS), idefics_ids, pixels=by_row, tap="connector", attach=SMALL, thumbnail=-1,
        shapes=((3, 32, 32), (1, 32, 32), (2, 32, 32)), tile_length=4,
    )  # fmt: skip


@register
def smolvlm() -> Tiny:
    return replace(MODELS["idefics3"], family="smolvlm", build=made("SmolVLM", **IDEFICS))


@register
def mistral3() -> Tiny:
    build = made("Mistral3", text_config=text("mistral"), vision_config=pixtral(), image_token_index=IMAGE, spatial_merge_size=2)
    return Tiny("mistral3", build, lines(16), pixels=with_image_sizes, maps=packed, shapes=DYNAMIC, attach=POOLED)


@register
def lighton_ocr() -> Tiny:
    build = made("LightOnOcr", text_config=text("qwen3"), vision_config=pixtral(), image_token_id=IMAGE, spatial_merge_size=2)
    return replace(MODELS["mistral3"], family="lighton_ocr", build=build, ids=area(16, opened=False), tap="vision_projection")


def cut(family: str, build: Callable[[], nn.Module], **fields: Any) -> Tiny:
    """Pictures in tiles of 4 tokens, one after another, the thumbnail last."""
    values = {"shapes": ((3, 32, 32), (1, 32, 32), (2, 32, 32)), "attach": SMALL, "thumbnail": -1, "tile_length": 4}
    return Tiny(family, build, images(4), **{**values, **fields})


@register
def aya_vision() -> Tiny:
    build = made(
        "AyaVision", text_config=text("cohere2", head_dim=None), vision_config=siglip(), image_token_index=IMAGE,
        downsample_factor=2, alignment_intermediate_size=64, vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return cut("aya_vision", build)


@register
def cohere2_vision() -> Tiny:
    build = made(
        "Cohere2Vision", text_config=text("cohere2", head_dim=None), vision_config=siglip(), image_token_id=IMAGE,
        downsample_factor=2, alignment_intermediate_size=64,
    )  # fmt: skip
    return cut("cohere2_vision", build)


@register
def llama4() -> Tiny:
    language = text(
        None, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, moe_layers=[], attention_chunk_size=256
    )
    tower = vision(
        hidden_size=32, intermediate_size=128, pixel_shuffle_ratio=0.5, projector_input_dim=32, projector_output_dim=32,
        vision_output_dim=32,
    )  # fmt: skip
    build = made("Llama4", text_config=language, vision_config=tower, image_token_index=IMAGE)
    return cut("llama4", build, tap="vision_model.vision_adapter", broken="5.24")


@register
def perception_lm() -> Tiny:
    tower = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": False, "num_classes": 0,
        "global_pool": "",
        "model_args": {
            "img_size": [32, 32], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "use_post_transformer_norm": False,
            "init_values": 0.1, "ref_feat_shape": (4, 4),
        },
    }  # fmt: skip
    build = made(
        "PerceptionLM", text_config=text(), vision_config=tower, vision_use_cls_token=True, image_token_id=IMAGE,
        video_token_id=VIDEO, projector_pooling_ratio=2,
    )  # fmt: skip
    return cut(
        "perception_lm", build, shapes=((3, 32, 32),), thumbnail=0, attach={**SMALL, "grid_size": (4, 4)},
        pixels=lambda rows: {"pixel_values": torch.stack(flat(rows))},
    )  # fmt: skip


@register
def ovis2() -> Tiny:
    tower = vision(hidden_stride=2, vocab_size=40, num_visual_indicator_tokens=5)
    build = made(
        "Ovis2", text_config=text("qwen2"), vision_config=tower, image_token_id=IMAGE, vocab_size=WORDS, hidden_size=32,
        visual_indicator_token_ids=[110, 111, 112, 113, 114],
    )  # fmt: skip
    return Tiny(
        "ovis2", build, lambda picture: [110, *[IMAGE] * 4, 111], tap="vision_tower.head_linear", cell=16, attach=TWO_BY_TWO
    )


@register
def deepseek_vl() -> Tiny:
    build = made("DeepseekVL", text_config=text(), vision_config=siglip(), image_token_id=IMAGE)
    return Tiny("deepseek_vl", build, images(16), tap="aligner", attach=SMALL)


@register
def janus() -> Tiny:
    quantizer = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "projection_dim": 32, "num_hidden_layers": 1, "hidden_size": 32, "image_token_embed_dim": 32,
        "num_patches": 4,
    }  # fmt: skip
    tower = vision(mlp_ratio=2, projection_dim=32, depth=2, intermediate_size=None)
    build = made("Janus", text_config=text(), vision_config=tower, vq_config=quantizer, image_token_id=IMAGE)
    return Tiny("janus", build, images(16), tap="aligner", attach=SMALL)


@register
def aria() -> Tiny:
    tower = vision("idefics3_vision")
    build = made(
        "Aria", text_config=text(None, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1), vision_config=tower,
        image_token_index=IMAGE, projector_patch_to_query_dict={16: 4}, vision_feature_layer=-1,
    )  # fmt: skip
    return Tiny("aria", build, images(4), attach=SMALL, since="5.18")


@register
def fast_vlm() -> Tiny:
    tower = {
        "model_type": "timm_wrapper", "hidden_size": 256, "architecture": "fastvit_mci0", "do_pooling": False, "num_classes": 0,
        "model_args": {"inference_mode": False, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    }  # fmt: skip
    build = loud(made("FastVlm", text_config=text("qwen2"), vision_config=tower, image_token_id=IMAGE))
    return Tiny("fast_vlm", build, images(16), shapes=((1, 128, 128),), cell=32, attach={**SMALL, "grid_size": (4, 4)})


@register
def lfm2_vl() -> Tiny:
    tower = vision("siglip2_vision_model", num_patches=64, image_size=None, vision_use_head=False)
    build = made(
        "Lfm2Vl", text_config=text("lfm2", head_dim=None, layer_types=["conv", "full_attention"], block_multiple_of=16),
        vision_config=tower, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32,
    )  # fmt: skip

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        patches, there = padded_patches(rows, 8)
        return {"pixel_values": patches, "pixel_attention_mask": there, "spatial_shapes": grids(rows, 8)[:, 1:]}

    return Tiny("lfm2_vl", build, area(16, opened=False), pixels=pixels, maps=side_by_side, cell=8, shapes=DYNAMIC, attach=POOLED)


GOT = {
    "text_config": text("qwen2"), "image_token_index": IMAGE,
    "vision_config": {
        "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 4, "mlp_dim": 48, "global_attn_indexes": [1], "window_size": 2,
    },
}  # fmt: skip


@register
def got_ocr2() -> Tiny:
    return Tiny(
        "got_ocr2", made("GotOcr2", **GOT), images(16), maps=channels_first, shapes=((1, 64, 64),), cell=4,
        attach={**SMALL, "kernel_sizes": (8, 16)},
    )  # fmt: skip


@register
def pp_chart2table() -> Tiny:
    build = made("PPChart2Table", kind="GotOcr2ForConditionalGeneration", **GOT)
    return replace(MODELS["got_ocr2"], family="pp_chart2table", build=build)


@register
def florence2() -> Tiny:
    language = {
        "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": WORDS,
        "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, "dropout": 0.0,
    }  # fmt: skip
    tower = {
        "depths": [1, 1, 1, 1], "embed_dim": [8, 16, 16, 24], "num_heads": [1, 2, 2, 2], "num_groups": [1, 2, 2, 2],
        "window_size": 4, "projection_dim": 32, "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1], "patch_prenorm": [False, True, True, True],
    }  # fmt: skip
    build = made("Florence2", text_config=language, vision_config=tower, image_token_id=IMAGE, is_encoder_decoder=True)
    return Tiny(
        "florence2", build, images(17), maps=channels_first, shapes=((1, 128, 128),), cell=32,
        attach={**SMALL, "grid_size": (4, 4)}, padding="right",
        around=lambda ids, rows: {"decoder_input_ids": torch.tensor([[2, 3]] * len(rows))},
    )  # fmt: skip


QFORMER = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "encoder_hidden_size": 24,
    "vocab_size": WORDS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BLIP = {
    "text_config": opt(),
    "vision_config": vision(),
    "qformer_config": QFORMER,
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
}


@register
def blip_2() -> Tiny:
    return Tiny("blip-2", made("Blip2", **BLIP), images(4), tap="qformer", maps=class_token_first, attach=SMALL)


@register
def instructblip() -> Tiny:
    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        pictures = stacked(rows)
        return {"pixel_values": pictures, "qformer_input_ids": torch.ones(len(pictures), 3, dtype=torch.long)}

    return replace(MODELS["blip_2"], family="instructblip", build=made("InstructBlip", **BLIP), pixels=pixels)


@register
def minicpmv4_6() -> Tiny:
    tower = vision(num_hidden_layers=3, image_size=64)
    build = made(
        "MiniCPMV4_6", text_config=text("qwen3"), vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1,
    )  # fmt: skip

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        strips = [rearrange(each[0], "c (h p) (w q) -> c p (h w q)", p=8, q=8) for each in flat(rows)]
        return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": grids(rows, 8)[:, 1:]}

    return Tiny(
        "minicpmv4_6", build, area(32, opened=False), pixels=pixels, tap="merger", maps=packed, cell=16,
        shapes=((1, 64, 64), (1, 32, 96), (1, 96, 32)), attach=POOLED, since="5.18",
    )  # fmt: skip


@register
def glmga() -> Tiny:
    build = made(
        "Glmga", kind="Glm46VForConditionalGeneration", text_config=text("glm4v_text", rope_parameters=PARTIAL_MROPE),
        vision_config={"model_type": "glm4v_vision", **qwen_vision(image_size=48)}, **GLM,
    )  # fmt: skip
    return qwen("glmga", build, maps=packed, cell=8)


@register
def glm_ocr() -> Tiny:
    build = made("GlmOcr", text_config=text(None, rope_parameters=PARTIAL_MROPE), vision_config=qwen_vision(image_size=48), **GLM)
    return qwen("glm_ocr", build, maps=packed, cell=8)


@register
def glm4v_moe() -> Tiny:
    language = text(
        None, rope_parameters=PARTIAL_MROPE, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    build = made("Glm4vMoe", text_config=language, vision_config=qwen_vision(image_size=48), **GLM)
    return qwen("glm4v_moe", build, maps=packed, cell=8)


EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip


@register
def qwen3_vl_moe() -> Tiny:
    tower = qwen_vision(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    build = made("Qwen3VLMoe", text_config=text(None, rope_parameters=MROPE, **EXPERTS), vision_config=tower, **QWEN)
    return qwen("qwen3_vl_moe", build)


@register
def cosmos3_omni() -> Tiny:
    tower = qwen_vision(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    build = made("Cosmos3Omni", text_config=text(None, rope_parameters=MROPE), vision_config=tower, **QWEN)
    return qwen("cosmos3_omni", build)


@register
def qwen3_5_moe() -> Tiny:
    tower = qwen_vision(num_position_embeddings=64)
    return qwen("qwen3_5_moe", made("Qwen3_5Moe", text_config=text(None, **HYBRID, **EXPERTS), vision_config=tower, **QWEN))


@register
def exaone4_5() -> Tiny:
    language = text("exaone4", sliding_window=16, sliding_window_pattern=2, layer_types=["sliding_attention", "full_attention"])
    tower = qwen_vision(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=2)
    build = made("Exaone4_5_", text_config=language, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO)
    return qwen("exaone4_5", build, maps=windows, raster_shapes=((1, 40, 24),), around=lambda ids, rows: {})


AUDIO = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 16, "output_dim": 32,
    "n_window": 4,
}  # fmt: skip


@register
def qwen2_5_omni_thinker() -> Tiny:
    build = made(
        "Qwen2_5OmniThinker", text_config=text(None, rope_parameters=MROPE), audio_config=AUDIO,
        vision_config=qwen_vision(window_size=16, fullatt_block_indexes=[1]), image_token_index=IMAGE, video_token_index=VIDEO,
        audio_token_index=110, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return qwen("qwen2_5_omni_thinker", build, maps=windows, raster_shapes=((1, 40, 24),), around=lambda ids, rows: {})


@register
def qwen3_omni_moe_thinker() -> Tiny:
    build = made(
        "Qwen3OmniMoeThinker", text_config=text(None, rope_parameters=MROPE, **EXPERTS),
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        vision_config=qwen_vision(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64), image_token_id=IMAGE,
        video_token_id=VIDEO, audio_token_id=110, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return qwen("qwen3_omni_moe_thinker", build, around=lambda ids, rows: {})


@register
def qianfan_ocr() -> Tiny:
    build = made(
        "QianfanOCR", vision_config=vision(image_size=[32, 32], patch_size=[8, 8]), text_config=text("qwen3"),
        image_token_id=IMAGE, downsample_ratio=0.5,
    )  # fmt: skip
    return replace(MODELS["internvl"], family="qianfan_ocr", build=build)


@register
def mistral_large4() -> Tiny:
    language = text(
        None, moe_intermediate_size=16, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=None, num_key_value_heads=4,
        mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    build = made("MistralLarge4", text_config=language, vision_config=pixtral(), image_token_index=IMAGE, spatial_merge_size=2)
    return replace(MODELS["mistral3"], family="mistral_large4", build=build, since="5.18")


@register
def cohere_compass() -> Tiny:
    tower = qwen_vision(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    language = text(
        None, head_dim=None, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": MROPE, "full_attention": MROPE},
    )  # fmt: skip
    return qwen("cohere_compass", made("CohereCompass", text_config=language, vision_config=tower, **QWEN))


@register
def qwen4_exp() -> Tiny:
    tower = qwen_vision(num_position_embeddings=64)
    layers = {"layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8}
    indexer = {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 512, "indexer_compress_ratio": 4
    }  # fmt: skip
    language = text(None, **{**HYBRID, **EXPERTS, **layers, **indexer})
    return qwen("qwen4_exp", made("Qwen4Exp", text_config=language, vision_config=tower, **QWEN), since="5.18")


@register
def glm5_next() -> Tiny:
    language = text(
        None, moe_intermediate_size=16, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=0, qk_nope_head_dim=8, v_head_dim=8, head_dim=None, num_key_value_heads=4,
        mlp_layer_types=["dense", "sparse"], layer_types=["linear_attention", "indexed_attention"], index_topk=512,
        index_head_dim=8, index_n_heads=2, linear_head_dim=8, linear_num_heads=2,
    )  # fmt: skip
    tower = qwen_vision(image_size=48, projection_intermediate_size=32)
    return qwen("glm5_next", made("Glm5Next", text_config=language, vision_config=tower, **GLM), maps=packed, cell=8, since="5.18")


@register
def lfm3_vl() -> Tiny:
    language = text("lfm3", layer_types=["conv", "full_attention"], sliding_window=16)
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "patch_size": 4, "spatial_merge_size": 2, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    build = made("Lfm3Vl", text_config=language, vision_config=tower, projector_hidden_size=32, **QWEN)
    return qwen("lfm3_vl", build, tap="multi_modal_projector", around=lambda ids, rows: {}, since="5.18")


@register
def cosmos3_edge() -> Tiny:
    tower = vision(hidden_size=32, patch_size=4, image_size=None, num_patches=64, spatial_merge_size=2)
    build = made(
        "Cosmos3Edge", text_config=text(None, rope_parameters=MROPE), vision_config=tower, projector_hidden_size=32, **QWEN
    )
    return qwen("cosmos3_edge", build, tap="projector", pixels=in_blocks(4, frames=1))


@register
def ernie4_5_vl_moe() -> Tiny:
    language = text(
        None, head_dim=None, moe_intermediate_size=[16, 16], moe_k=1, moe_num_experts=2, moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"], rope_parameters=MROPE,
    )  # fmt: skip
    tower = qwen_vision(out_hidden_size=None, temporal_merge_size=2)
    build = made("Ernie4_5_VLMoe", text_config=language, vision_config=tower, **GLM)
    return qwen("ernie4_5_vl_moe", build, tap="resampler_model", pixels=in_blocks(4, frames=1))


@register
def hyperclovax_vision_v2() -> Tiny:
    tower = {"model_type": "qwen2_5_vl_vision", **qwen_vision(window_size=16, fullatt_block_indexes=[1])}
    build = made(
        "HyperCLOVAXVisionV2", text_config=text("hyperclovax"), vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return qwen("hyperclovax_vision_v2", build, tap="projector", maps=packed, cell=8, around=lambda ids, rows: {}, since="5.18")


@register
def deepseek_vl_hybrid() -> Tiny:
    build = made(
        "DeepseekVLHybrid", text_config=text(), vision_config=siglip(), image_token_id=IMAGE,
        high_res_vision_config={
            "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
            "patch_size": 4, "mlp_dim": 48, "global_attn_indexes": [0, 1], "window_size": 2,
        },
    )  # fmt: skip

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        pictures = stacked(rows)
        return {"pixel_values": pictures, "high_res_pixel_values": nn.functional.interpolate(pictures, scale_factor=2)}

    return Tiny("deepseek_vl_hybrid", build, images(16), pixels=pixels, tap="aligner", attach=SMALL)


@register
def minicpmv4_7() -> Tiny:
    language = text(None, **{**HYBRID, "rope_parameters": {**PARTIAL_MROPE, "partial_rotary_factor": 1.0}})
    tower = vision(num_hidden_layers=3, image_size=64)
    build = made(
        "MiniCPMV4_7", text_config=language, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, insert_layer_id=1
    )
    return replace(MODELS["minicpmv4_6"], family="minicpmv4_7", build=build, around=media_types)


@register
def minicpm_ocr() -> Tiny:
    tower = vision(num_hidden_layers=3, image_size=64)
    build = made(
        "MiniCPMOcr", text_config=text(None, **HYBRID), vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1,
    )  # fmt: skip
    return replace(MODELS["minicpmv4_6"], family="minicpm_ocr", build=build, ids=area(16, opened=False), cell=8)


@register
def minimax_m3_vl() -> Tiny:
    language = text(
        None, dense_intermediate_size=32, shared_intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, rotary_dim=8,
        mlp_layer_types=["dense", "sparse"], index_n_heads=2, index_head_dim=8, index_block_size=128,
    )  # fmt: skip
    tower = vision(hidden_size=32, patch_size=4, image_size=64, temporal_patch_size=2, spatial_merge_size=2)
    build = made(
        "MiniMaxM3VL", kind="MiniMaxM3SparseForConditionalGeneration", text_config=language, vision_config=tower,
        image_token_index=IMAGE, video_token_index=VIDEO, projector_hidden_size=32, merged_hidden_size=128,
    )  # fmt: skip
    return qwen("minimax_m3_vl", build, tap="multi_modal_projector", around=lambda ids, rows: {})


def muse(name: str, **fields: Any) -> Callable[[], nn.Module]:
    tower = {
        "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4, "num_hidden_layers": 2,
        "hidden_size": 32, "intermediate_size": 48, "merge_size": 2, "layer_types": ["window_attention", "full_attention"],
        "window_size": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    experts = {"num_local_experts": 2, "moe_hidden_size": 32, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
    language = text(None, sliding_window=16, layer_types=["sliding_attention", "full_attention"], **experts)
    return made(
        name, text_config=language, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, out_hidden_size=128,
        projector_hidden_size=32, **fields,
    )  # fmt: skip


@register
def muse_glimmer() -> Tiny:
    return qwen(
        "muse_glimmer", muse("MuseGlimmer"), tap="vision_adapter", maps=packed, cell=8, around=lambda ids, rows: {},
        pixels=in_raster(4, frames=2),
    )  # fmt: skip


MUSE_AUDIO = {"out_hidden_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_sizes": [2, 2, 2, 2]}


@register
def muse_spark() -> Tiny:
    return replace(MODELS["muse_glimmer"], family="muse_spark", since="5.18", build=muse("MuseSpark", audio_config=MUSE_AUDIO))


@register
def kimi_k25() -> Tiny:
    language = text(
        "deepseek_v3", moe_intermediate_size=16, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=None, num_key_value_heads=4, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    tower = {
        "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4, "num_hidden_layers": 2,
        "hidden_size": 32, "intermediate_size": 48, "merge_kernel_size": [2, 2],
    }  # fmt: skip
    build = made("Kimi_K25", text_config=language, vision_config=tower, projection_hidden_size=32, **QWEN)

    return qwen("kimi_k25", build, tap="mm_projector", pixels=in_raster(4), around=lambda ids, rows: {})


@register
def inkling2() -> Tiny:
    language = text(
        None, num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=8, sliding_window_size=16, d_rel=4, rel_extent=16, unpadded_vocab_size=WORDS - 4, n_routed_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, n_shared_experts=1,
    )  # fmt: skip
    tower = vision(
        hidden_size=32, patch_size=4, image_size=None, spatial_merge_size=2, posemb_grid_size=8, projection_hidden_dim=32,
        text_hidden_size=32,
    )  # fmt: skip
    build = made("Inkling2", text_config=language, vision_config=tower, image_token_id=IMAGE)

    def pixels(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
        tokens = [rearrange(each[0], "c (h p) (w q) -> (h w) p q c", p=8, q=8) for each in flat(rows)]
        return {"pixel_values": torch.cat(tokens), "image_grid_thw": grids(rows, 8)}

    return qwen(
        "inkling2", build, pixels=pixels, tap="vision_tower.merger", maps=packed, cell=8, around=lambda ids, rows: {}, since="5.18"
    )  # fmt: skip


@register
def dots3_note() -> Tiny:
    language = text(
        None, moe_intermediate_size=16, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=None, num_key_value_heads=4,
        mlp_layer_types=["dense", "sparse"], index_topk=512, index_head_dim=8, index_n_heads=2, sliding_window=16,
        layer_types=["sliding_attention", "indexed_attention"],
    )  # fmt: skip
    tower = vision(
        hidden_size=32, patch_size=4, image_size=None, moe_intermediate_size=16, spatial_merge_size=2, num_local_experts=2,
        num_experts_per_tok=1, mlp_layer_types=["dense", "dense"], adapter_in_dim=32, adapter_out_dim=32, adapter_merge_size=2,
        per_layer_config={},
    )  # fmt: skip
    audio = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "downsample_hidden_size": 8, "head_dim": 8, "adapter_input_size": 16, "adapter_out_dim": 32,
    }  # fmt: skip
    build = made(
        "Dots3Note", text_config=language, vision_config=tower, audio_config=audio, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=110,
    )  # fmt: skip
    return qwen(
        "dots3_note", build, tap="vision_tower.merger", pixels=in_blocks(4, frames=1), around=lambda ids, rows: {}, since="5.18"
    )  # fmt: skip


@register
def step3p7() -> Tiny:
    language = text(
        None, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, share_expert_dim=16, sliding_window=16,
        mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"], num_sliding_attention_heads=4,
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
    )  # fmt: skip
    tower = vision(hidden_size=32, image_size=128, max_position_embeddings=256, mlp_ratio=2.0)
    build = made("Step3p7", text_config=language, vision_config=tower, image_token_id=IMAGE)
    return Tiny("step3p7", build, images(16), shapes=((1, 128, 128),), cell=32, attach={**SMALL, "grid_size": (4, 4)})
