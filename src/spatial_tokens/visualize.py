"""The paper's figures 3 and 5 from a real picture: what each spatial token covers, and which details it looked up.

Pictures are `PIL.Image`s in, matplotlib figures out; `save` writes them as PNG.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens.checks import as_path
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.grid import KernelSize, Size, Window, as_size, check_kernel_sizes, crop_window, pool_bins, strided_windows
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.storage.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from spatial_tokens.grid import Variant

ACCENT = "#e4572e"


def draw_windows(image: Image, grid_size: KernelSize, kernel_sizes: Sequence[KernelSize], variant: Variant) -> Figure:
    """Figure 3: for each spatial token, the part of the picture that it covers.

    Cropping shows the centered window bright and its surroundings dim; pooling shows the picture averaged over each bin, with the
    bins' borders (dashed where bins overlap).

    Args:
        image: The picture that the encoder saw (cropped and resized as it was).
        grid_size: The patch grid.
        kernel_sizes: The extractor's kernel sizes.
        variant: "cropping" or "pooling".

    Raises:
        MissingExtraError: If matplotlib is not installed.
        SpatialTokensError: If the image is no PIL image, or a kernel size does not fit the grid.
    """
    _check_picture(image)
    grid = as_size(grid_size, "grid_size")
    sizes = [as_size(k, "kernel size") for k in check_kernel_sizes(grid, kernel_sizes, variant)]
    figure, axes = panels(len(sizes), f"{variant}: what each spatial token covers")
    for i, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        axis.set_title(f"token {i + 1}: {size[0]} x {size[1]}", fontsize=9)
        if variant == "cropping":
            _draw_crop(axis, image, grid, crop_window(grid, size))
        else:
            _draw_bins(axis, image, grid, size)
    return figure


def draw_attention(
    image: Image, attention: torch.Tensor, grid_size: KernelSize, detail_kernel_size: KernelSize, detail_stride: KernelSize
) -> Figure:
    """Figure 5: what each spatial token looked up in the detail map, laid on the picture.

    A position of the detail map saw a whole window of patches; it is drawn as a cell of one stride at its window's center. The
    window that a token looked at most is outlined. All panels share one color scale; titles give the ratio of the largest to the
    smallest attention (1 is uniform).

    Args:
        image: The picture that the encoder saw.
        attention: One picture's attention `(K, P)`, as `SPProjector` returns it (without the batch).
        grid_size: The patch grid.
        detail_kernel_size: The integrator's kernel size.
        detail_stride: Its stride.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        SpatialTokensError: If the image is no PIL image, or the attention is not `(K, P)` for that grid, kernel and stride.
    """
    _check_picture(image)
    grid, step = as_size(grid_size, "grid_size"), as_size(detail_stride, "detail_stride")
    windows = strided_windows(grid, detail_kernel_size, step)
    check_dense(attention, "attention", f"(K, {len(windows)})")
    if attention.ndim != 2 or attention.shape[1] != len(windows):
        raise SpatialTokensError(
            f"attention must have shape (K, {len(windows)}), one picture's, got {tuple(attention.shape)}; index the batch first"
        )
    weights = attention.detach().float().cpu()
    figure, axes = panels(
        len(weights),
        "attention of each spatial token over the detail map (outlined: the window with the largest weight)",
        colorbar=True,
    )
    low, high = weights.min().item(), weights.max().item()
    for i, (axis, row) in enumerate(zip(axes, weights, strict=True)):
        axis.set_title(f"token {i + 1}: max / min = {(row.max() / row.min()).item():.3g}", fontsize=9)
        show_picture(axis, image, grid, brightness=0.6)
        cells = [_center_cell(window, step) for window in windows]
        drawn = _draw_cells(axis, cells, row.tolist(), low, high)
        best = windows[int(row.argmax())]
        axis.add_patch(_rectangle(best, fill=False, edgecolor=ACCENT, linewidth=1.5))
    figure.colorbar(drawn, ax=list(axes), fraction=0.03, pad=0.02, label="attention")
    return figure


def save(figure: Figure, path: str | PathLike[str], *, dpi: int = 120) -> None:
    """Writes a figure as PNG, completely or not at all.

    Raises:
        SpatialTokensError: If the file cannot be written.
    """
    with atomic_write(as_path(path, "path")) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, pil_kwargs={"optimize": True})


def sample_picture(size: Size = (336, 336)) -> Image:
    """A picture to try things on: shapes of several colors and sizes, on sky and grass."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtraError("pillow", "viz") from error
    height, width = as_size(size, "size")
    scale = 4
    picture = Image.new("RGB", (336 * scale, 336 * scale), "#9fd3f5")
    draw = ImageDraw.Draw(picture)

    def box(left: int, top: int, right: int, bottom: int) -> tuple[int, int, int, int]:
        return left * scale, top * scale, right * scale, bottom * scale

    draw.rectangle(box(0, 210, 336, 336), fill="#7db46c")
    draw.ellipse(box(250, 24, 306, 80), fill="#ffd23f")
    draw.rectangle(box(110, 130, 226, 236), fill="#c8553d")
    draw.polygon([(x * scale, y * scale) for x, y in ((98, 130), (168, 72), (238, 130))], fill="#5b3a29")
    draw.rectangle(box(156, 182, 184, 236), fill="#f2e8cf")
    draw.rectangle(box(124, 150, 146, 172), fill="#588b8b")
    draw.rectangle(box(192, 150, 214, 172), fill="#588b8b")
    draw.rectangle(box(44, 170, 58, 240), fill="#5b3a29")
    draw.ellipse(box(18, 110, 84, 184), fill="#2f6b3c")
    draw.ellipse(box(258, 240, 300, 282), fill="#e4572e")
    draw.ellipse(box(70, 262, 130, 300), fill="#4f86c6")
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _check_picture(image: object) -> None:
    if not (hasattr(image, "convert") and hasattr(image, "size")):
        raise SpatialTokensError(f"image must be a PIL.Image.Image, got {type(image).__name__}; make one: PIL.Image.fromarray(...)")


