"""The loader of pictures, against what the formats' standards say a viewer shows."""

import io
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("PIL")
from PIL import Image, ImageOps

from spatial_tokens import SpatialTokensError, pictures
from spatial_tokens.errors import MissingExtraError
from spatial_tokens.pictures import read_picture

SIDES = {  # the EXIF standard: where the first stored row and the first stored column lie in the upright picture
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip
UPRIGHT = [[10, 60], [110, 160], [210, 250]]  # rows of gray pixels
LOSSLESS = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}


def encoded(image, name, **options):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {name}")
    file = io.BytesIO()
    image.save(file, name, **LOSSLESS.get(name, {}), **options)
    return file.getvalue()


def read(data):
    picture = read_picture(io.BytesIO(data))
    assert (picture.mode, picture.info) == ("RGB", {})
    return picture


def pixels(picture):
    return [[picture.getpixel((x, y)) for x in range(picture.width)] for y in range(picture.height)]


def stored(upright, sides):
    """The rows that a camera held this way stores."""
    height, width = len(upright), len(upright[0])
    upside = {"top": range(height), "bottom": range(height)[::-1], "left": range(width), "right": range(width)[::-1]}
    rows, columns = (upside[side] for side in sides)
    if sides[0] in ("top", "bottom"):
        return [[upright[y][x] for x in columns] for y in rows]
    return [[upright[y][x] for y in columns] for x in rows]


def photo(orientation, name, **options):
    rows = stored(UPRIGHT, SIDES[orientation])
    image = Image.new("L", (len(rows[0]), len(rows)))
    image.putdata([value for row in rows for value in row])
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = image.resize((16 * image.width, 16 * image.height), Image.Resampling.NEAREST).convert("RGB")
    return encoded(large, name, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_a_camera(name):
    for orientation in SIDES:
        picture = read(photo(orientation, name))
        assert picture.size == (32, 48)
        seen = [[picture.getpixel((16 * x + 8, 16 * y + 8))[0] for x in range(2)] for y in range(3)]
        assert all(abs(a - b) <= 3 for row, right in zip(seen, UPRIGHT, strict=True) for a, b in zip(row, right, strict=True))
        assert ImageOps.exif_transpose(picture).size == picture.size  # transformers' load_image would turn it once more


@pytest.mark.parametrize(
    ("mode", "color", "name", "options", "shown"),
    [
        ("RGB", (200, 100, 50), "PNG", {}, (200, 100, 50)),
        ("L", 100, "BMP", {}, (100, 100, 100)),
        ("1", 1, "PNG", {}, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), "PNG", {}, (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "PNG", {}, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 51), "WEBP", {}, (244, 224, 214)),  # a fifth of the color, four fifths of white
        ("RGBA", (200, 100, 50, 51), "TIFF", {}, (244, 224, 214)),
        ("LA", (100, 0), "PNG", {}, (255, 255, 255)),
        ("LA", (100, 51), "PNG", {}, (224, 224, 224)),
        ("RGB", (200, 100, 50), "PNG", {"transparency": (200, 100, 50)}, (255, 255, 255)),
        ("RGB", (200, 100, 50), "PNG", {"transparency": (1, 2, 3)}, (200, 100, 50)),
        ("L", 100, "PNG", {"transparency": 100}, (255, 255, 255)),
        ("P", (200, 100, 50), "PNG", {}, (200, 100, 50)),
        ("P", (200, 100, 50), "PNG", {"transparency": b"\x33"}, (244, 224, 214)),
        ("P", (200, 100, 50), "GIF", {}, (200, 100, 50)),
        ("P", (200, 100, 50), "GIF", {"transparency": 0}, (255, 255, 255)),
        ("PA", (200, 100, 50), "TIFF", {}, (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), "JPEG", {}, (255, 255, 255)),
        ("CMYK", (255, 255, 0, 0), "JPEG", {}, (0, 0, 255)),
        ("CMYK", (0, 51, 255, 0), "TIFF", {}, (255, 204, 0)),
        ("YCbCr", (76, 85, 255), "JPEG", {}, (255, 0, 0)),
        ("I;16", 0x8000, "PNG", {}, (128, 128, 128)),
    ],
)
def test_every_mode(mode, color, name, options, shown):
    if mode in ("P", "PA"):
        image = Image.new(mode, (8, 6), 0)  # of PA, this is the alpha too
        image.putpalette(list(color))
    else:
        image = Image.new(mode, (8, 6), color)
    (seen,) = {pixel for row in pixels(read(encoded(image, name, **options))) for pixel in row}
    assert all(abs(a - b) <= 1 for a, b in zip(seen, shown, strict=True))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_every_gray_of_16_bits(name):
    values = range(2**16)
    if name == "PPM":
        data = b"P5 256 256 65535 " + struct.pack(">65536H", *values)
    else:
        image = Image.frombytes("I;16", (256, 256), struct.pack("<65536H", *values))
        data = encoded(image, name)
    expected = [round(value / 257) for value in values]
    assert [pixel for row in pixels(read(data)) for pixel in row] == [(value,) * 3 for value in expected]


