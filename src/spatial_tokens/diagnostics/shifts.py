"""Pictures that are brought to an encoder's size, and shifted: where is what a patch shows, and where is its slot?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch

from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.grid import Size

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_SHARE = 0.5  # of a picture's sides, in a crop
ANY_SIZE = 448  # a picture for an encoder of any size is scaled down to at most so many pixels, squared


@dataclass(frozen=True)
class Shift:
    """A picture moved under the encoder's slots.

    Args:
        kind: "roll": what leaves on one side enters on the other, so the picture's border moves with its content. "crop": a
            window of half of each side, enlarged to the whole size, so content moves and the border does not.
        across: How far: of the roll, patches to the right over all columns; of the crop, the window's place, 0 to 1.
        down: The same for rows.
    """

    kind: str
    across: float
    down: float

    def __call__(self, picture: Image) -> Image:
        width, height = picture.size
        if self.kind == "roll":
            from PIL import ImageChops

            return ImageChops.offset(picture, round(self.across * width), round(self.down * height))
        left, top = self.across * (1 - CROP_SHARE) * width, self.down * (1 - CROP_SHARE) * height
        return picture.resize(picture.size, box=(left, top, left + CROP_SHARE * width, top + CROP_SHARE * height))

    def origins(self, places: torch.Tensor) -> torch.Tensor:
        """Where in the unshifted picture is what patches at these coordinates show, `(n, 2)`."""
        moved = torch.tensor([self.across, self.down], dtype=places.dtype, device=places.device)
        shares = (places + 1) / 2
        shares = (shares - moved) % 1 if self.kind == "roll" else moved * (1 - CROP_SHARE) + CROP_SHARE * shares
        return 2 * shares - 1


def drawn_shift(kind: str, grid: Size, random: Random) -> Shift:
    """A random one; a roll is by whole patches."""
    if kind == "roll":
        return Shift(kind, random.randrange(grid[1]) / grid[1], random.randrange(grid[0]) / grid[0])
    return Shift(kind, random.random(), random.random())


def prepared(picture: Image, size: Size | None) -> Image:
    """A picture for an encoder: its middle in the encoder's size; for an encoder of any size, the whole, scaled down if large."""
    if size is None:
        scale = min(1.0, ANY_SIZE / (picture.width * picture.height) ** 0.5)
        return picture if scale == 1 else picture.resize((round(picture.width * scale) or 1, round(picture.height * scale) or 1))
    height, width = size
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
    return picture.resize((width, height), box=(left, top, left + scale * width, top + scale * height))


def generated(number: int, seed: int = 0) -> Image:
    """A picture of random shapes at random places, so that content says nothing of place."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtraError("pillow", "viz") from error
    random = Random(f"{seed} {number}")
    side, margin = 448, 96  # what lies beyond the border is cut off: shapes are as likely there as in the middle

    def color() -> tuple[int, int, int]:
        return random.randrange(256), random.randrange(256), random.randrange(256)

    picture = Image.new("RGB", (side, side), color())
    draw = ImageDraw.Draw(picture)
    for _ in range(random.randint(30, 60)):
        x, y = random.uniform(-margin, side + margin), random.uniform(-margin, side + margin)
        across, down = random.uniform(4, margin), random.uniform(4, margin)
        box = (x - across, y - down, x + across, y + down)
        shape = random.choice(("ellipse", "rectangle", "line"))
        if shape == "line":
            draw.line(box, fill=color(), width=random.randint(1, 8))
        else:
            getattr(draw, shape)(box, fill=color())
    return picture


def require_image(value: object) -> None:
    """Raises SpatialTokensError unless a value is a PIL image."""
    if not (hasattr(value, "convert") and hasattr(value, "resize")):
        raise SpatialTokensError(f"a picture must be a path or a PIL.Image.Image, got a {type(value).__name__}")
