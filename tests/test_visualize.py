"""The figures are looked at by their parts: where rectangles lie and which colors they have."""

import sys

import pytest
import torch
from PIL import Image

from spatial_tokens import SpatialTokensError, visualize
from spatial_tokens.errors import MissingExtraError

pytest.importorskip("matplotlib")


def rectangles(axis):
    return [(patch.get_y(), patch.get_x(), patch.get_height(), patch.get_width()) for patch in axis.patches]


def panels(figure, count):
    return figure.axes[:count]


def test_cropping_outlines_the_centered_windows():
    figure = visualize.draw_windows(visualize.sample_picture(), (24, 24), (4, 8, 24), "cropping")
    drawn = [rectangles(axis) for axis in panels(figure, 3)]
    assert drawn == [[(10, 10, 4, 4)], [(8, 8, 8, 8)], [(0, 0, 24, 24)]]
    assert [axis.get_title() for axis in panels(figure, 3)] == ["token 1: 4 x 4", "token 2: 8 x 8", "token 3: 24 x 24"]


def test_cropping_shows_the_picture_inside_the_window():
    picture = Image.new("RGB", (80, 40), "black")
    picture.paste("white", (20, 10, 60, 30))  # the center half of a 4 x 8 grid
    figure = visualize.draw_windows(picture, (4, 8), ((2, 4), (4, 8)), "cropping")
    inside = figure.axes[0].images[1]
    assert list(inside.get_extent()) == [2, 6, 3, 1]
    assert inside.get_array().min() == 255


def test_pooling_shows_each_bins_mean_color():
    red_then_blue = Image.new("RGB", (40, 40), "red")
    red_then_blue.paste("blue", (20, 0, 40, 40))
    figure = visualize.draw_windows(red_then_blue, (4, 4), (1, 2, 4), "pooling")
    first, second = figure.axes[0].patches[0], figure.axes[1].patches
    assert first.get_facecolor() == pytest.approx((0.5, 0, 0.5, 1), abs=0.01)
    assert [patch.get_facecolor()[:3] for patch in second[::2]] == [(1, 0, 0), (0, 0, 1)] * 2
    assert rectangles(figure.axes[1])[1::2] == [(0, 0, 2, 2), (0, 2, 2, 2), (2, 0, 2, 2), (2, 2, 2, 2)]


@pytest.mark.parametrize(("size", "style"), [(2, "solid"), (3, "dashed")])
def test_overlapping_bins_are_dashed(size, style):
    figure = visualize.draw_windows(visualize.sample_picture(), (4, 4), (size,), "pooling")
    assert figure.axes[0].patches[1].get_linestyle() in {"solid": ("-", "solid"), "dashed": ("--", "dashed")}[style]


def test_attention_lies_at_the_centers_of_its_windows():
    attention = torch.rand(2, 25)
    figure = visualize.draw_attention(visualize.sample_picture(), attention, (24, 24), 16, 2)
    for axis, row in zip(panels(figure, 2), attention, strict=True):
        (cells,) = axis.collections
        assert torch.equal(torch.as_tensor(cells.get_array()).float(), row)
        corners = [tuple(path.vertices.min(axis=0)) for path in cells.get_paths()]
        assert corners == [(8 + 2 * column - 1, 8 + 2 * i - 1) for i in range(5) for column in range(5)]
        best = int(row.argmax())
        assert rectangles(axis) == [(2 * (best // 5), 2 * (best % 5), 16, 16)]
        assert cells.get_clim() == (attention.min(), attention.max())


def test_attention_titles_give_the_papers_statistic():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    figure = visualize.draw_attention(visualize.sample_picture(), attention, (4, 6), (4, 3), 1)
    assert [axis.get_title() for axis in panels(figure, 2)] == ["token 1: max / min = 4", "token 2: max / min = 1"]


@pytest.mark.filterwarnings("ignore")
def test_nan_attention_is_shown(tmp_path):
    figure = visualize.draw_attention(visualize.sample_picture(), torch.full((1, 4), torch.nan), (4, 6), (4, 3), 1)
    assert figure.axes[0].get_title() == "token 1: max / min = nan"
    visualize.save(figure, tmp_path / "nan.png")


@pytest.mark.parametrize("shape", [(1, 6, 25), (25,), (6, 24)])
def test_wrong_attention(shape):
    with pytest.raises(SpatialTokensError, match=r"attention must have shape \(K, 25\)"):
        visualize.draw_attention(visualize.sample_picture(), torch.zeros(shape), (24, 24), 16, 2)


@pytest.mark.parametrize("image", [None, torch.zeros(3, 8, 8), "picture.png"])
def test_images_are_pil_images(image):
    for draw in (
        lambda: visualize.draw_windows(image, (4, 4), (2,), "cropping"),
        lambda: visualize.draw_attention(image, torch.zeros(1, 25), (24, 24), 16, 2),
    ):
        with pytest.raises(SpatialTokensError, match=f"image must be a PIL.Image.Image, got {type(image).__name__}"):
            draw()


def test_attention_is_a_tensor():
    with pytest.raises(SpatialTokensError, match=r"attention must be a tensor \(K, 25\), got list"):
        visualize.draw_attention(visualize.sample_picture(), [[0.0] * 25], (24, 24), 16, 2)


def test_wrong_windows():
    with pytest.raises(SpatialTokensError, match="larger than grid_size"):
        visualize.draw_windows(visualize.sample_picture(), (24, 24), (26,), "cropping")


def test_save_writes_a_png(tmp_path):
    figure = visualize.draw_windows(visualize.sample_picture((48, 96)), (8, 16), ((4, 12), (8, 16)), "cropping")
    visualize.save(figure, tmp_path / "windows.png")
    with Image.open(tmp_path / "windows.png") as written:
        assert written.format == "PNG"
        assert len(written.convert("RGB").getcolors(1 << 20)) > 100


def test_save_into_a_missing_directory(tmp_path):
    figure = visualize.draw_windows(visualize.sample_picture(), (4, 4), (2,), "cropping")
    with pytest.raises(SpatialTokensError, match="cannot write"):
        visualize.save(figure, tmp_path / "missing" / "windows.png")


def test_sample_picture_is_always_the_same():
    assert visualize.sample_picture((100, 200)).size == (200, 100)
    assert visualize.sample_picture().tobytes() == visualize.sample_picture().tobytes()


@pytest.mark.parametrize("library", ["matplotlib.figure", "PIL"])
def test_without_a_library(monkeypatch, library):
    picture = visualize.sample_picture()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spatial-tokens\[viz\]'"):
        visualize.sample_picture() if library == "PIL" else visualize.draw_windows(picture, (4, 4), (2,), "cropping")