def tiff(bits, data, *, photometric=1, sample_format=1):
    """A file of two pixels of gray."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(data), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_gray_of_12_bits_and_gray_that_counts_from_white():
    assert pixels(read(tiff(12, bytes([0xFF, 0xF8, 0x00])))) == [[(255,) * 3, (round(0x800 / 0xFFF * 255),) * 3]]
    black_and_light = struct.pack("<2H", 0xFFFF, 0x3333)
    assert pixels(read(tiff(16, black_and_light, photometric=0))) == [[(0,) * 3, (0xCC,) * 3]]


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (tiff(32, struct.pack("<2f", 0.5, 1), sample_format=3), "F"),
        (tiff(32, struct.pack("<2I", 5, 6)), "I"),
        (tiff(16, struct.pack("<2h", -5, 6), sample_format=2), "I"),
    ],
)
def test_an_unknown_range_is_refused(data, mode):
    with pytest.raises(SpatialTokensError, match=f"cannot read the picture in memory: it has pixels of mode {mode}, whose range"):
        read(data)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation(name):
    red, blue = (Image.new("RGB", (8, 6), color) for color in ("red", "blue"))
    assert pixels(read(encoded(red, name, save_all=True, append_images=[blue])))[0][0] == (255, 0, 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_palette_with_alpha_and_gray_multiplied_by_its_alpha():
    pytest.importorskip("PIL", minversion="13.0")  # older ones refuse both
    header = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 1, 32, 0, 0, 2, 1, 8, 0)
    assert pixels(read(header + bytes([50, 100, 200, 51]) + bytes(2))) == [[(244, 224, 214)] * 2]  # a TGA; its colors are BGRA
    data, extra_samples = encoded(Image.new("LA", (1, 1), (20, 51)), "TIFF"), struct.pack("<HHI", 338, 3, 1)
    assert extra_samples + b"\2" in data
    assert pixels(read(data.replace(extra_samples + b"\2", extra_samples + b"\1"))) == [[(224, 224, 224)]]


def test_a_transparent_gray_of_16_bits():
    data = encoded(Image.new("I;16", (1, 1), 1000), "PNG")
    start = data.index(b"IDAT") - 4
    for transparent, shown in [(1000, 255), (232, 4)]:  # 232 is 1000 in the last eight bits
        picture = read(data[:start] + chunk(b"tRNS", struct.pack(">H", transparent)) + data[start:])
        assert pixels(picture) == [[(shown,) * 3]]


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_stop_a_picture():
    data = photo(6, "PNG")
    exif = Image.open(io.BytesIO(data)).info["exif"].removeprefix(b"Exif\0\0")
    start = data.index(b"eXIf") - 4
    before, after = data[:start], data[start + len(chunk(b"eXIf", exif)) :]
    turned, sizes = pixels(read(data)), set()
    for place in range(len(exif) + 1):
        for damaged in (exif[:place], exif[:place] + b"\xff" + exif[place + 1 :]):
            picture = read(before + chunk(b"eXIf", damaged) + after)
            sizes.add(picture.size)
            assert picture.size == (48, 32) or pixels(picture) == turned
    assert sizes == {(48, 32), (32, 48)}


def test_orientation_counts_where_another_tag_is_damaged():
    """`ImageOps.exif_transpose` raises here: it writes the tags anew, and Copyright is no text."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x8298, 12, 1, 0)
    damaged = b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    data = photo(6, "PNG")
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    assert read(data[:start] + chunk(b"eXIf", damaged) + data[end:]).size == (32, 48)


