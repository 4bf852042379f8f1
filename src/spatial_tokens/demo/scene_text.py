"""Scenes in a user's words: "red circle top left, large blue ring right"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatial_tokens.demo.scenes import COLORS, RADII, SHAPES, SIDE, UNSEEN, Scene, Thing, render
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
SYNONYMS = {"center": "middle", "centre": "middle", "central": "middle", "upper": "top", "lower": "bottom"}
SKIPPED = {"a", "an", "the", "at", "in", "on"}
UNSEEN_NAMES = [f"{color} {shape}" for color, shape in UNSEEN]  # of things that no training picture has
EXAMPLE = '"green circle top left, large blue ring right"'
CLUTTER = 6  # pieces, as many as the scenes have that the model was trained on


def read_scene(text: str, noise: int) -> Scene:
    """The scene that a text describes: things between commas, each with a color, a shape, a place and, if wanted, a size.

    Args:
        text: Such as "red circle top left, large blue ring right". Places are top, middle or bottom, and left, middle or right; one
            word is enough; "upper" and "lower" are read as top and bottom. Sizes are small, medium (the default) and large.
            Articles, "at", "in" and "on" are skipped.
        noise: The seed of the background.

    Raises:
        SpatialTokensError: If there is no text, a thing is not so described, or two have the same place or name.
    """
    if not text.replace(",", " ").strip():
        raise SpatialTokensError(f"--scene is empty; describe what to draw, such as {EXAMPLE}")
    things: list[Thing] = []
    for part in text.split(","):
        thing = _read_thing(part)
        for other in things:
            if other.name == thing.name:
                raise SpatialTokensError(
                    f"--scene has two things that are a {thing.name.replace('-', ' ')}; questions name each by both"
                )
            if (other.x, other.y) == (thing.x, thing.y):
                raise SpatialTokensError(f"--scene puts two things in one place, the second by {shown(part.strip())}; move one")
        things.append(thing)
    return Scene(tuple(things), CLUTTER, noise)


def draw_scene(scene: Scene | str, noise: int = 0) -> Image:
    """The picture of a scene, or of one in words as `read_scene` takes it, of 96 x 96 pixels.

    Raises:
        MissingExtraError: If pillow is not installed.
        SpatialTokensError: If the words describe no scene.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "viz") from error
    return Image.fromarray(render(read_scene(scene, noise) if isinstance(scene, str) else scene))


def _read_thing(text: str) -> Thing:
    words = [SYNONYMS.get(word, word) for word in text.lower().replace("-", " ").split() if word not in SKIPPED]
    kinds = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(RADII), "place": (*ROWS, *COLUMNS)}
    found = {name: [word for word in words if word in choices] for name, choices in kinds.items()}
    unknown = [word for word in words if not any(word in choices for choices in kinds.values())]
    if unknown:
        raise SpatialTokensError(
            f"--scene has {shown(unknown[0])}, which is none of {', '.join(dict.fromkeys(sum(kinds.values(), ())))}"
        )
    rows, columns = ([word for word in found["place"] if word in side] for side in (ROWS, COLUMNS))
    row = next((word for word in rows if word != "middle"), "middle")
    column = next((word for word in columns if word != "middle"), "middle")
    contradicted = set(found["place"]) - {row, column, "middle"}
    if len(found["color"]) != 1 or len(found["shape"]) != 1 or len(found["size"]) > 1 or not found["place"] or contradicted:
        raise SpatialTokensError(
            f"a thing of --scene must have one color, one shape and a place, got {shown(text.strip())}; such as {EXAMPLE}"
        )
    size = next(iter(found["size"]), "medium")
    at = (SIDE // 5, SIDE // 2, SIDE - SIDE // 5)
    return Thing(found["color"][0], found["shape"][0], size, RADII[size][0], at[COLUMNS.index(column)], at[ROWS.index(row)])
