"""The main job on a real picture: picture, encoder, projector, and what came out at each stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spatial_tokens import visualize
from spatial_tokens.adapters.timm import TimmPatchEncoder
from spatial_tokens.checks import check_seed
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.grid import crop_sizes
from spatial_tokens.modules import SPProjector
from spatial_tokens.pictures import read_picture
from spatial_tokens.storage.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

PAPER_ENCODER = "vit_large_patch14_clip_quickgelu_336.openai"
ENCODERS = {  # of presets that are made for another
    "siglip-l-16-384": "vit_large_patch16_siglip_384.webli",
    "internvit-300m-448": "vit_intern300m_patch14_448.ogvl_dist",
    "factorized-siglip-so400m": "vit_so400m_patch14_siglip_384.webli",
}
SMALL = {"embed_dim": 192, "depth": 4, "num_heads": 3}  # the same architecture on the same 24 x 24 grid, in a second on a laptop
SMALL_WIDTHS = {"text_hidden_size": 512, "spatial_hidden_size": 64}


@dataclass(frozen=True)
class Stage:
    """One row of the report: what ran, the shape of what it gave, its parameters and its time."""

    stage: str
    shape: tuple[int, ...]
    parameters: int
    milliseconds: float


@dataclass(frozen=True)
class Report:
    """What a demo did: its stages, the pictures it wrote and what to know about them."""

    stages: list[Stage] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(
        self, stage: str, part: nn.Module | None, work: Callable[[], Any], shape: Callable[[Any], Any] = lambda x: x.shape
    ) -> Any:
        """Runs a stage twice, keeps the second time, and gives its result."""
        work()
        start = time.perf_counter()
        result = work()
        milliseconds = 1000 * (time.perf_counter() - start)
        parameters = sum(p.numel() for p in part.parameters()) if part is not None else 0
        self.stages.append(Stage(stage, tuple(shape(result)), parameters, milliseconds))
        return result


def run_demo(
    image: str | None, output: str, *, preset: str, encoder_name: str | None, full_size: bool, pretrained: bool, seed: int
) -> Report:
    """Runs encoder and projector on a picture and draws figures 3 and 5 of the paper.

    Args:
        image: A picture's path; None for one that the demo draws.
        output: The directory for the PNGs.
        preset: The projector's preset; its grid and widths are fitted to the encoder.
        encoder_name: A timm model; when None the one that the preset is made for, narrowed unless `full_size` or `pretrained`.
        full_size: Whether to keep the preset's widths: about 6 GB of memory in float32.
        pretrained: Whether to load the encoder's weights from the hub.
        seed: Of the random weights.

    Raises:
        SpatialTokensError: If the picture cannot be read, the preset, the encoder or the seed is none that there is, or a PNG
            cannot be written.
    """
    check_seed(seed)
    report = Report()
    picture = read_picture(image) if image is not None else visualize.sample_picture()
    folder = make_directory(output)

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        small = not (full_size or pretrained or encoder_name is not None)
        name = ENCODERS.get(preset, PAPER_ENCODER) if encoder_name is None else encoder_name
        encoder = TimmPatchEncoder(name, pretrained=pretrained, **(SMALL if small else {})).eval()
        config = _fit(preset, encoder, {} if full_size else SMALL_WIDTHS, report)
        projector = SPProjector.from_config(config).eval()
        seen, attention = _run_stages(picture, encoder, projector, report)
    if (cut := _cut_off(picture.size, seen.size)) is not None:
        report.notes.append(cut)
    report.notes.append(_random(pretrained, small))

    figures = {f"windows-{config.variant}.png": visualize.draw_windows(seen, config.grid_size, config.kernel_sizes, config.variant)}
    if attention is not None and config.detail_kernel_size is not None and config.detail_stride is not None:
        figures["attention.png"] = visualize.draw_attention(
            seen, attention, config.grid_size, config.detail_kernel_size, config.detail_stride
        )
    else:
        report.notes.append(f"{preset} has no DetailFeatureIntegrator: no attention to draw")
    for name, figure in figures.items():
        visualize.save(figure, folder / name)
        report.pictures.append(str(folder / name))
    return report


def _run_stages(
    picture: Image, encoder: TimmPatchEncoder, projector: SPProjector, report: Report
) -> tuple[Image, torch.Tensor | None]:
    """Fills in the report's stages; gives the picture that the encoder saw and its attention."""
    transform = encoder.transform()
    report.run("picture", None, lambda: picture, lambda p: (p.height, p.width, 3))
    pixels = report.run("transform", None, lambda: transform(picture).unsqueeze(0))
    patches = report.run(f"encoder layer {encoder.layer}", encoder, lambda: encoder(pixels))
    grid = (encoder.grid_size,) if projector.any_grid else ()
    spatial = report.run("extractor", projector.extractor, lambda: projector.extractor(patches, *grid))
    integrator, attention = projector.integrator, None
    if integrator is not None:
        spatial, attention = report.run(
            "integrator",
            integrator,
            partial(integrator, spatial, patches, *grid, return_attention=True),
            lambda result: result[0].shape,
        )
    report.run("spatial head", projector.spatial_head, lambda: projector.spatial_head(spatial))
    if (patch_head := projector.patch_head) is not None:
        report.run("patch head", patch_head, partial(patch_head, patches))
    report.run("whole projector", projector, lambda: projector(patches, *grid))
    return encoder.picture(pixels[0]), None if attention is None else attention[0]


def _random(pretrained: bool, small: bool) -> str:
    """Which weights are random, and what that means for the report."""
    which = "the projector's weights are random" if pretrained else "the weights of encoder and projector are random"
    narrowed = f", and the encoder is narrowed to {SMALL['depth']} layers of width {SMALL['embed_dim']}" if small else ""
    return f"{which}{narrowed}: shapes and windows are right, but no attention means anything yet"


def _cut_off(size: tuple[int, int], seen: tuple[int, int]) -> str | None:
    """What the encoder does not see of a picture of another shape; sizes are width and height, as picture viewers show them."""
    (width, height), (seen_width, seen_height) = size, seen
    shape = width * seen_height / (height * seen_width)
    if 0.98 < shape < 1.02:
        return None
    share, sides = (1 / shape, "left and right") if shape > 1 else (shape, "top and bottom")
    return (
        f"the picture is {width} x {height} pixels; the encoder sees its center, {seen_width} x {seen_height} after resizing: "
        f"{1 - share:.0%} is cut off at {sides}"
    )


def _fit(preset: str, encoder: TimmPatchEncoder, widths: dict[str, int], report: Report) -> SPProjectorConfig:
    """The preset with the encoder's width and grid; on another grid, dense kernels are chosen again, and a note says so."""
    base = SPProjectorConfig.from_preset(preset, **widths)
    fitted: dict[str, Any] = {"vision_hidden_size": encoder.hidden_size}
    if encoder.grid_size != base.grid_size and not base.any_grid:
        fitted["grid_size"] = encoder.grid_size
        fitted["kernel_sizes"] = crop_sizes(encoder.grid_size, 2)[-base.num_spatial_tokens :]
        if base.detail_kernel_size is not None:
            fitted["detail_kernel_size"] = max(1, 2 * min(encoder.grid_size) // 3)
        report.notes.append(
            f"{encoder.name} has a {encoder.grid_size[0]} x {encoder.grid_size[1]} grid, {preset} is made for "
            f"{base.grid_size[0]} x {base.grid_size[1]}: kernel sizes are {fitted['kernel_sizes']} here"
        )
    return SPProjectorConfig.from_preset(preset, **{**widths, **fitted})
