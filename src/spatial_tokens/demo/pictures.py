"""What the trained model says, laid on the picture: where it names things to be, and where it looks to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spatial_tokens.demo.questions import CELL
from spatial_tokens.demo.scenes import SIDE
from spatial_tokens.visualize import ACCENT, panels, show_picture

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
    figure, axes = panels(2, "where the model says that each thing is")
    for axis, title, places in zip(axes, ("without spatial tokens", "with"), (without, having), strict=True):
        axis.set_title(title, fontsize=9)
        show_picture(axis, picture, GRID, brightness=1)
        for thing, place in zip(scene.things, places, strict=True):
            if place is not None:
                end = (place[0] + 0.5, place[1] + 0.5)
                axis.plot(*zip((thing.x / CELL, thing.y / CELL), end, strict=True), color="black", linewidth=1)
                axis.plot(*end, marker="s", color=ACCENT, markeredgecolor="white", markersize=6)
    return figure


@dataclass(frozen=True)
class Look:
    """What a word attends to of a picture: the patches `(H, W)`, and the share of its attention that the spatial tokens have."""

    patches: torch.Tensor
    spatial: float


def draw_looks(picture: Image, answers: Sequence[tuple[str, str]], looks: Sequence[Look]) -> Figure:
    """The attention that each question pays to the patches as its answer is said; each panel has a scale of its own.

    Titles give the answer, and the share of the attention to the picture that the spatial tokens have.
    """
    figure, axes = panels(len(looks), "what the language model attends to as it answers", columns=4)
    for axis, (question, answer), look in zip(axes, answers, looks, strict=True):
        axis.set_title(f"{_broken(question)}\n{answer} (spatial tokens: {look.spatial:.0%})", fontsize=7)
        show_picture(axis, picture, GRID, brightness=0.8)
        axis.imshow(look.patches.float().numpy(), extent=(0, GRID[1], GRID[0], 0), cmap="viridis", alpha=0.6)
    return figure


def _broken(text: str) -> str:
    """A question on two lines if it is long."""
    words = text.split()
    return text if len(text) < 34 else " ".join(words[: len(words) // 2]) + "\n" + " ".join(words[len(words) // 2 :])