def panels(count: int, title: str, *, columns: int = 6, colorbar: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a title and `count` empty panels in rows of at most `columns`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.1 * columns + colorbar, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    return figure, list(axes[:count])


def show_picture(axis: Axes, image: Image, grid: Size, *, brightness: float) -> None:
    """The picture in coordinates of patches, so that a window's integers are its place."""
    dimmed = image.convert("RGB").point(lambda value: round(value * brightness))
    axis.imshow(dimmed, extent=(0, grid[1], grid[0], 0), interpolation="bilinear")


def _draw_crop(axis: Axes, image: Image, grid: Size, window: Window) -> None:
    show_picture(axis, image, grid, brightness=0.35)
    width, height = image.size
    left, right = (round(x * width / grid[1]) for x in (window.left, window.right))
    top, bottom = (round(y * height / grid[0]) for y in (window.top, window.bottom))
    inside = image.convert("RGB").crop((left, top, right, bottom))
    axis.imshow(inside, extent=(window.left, window.right, window.bottom, window.top), interpolation="bilinear")
    axis.add_patch(_rectangle(window, fill=False, edgecolor=ACCENT, linewidth=1.5))
    axis.set_xlim(0, grid[1])
    axis.set_ylim(grid[0], 0)


def _draw_bins(axis: Axes, image: Image, grid: Size, size: Size) -> None:
    from PIL import Image as PILImage

    patches = torch.frombuffer(
        bytearray(image.convert("RGB").resize((grid[1], grid[0]), PILImage.Resampling.BOX).tobytes()), dtype=torch.uint8
    )
    patches = patches.view(*grid, 3).float()
    bins = pool_bins(grid, size)
    overlap = sum(w.height * w.width for w in bins) > grid[0] * grid[1]
    for i, window in enumerate(bins):
        mean = patches[window.top : window.bottom, window.left : window.right].mean(dim=(0, 1)) / 255
        row, column = divmod(i, size[1])
        height, width = grid[0] / size[0], grid[1] / size[1]
        cell = (column * width, row * height)
        axis.add_patch(_cell(cell, width, height, facecolor=mean.tolist(), edgecolor="none"))
        style = "dashed" if overlap else "solid"
        axis.add_patch(_rectangle(window, fill=False, edgecolor="white", linewidth=0.25, linestyle=style))
    axis.set_xlim(0, grid[1])
    axis.set_ylim(grid[0], 0)
    axis.set_aspect("equal")


def _draw_cells(axis: Axes, cells: list[tuple[float, float, float, float]], values: list[float], low: float, high: float) -> Any:
    from matplotlib.collections import PatchCollection

    collection = PatchCollection([_cell((x, y), width, height) for x, y, width, height in cells], cmap="viridis", alpha=0.75)
    collection.set_array(values)
    collection.set_clim(low, high)
    return axis.add_collection(collection)


def _center_cell(window: Window, step: Size) -> tuple[float, float, float, float]:
    """The cell of one stride at a window's center, as x, y, width, height."""
    x, y = (window.left + window.right) / 2, (window.top + window.bottom) / 2
    return x - step[1] / 2, y - step[0] / 2, step[1], step[0]


def _rectangle(window: Window, **style: Any) -> Any:
    return _cell((window.left, window.top), window.width, window.height, **style)


def _cell(corner: tuple[float, float], width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **style)
