"""Reading a picture: the one loader of training, demo and examples."""

from __future__ import annotations

from functools import cache
from os import PathLike, fspath
from typing import IO, TYPE_CHECKING, Any

from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # where Pillow stops too: the decoded picture takes 700 MB
MAX_ASPECT_RATIO = 200  # as in Qwen2-VL. CLIP scales the short side to 336: 100000 x 1 pixels would become 33600000 x 336
ORIENTATION = 0x0112  # an EXIF tag, as are the next two
BITS_PER_SAMPLE, PHOTOMETRIC = 0x0102, 0x0106
WHITE_IS_ZERO = 0


def read_picture(file: str | PathLike[str] | IO[bytes], *, extra: str = "viz") -> Image:
    """A picture as a viewer shows it: upright, in RGB, on white.

    - It is turned as its EXIF orientation says. EXIF that cannot be read is ignored, as browsers do.
    - Gray of 16 bits is scaled to 8 (65535 becomes 255), not clipped. Integers of 32 bits and floats are refused: their range is
      unknown.
    - Transparent parts show white, as in a browser and in qwen-vl-utils. LLaVA's loader, `convert("RGB")`, shows the color that is
      stored beneath them, which is arbitrary.
    - Of an animation it is the first frame. Color profiles are not applied; CLIP was trained without them.

    Args:
        file: A path, or a file opened in binary mode.
        extra: The extra that a `MissingExtraError` names; it must bring pillow.

    Returns:
        An image of mode "RGB". It has no metadata, so it is not rotated again.

    Raises:
        MissingExtraError: If pillow is not installed.
        SpatialTokensError: If the picture cannot be read, has over `MAX_PIXELS` pixels, or one side is over `MAX_ASPECT_RATIO`
            times the other.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", extra) from error
    if not isinstance(file, (str, PathLike)) and not hasattr(file, "read"):
        raise SpatialTokensError(f"a picture must be a path or a file opened in binary mode, got {shown(file)}")
    try:
        with Image.open(file) as image:
            _check_size(image)
            image.load()
            picture = _rgb(image)
            if image.format != "TIFF":  # Pillow turns a TIFF itself when it is loaded
                picture = _upright(picture, image)
    except UnidentifiedImageError as error:  # Pillow would repeat the path, or the file object's address
        raise SpatialTokensError(f"cannot read the picture {_name(file)}: it is not in a format that Pillow reads") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise SpatialTokensError(f"cannot read the picture {_name(file)}: {reason(error)}") from error
    picture.info = {}
    return picture


def _check_size(image: Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SpatialTokensError(f"it has {width} x {height} pixels, over the limit of {MAX_PIXELS}; make it smaller")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SpatialTokensError(
            f"it has {width} x {height} pixels; a side may be at most {MAX_ASPECT_RATIO} times the other; crop it or leave it out"
        )


def _rgb(image: Image) -> Image:
    from PIL import Image as PILImage

    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # "I": older Pillow's 16 bits
        return _gray(image, transparency)
    if image.mode in ("I", "F"):
        raise SpatialTokensError(f"it has pixels of mode {image.mode}, whose range is unknown; save it with 8 or 16 bits")
    has_alpha = image.mode in ("RGBA", "LA", "La", "PA") or (image.palette is not None and image.palette.mode == "RGBA")
    if has_alpha or (transparency is not None and image.mode in ("1", "L", "P", "RGB")):
        colors = image.convert("LA") if image.mode == "La" else image  # Pillow does not take La to RGBA at once
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), colors.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _gray(image: Image, transparency: Any) -> Image:
    """Gray of 16 bits. A TIFF may use only 12 of them, or count from white; Pillow leaves both to us."""
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = image.convert("I")
    gray = values.point(_eight_bits(2**bits - 1, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO), "L")
    if transparency is not None:
        gray.paste(255, mask=values.point([255 * (value == transparency) for value in range(2**16)], "L"))
    return gray.convert("RGB")


@cache
def _eight_bits(largest: int, inverted: bool) -> list[int]:
    values = [round(255 * min(value, largest) / largest) for value in range(2**16)]
    return [255 - value for value in values] if inverted else values


def _upright(picture: Image, image: Image) -> Image:
    """The picture, turned as the image's EXIF says. `ImageOps.exif_transpose` would also rewrite the EXIF, and fail if damaged."""
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        method = methods.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return picture
    return picture if method is None else picture.transpose(method)


def _name(file: Any) -> str:
    """The file as an error message names it, on one line."""
    name = fspath(file) if isinstance(file, (str, PathLike)) else getattr(file, "name", "in memory")
    return name if isinstance(name, str) and name.isprintable() else shown(name)
