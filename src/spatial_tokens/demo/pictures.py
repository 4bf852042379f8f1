"""What the trained model says, laid on the picture: where it names things to be, and where it looks to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spatial_tokens.demo.questions import CELL
from spatial_tokens.demo.scenes import COLORS, SIDE
from spatial_tokens.visualize import panels, show_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from spatial_tokens.demo.scenes import Scene

GRID = (SIDE // CELL, SIDE // CELL)
Places = list[tuple[int, int] | None]


def draw_places(picture: Image, scene: Scene, without: Places, having: Places) -> Figure:
    """Where the model says that each thing is, without and with spatial tokens: a line from the thing to the patch it names."""
    from matplotlib.lines import Line2D

    figure, axes = panels(2, "where the model says that each thing is")
    square: dict[str, Any] = {"marker": "s", "markeredgecolor": "white", "markersize": 7}
    for axis, title, places in zip(axes, ("without spatial tokens", "with spatial tokens"), (without, having), strict=True):
        axis.set_title(title, fontsize=9)
        show_picture(axis, picture, GRID, brightness=1)
        for thing, place in zip(scene.things, places, strict=True):
            if place is not None:
                end = (place[0] + 0.5, place[1] + 0.5)
                axis.plot(*zip((thing.x / CELL, thing.y / CELL), end, strict=True), color="black", linewidth=1)
                axis.plot(*end, color=[value / 255 for value in COLORS[thing.color]], **square)
    key = [
        Line2D([], [], color="gray", linewidth=0, label="the model's answer, in the thing's color", **square),
        Line2D([], [], color="black", linewidth=1, label="to where the thing is"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


@dataclass(frozen=True)
class PatchAttention:
    """What a word attends to of a picture: the patches `(H, W)`, and the share of its attention that the spatial tokens have."""

    patches: torch.Tensor
    spatial: float


def draw_attention(picture: Image, answers: Sequence[tuple[str, str]], looks: Sequence[PatchAttention]) -> Figure:
    """The attention that each question pays to the patches as its answer is said, as shares of the panel's largest.

    Titles give the answer, and the share of the attention to the picture's tokens that the spatial tokens have.
    """
    title = (
        "Attention of each question's last token to the patch tokens, mean over layers and heads\n"
        "Yellow: the most. Above each panel: the answer, and the spatial tokens' share of the attention to the image"
    )
    figure, axes = panels(len(looks), title, columns=4, colorbar=True)
    for axis, (question, answer), look in zip(axes, answers, looks, strict=True):
        axis.set_title(f"{_on_two_lines(question)}\n{answer} ({look.spatial:.0%} to spatial tokens)", fontsize=7)
        show_picture(axis, picture, GRID, brightness=0.8)
        patches = (look.patches / look.patches.max()).float().numpy()
        drawn = axis.imshow(patches, extent=(0, GRID[1], GRID[0], 0), cmap="viridis", alpha=0.6, vmin=0, vmax=1)
    figure.colorbar(drawn, ax=list(axes), fraction=0.03, pad=0.02, label="attention / the panel's largest")
    return figure


def _on_two_lines(text: str) -> str:
    """A question on two lines if it is long."""
    words = text.split()
    return text if len(text) < 34 else " ".join(words[: len(words) // 2]) + "\n" + " ".join(words[len(words) // 2 :])