@pytest.mark.parametrize(
    "error",
    [
        OSError("unrecognized data stream contents"), SyntaxError("no"), ValueError("no"), KeyError("no"), IndexError(),
        TypeError(),
        struct.error("unpack"), zlib.error("bad"), NotImplementedError("DXT9"), RuntimeError("two\nlines"), MemoryError(),
        RecursionError(), AssertionError(), EOFError(), ZeroDivisionError(), OverflowError(), Image.DecompressionBombError("big"),
        Image.DecompressionBombWarning("big"),
    ],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_one_error(monkeypatch, tmp_path, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def load(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(SpatialTokensError) as caught:
        read_picture(tmp_path / "a.png")
    assert str(caught.value).startswith(f"cannot read the picture {tmp_path / 'a.png'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_an_interrupt_is_no_picture(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_picture("a.png")


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (201, 1), (402 + 1, 2)])
def test_an_extreme_shape_is_refused(size):
    with pytest.raises(
        SpatialTokensError, match=rf"it has {size[0]} x {size[1]} pixels; a side may be at most 200 times the other"
    ):
        read(encoded(Image.new("1", size), "PNG"))
    assert read(encoded(Image.new("1", (400, 2)), "PNG")).size == (400, 2)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    header = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    header[18:26] = struct.pack("<ii", 20_000, 10_000)
    with pytest.raises(SpatialTokensError, match=r"cannot read the picture in memory: .*limit of 178956970 pixels"):
        read(bytes(header))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(SpatialTokensError, match="it has 20000 x 10000 pixels, over the limit of 178956970"):
        read(bytes(header))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 48)
    assert read(encoded(Image.new("RGB", (8, 6)), "PNG")).size == (8, 6)


@pytest.mark.parametrize("given", [None, 5, b"a.png", ["a.png"]])
def test_only_paths_and_files(given):
    with pytest.raises(SpatialTokensError, match="a picture must be a path or a file opened in binary mode, got "):
        read_picture(given)


def test_the_error_names_the_file_on_one_line(tmp_path):
    (tmp_path / "two\nlines.png").write_bytes(b"no picture")
    (tmp_path / "text.png").write_text("no picture")
    for given, said in [
        (str(tmp_path / "two\nlines.png"), r"two\\nlines.png': it is not in a format that Pillow reads"),
        (tmp_path / "text.png", "text.png: it is not in a format that Pillow reads"),
        (tmp_path, f"{tmp_path.name}: "),
        (tmp_path / "gone.png", "gone.png: No such file"),
        ("nul\0.png", r"'nul\\x00.png': "),
        ("a" * 5000, "a{50}"),
        ((tmp_path / "text.png").open(encoding="utf-8"), "text.png: "),
    ]:
        with pytest.raises(SpatialTokensError, match=f"cannot read the picture .*{said}") as caught:
            read_picture(given)
        assert len(str(caught.value).splitlines()) == 1


def test_a_file_stays_open_and_a_path_does_not(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        assert (
            pixels(read_picture(file)) == pixels(read_picture(tmp_path / "a.png")) == pixels(read_picture(str(tmp_path / "a.png")))
        )
        assert not file.closed


def test_a_missing_pillow_names_the_callers_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for options, extra in [({}, "viz"), ({"extra": "train"}, "train")]:
        with pytest.raises(MissingExtraError, match=rf"pip install 'spatial-tokens\[{extra}\]'"):
            read_picture("a.png", **options)
        metadata = (Path(__file__).parent.parent / "pyproject.toml").read_text()
        line = metadata[metadata.index(f"\n{extra} = [") :].splitlines()[1]
        brought = metadata[metadata.index("\nhf = [") :].splitlines()[1] if "spatial-tokens[hf]" in line else line
        assert "pillow" in brought


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is damaged
@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "DDS", "AVIF", "ICO", "TGA", "JPEG2000", "QOI"])
def test_a_damaged_picture_is_a_picture_or_an_error(name):
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "someone"
    whole, chance = encoded(Image.effect_noise((24, 16), 90).convert("RGB"), name, exif=exif.tobytes()), random.Random(name)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 10))):
            damaged[int(len(damaged) * chance.random() ** 3)] = chance.randrange(256)  # most of them near the header
        del damaged[chance.choice((len(damaged), len(damaged), chance.randrange(1, len(damaged)))) :]
        try:
            read(bytes(damaged))
        except SpatialTokensError as error:
            message = str(error)
            assert message.startswith("cannot read the picture in memory: ")
            assert message.count("\n") == 0
