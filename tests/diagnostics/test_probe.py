"""`probe` on encoders of which it is known what they tell of places."""

import json
from importlib.metadata import version

import pytest
import torch
from torch.nn import functional

pytest.importorskip("PIL")
pytest.importorskip("timm")

from PIL import Image

from spatial_tokens import SpatialTokensError
from spatial_tokens.cli import main
from spatial_tokens.diagnostics import place_probe, plot_probe, probe
from spatial_tokens.diagnostics.encoders import PictureEncoder
from spatial_tokens.diagnostics.place_probe import sine_cosine
from spatial_tokens.diagnostics.shifts import Shift, drawn_shift, generated
from spatial_tokens.visualize import sample_picture

SIDE, GRID, CHANNELS = 96, 12, 32
PLACES = sine_cosine((GRID, GRID), CHANNELS).float().view(GRID, GRID, CHANNELS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def content(pixels, channels=CHANNELS):
    """What each patch shows, and nothing of its place."""
    patches = functional.unfold(pixels, 8, stride=8).transpose(1, 2).unflatten(1, (GRID, GRID))
    return (patches - patches.mean(-1, keepdim=True)) @ torch.randn(192, channels, generator=generator()) / 3


def sine_cosine_embeddings(pixels):
    return content(pixels) + 3 * PLACES


def learned_embeddings(pixels):
    """A table with a row for each place, and channels enough to tell all apart."""
    return content(pixels, 192) + 2 * torch.randn(GRID, GRID, 192, generator=generator(1))


def no_embeddings(pixels):
    return content(pixels)


def constant_features(pixels):
    return torch.ones(len(pixels), GRID, GRID, CHANNELS)


def rolled_features(pixels):
    """Places of each picture are wrong by its own shift, as in docs/evidence.md."""
    shifts = [int(1e4 * picture.sum()) % GRID**2 for picture in pixels]
    return content(pixels) + torch.stack([PLACES.roll(divmod(shift, GRID), (0, 1)) for shift in shifts])


def rotary_embeddings(pixels):
    """One layer of attention whose queries and keys are turned by their places: only differences of places enter."""
    features = content(pixels).flatten(1, 2)
    axis = torch.arange(GRID).float()
    down, across = (each.flatten()[:, None] for each in torch.meshgrid(axis, axis, indexing="ij"))
    rates = 0.5 ** torch.arange(CHANNELS // 4)
    turn = torch.polar(torch.ones(GRID**2, CHANNELS // 2), torch.cat([across * rates, down * rates], dim=1))
    heads = (features @ torch.randn(CHANNELS, CHANNELS, generator=generator(seed)) / CHANNELS**0.5 for seed in (2, 3))
    query, key = (torch.view_as_real(torch.view_as_complex(each.unflatten(2, (-1, 2))) * turn).flatten(2) for each in heads)
    return (features + functional.scaled_dot_product_attention(query, key, features)).unflatten(1, (GRID, GRID))


def convolutional(pixels):
    """Places are told by the zeros around it alone."""
    maps = functional.avg_pool2d(pixels, 8)
    for layer in range(8):
        weight = torch.randn(16, maps.shape[1], 3, 3, generator=generator(layer)) * (2 / (9 * maps.shape[1])) ** 0.5
        maps = functional.relu(functional.conv2d(maps, weight, padding=1))
    return maps.permute(0, 2, 3, 1)


def found(encoder, limit=60, **options):
    return probe(encoder, image_size=SIDE, limit=limit, **options)


@pytest.mark.parametrize("encoder", [sine_cosine_embeddings, learned_embeddings])
def test_embeddings_of_places_are_read_from_the_slot(encoder):
    report = found(encoder)
    for reading in report.main.readings:
        assert reading.r2.low < reading.r2.value < reading.r2.high
        assert reading.r2.low > 0.9
        assert reading.right.low > 0.8
        assert reading.order.low > 0.95
        assert reading.follows.slot.value == pytest.approx(reading.r2.value, abs=0.05)
        assert reading.follows.content.low <= 0 <= reading.follows.content.high
        assert reading.follows.border.low <= 0 <= reading.follows.border.high
    assert any("mostly follow the patch's slot" in line for line in report.verdict)


def test_places_are_told_is_said_with_the_evidence():
    report = found(lambda pixels: content(pixels) + 4 * PLACES)
    assert report.verdict[0].startswith("The features encode places")
    assert "not measurably less than the plain features of our evidence (85% and 86%, chance 8%)" in report.verdict[0]
    assert "98.2 %" in report.verdict[0]
    assert "Limits" in report.verdict[-1]


@pytest.mark.parametrize("encoder", [no_embeddings, rolled_features, rotary_embeddings])
def test_features_that_tell_no_place_are_read_at_chance(encoder):
    report = found(encoder)
    for reading in report.main.readings:
        assert abs(reading.r2.value) < 0.1
        assert reading.chance == pytest.approx(1 / 12)
        assert reading.right.low <= 1 / 12 <= reading.right.high
        assert reading.skill.low <= 0 <= reading.skill.high
        assert reading.order.low <= 0.5 <= reading.order.high
    assert report.verdict[0].startswith("The features do not encode places")
    assert "rolled features of our evidence (12% and 13%, chance 8%)" in report.verdict[0]
    assert "91.2 %" in report.verdict[0]
    assert report.with_places.column.r2.low > 0.3


def test_places_that_few_pictures_do_not_find_are_not_said_to_be_absent():
    table = torch.randn(GRID, GRID, 192, generator=generator(1))

    def weak_embeddings(pixels):
        return content(pixels, 192) + 0.01 * table

    few, more = found(weak_embeddings, limit=24), found(weak_embeddings, limit=100)
    assert few.main.row.gain.low > 0  # still rising
    assert few.verdict[0].startswith("No verdict")
    assert "No place was found with 12 fitted pictures; more pictures may find it" in few.verdict[0]
    assert more.verdict[0].startswith("The features encode places in part")

    def no_embeddings_of_many_channels(pixels):
        return content(pixels, 192)

    assert found(no_embeddings_of_many_channels, limit=24).verdict[0].startswith("No verdict")
    assert found(no_embeddings_of_many_channels, limit=144).verdict[0].startswith("The features do not encode places")


def test_constant_features_are_exactly_at_chance():
    report = found(constant_features)
    for reading in report.main.readings:
        assert reading.r2.value == pytest.approx(0)
        assert reading.order.value == 0.5
        assert reading.right.value == pytest.approx(1 / 12)
    assert report.verdict[0].startswith("The features do not encode places")
    assert report.with_places.column.r2.value == pytest.approx(1)


def test_a_convolution_tells_places_by_its_zeros_which_stay_where_slots_are():
    report = found(convolutional)
    for reading in report.main.readings:
        assert reading.r2.low > 0.1
        assert reading.follows.slot.low > 0.1
        assert reading.follows.content.low <= 0 <= reading.follows.content.high
    assert "between the two cases" in report.verdict[0]


def test_a_reading_of_what_is_shown_follows_the_content():
    def ramps(number):
        x = torch.arange(SIDE).float()
        shades = (x[:, None] * 0 + x) * 2 + torch.randint(20, (1,), generator=generator(number))
        return Image.fromarray(torch.stack([shades, shades.T, shades * 0], dim=-1).byte().numpy())

    pictures = [ramps(number) for number in range(40)]
    report = probe(lambda pixels: functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1), pictures, image_size=SIDE)
    for reading in report.main.readings:
        assert reading.r2.low > 0.95
        assert reading.follows.content.value == pytest.approx(1, abs=0.15)
        assert abs(reading.follows.slot.value) < 0.1
    assert any("mostly follow what the patch shows" in line for line in report.verdict)


def test_a_reading_of_the_pictures_border_follows_the_border(monkeypatch):
    def framed(number):
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        picture.paste(generated(number).resize((SIDE - 8, SIDE - 8)), (8, 8))
        return picture

    def after_white(pixels):
        """How many patches each one comes after a white column, and a white row, in what is shown."""
        white = (functional.avg_pool2d(pixels, 8).amin(1) > 0.99).float()
        across, down = white.mean(1, keepdim=True) > 0.9, white.mean(2, keepdim=True) > 0.9

        def after(edge, axis):  # patches since the last edge, on a torus
            axis_length, count = edge.shape[axis], torch.zeros_like(edge, dtype=torch.float32)
            for _ in range(2 * axis_length):
                count = torch.where(edge, 0, count.roll(1, axis) + 1)
            return count.clamp(max=axis_length)

        distances = [after(across, 2).expand(-1, GRID, -1), after(down, 1).expand(-1, -1, GRID)]
        return torch.stack(distances, dim=-1)

    def drawn(kind, grid, random):
        if kind == "roll":
            return drawn_shift(kind, grid, random)
        return Shift(kind, random.uniform(0.3, 1), random.uniform(0.3, 1))  # the border is out of sight

    monkeypatch.setattr(place_probe, "drawn_shift", drawn)
    report = probe(after_white, [framed(number) for number in range(40)], image_size=SIDE)
    for reading in report.main.readings:
        assert reading.r2.low > 0.9
        assert reading.follows.border.value == pytest.approx(1, abs=0.05)
        assert abs(reading.follows.slot.value) < 0.05


def test_pictures_of_many_sizes_and_an_encoder_of_any(monkeypatch):
    pictures = [generated(number).resize((64 + 16 * (number % 3), 96)) for number in range(48)]

    def encode(images):
        maps = []
        for image in images:
            grid = image.height // 8, image.width // 8
            noise = torch.randn(*grid, 16, generator=generator(sum(image.tobytes()[::97])))
            maps.append(noise + 6 * sine_cosine(grid, 16).float().view(*grid, 16))
        return {"all": maps}

    any_size = PictureEncoder("any", None, encode)
    monkeypatch.setattr(place_probe, "picture_encoder", lambda *given, **options: any_size)
    report = probe("any", pictures)
    monkeypatch.undo()
    assert report.main.grid is None
    assert all(reading.r2.low > 0.7 for reading in report.main.readings)
    assert report.verdict[0].startswith("No verdict")
    assert "of many sizes" in str(report)
    fixed = probe(sine_cosine_embeddings, pictures, image_size=SIDE)  # each is cut and scaled to one size
    assert fixed.main.grid == (GRID, GRID)


def test_every_layer_of_a_timm_model_is_read(tmp_path):
    report = probe("vit_tiny_patch16_224", image_size=64, random_weights=True, limit=8)
    assert [each.name for each in report.layers] == [str(number) for number in range(1, 13)]
    assert (report.layer, report.main.grid, report.main.channels) == ("11", (4, 4), 192)
    assert report.verdict[0].startswith("No verdict")
    assert any("random" in line for line in report.verdict)
    assert len(plot_probe(report).axes) == 3
    again = json.loads(report.to_json())
    assert len(again["layers"]) == 12
    assert (
        probe("hf-hub:timm/test_vit", random_weights=True, limit=4).main.column
        == probe("test_vit", random_weights=True, limit=4).main.column
    )
    stages = probe("test_convnext", random_weights=True, limit=4, layer=2)
    assert len({each.grid for each in stages.layers}) > 1
    assert stages.layer == "2"


def test_a_transformers_encoder_and_a_vision_language_model_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.adapters.huggingface.models import llava

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    report = probe(tmp_path / "clip", limit=4)
    assert [(each.name, each.grid) for each in report.layers] == [(str(number), (4, 4)) for number in (1, 2, 3)]
    assert report.layer == "2"

    model, processor = llava()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "llava")
    report = probe(tmp_path / "llava", limit=4)
    assert [(each.name, each.grid) for each in report.layers] == [("1", (24, 24)), ("2", (24, 24)), ("projector", (24, 24))]
    assert report.layer == "projector"
    assert report.layers[0].column.r2 == report.main.column.r2  # LLaVA takes the last but one


def test_a_vision_language_model_that_takes_pictures_of_any_size_is_read():
    pytest.importorskip("transformers")
    from tests.adapters.huggingface.models import qwen

    model, processor = qwen()
    pictures = [generated(number).resize((112, 112 if number % 3 else 84)) for number in range(8)]
    report = probe(model, pictures, processor=processor)
    assert [each.name for each in report.layers] == ["1", "2", "projector"]
    assert report.main.grid is None
    assert report.verdict[0].startswith("No verdict")


def test_one_tested_picture_gives_no_intervals_and_no_verdict():
    report = found(sine_cosine_embeddings, limit=4)
    assert (report.tested, report.main.column.r2.low, report.main.column.follows) == (1, None, None)
    assert "too few pictures were tested" in report.verdict[0]


def run(capsys, *arguments, code=0):
    try:
        given = main(["probe", *map(str, arguments)])
    except SystemExit as exit_:
        given = exit_.code
    printed = capsys.readouterr()
    assert given == code, printed.err
    if code:
        assert len(printed.err.splitlines()) == 1
    return printed.err if code else printed.out


def test_the_command_prints_a_table_and_writes_a_report_and_a_plot(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        generated(number).save(folder / f"{number}.png")
    given = ("vit_tiny_patch16_224", "--image-size", 64, "--random-weights", "--images", folder, "--output", tmp_path / "out")
    printed = run(capsys, *given)
    assert "11*" in printed
    heads = [line for line in printed.splitlines() if line.startswith("layer ")]
    assert [line.split() for line in heads] == [["layer", "patches", "channels", *["col", "row"] * 6]]
    assert "No verdict" in printed
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert (report["pictures"], report["generated"]) == (8, False)
    assert report["machine"]["versions"]["torch"] == version("torch")
    assert Image.open(tmp_path / "out" / "probe.png").width > 500
    assert json.loads(run(capsys, *given, "--json"))["layers"] == report["layers"]


def test_bad_input_of_the_command_is_one_line(tmp_path, capsys):
    model = ("vit_tiny_patch16_224", "--random-weights", "--image-size", 64, "--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in run(capsys, *model, "--images", tmp_path / "empty", code=2)
    assert "is not a folder" in run(capsys, *model, "--images", tmp_path / "none", code=2)
    assert "must be a path" in run(capsys, *model, "--images", "", code=2)
    sample_picture().save(tmp_path / "empty" / "one.png")
    assert "got 1 pictures; give at least 4" in run(capsys, *model, "--images", tmp_path / "empty", code=2)
    for number in range(3):
        (tmp_path / "empty" / f"{number}.png").write_bytes(b"no picture")
    assert "cannot read the picture" in run(capsys, *model, "--images", tmp_path / "empty", code=2)
    assert "timm does not know a model" in run(capsys, "no_such_model", "--output", tmp_path / "out", code=2)
    assert "layer must be one of" in run(capsys, *model, "--layer", 99, code=2)
    assert "2 x 2" in run(capsys, *model[:2], "--image-size", 16, code=2)
    assert "go with a timm model" in run(capsys, tmp_path, "--random-weights", "--output", tmp_path / "out", code=2)
    assert "cannot use the device" in run(capsys, *model, "--device", "gpu", code=2)
    assert "timm does not know a model 'no_such_model'" in run(capsys, "timm/no_such_model", "--output", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_said():
    for encoder, options, message in [
        (
            lambda pixels: pixels.mean((2, 3)),
            {"image_size": 32},
            r"must give maps of patches \(8, H, W, C\).*without a grid of patches",
        ),
        (lambda pixels: pixels * torch.nan, {"image_size": 32}, "NaN or infinity for picture 0"),
        (lambda pixels: pixels, {}, "needs image_size"),
        (lambda pixels: pixels, {"image_size": 32, "layer": 1}, "layer goes with the name"),
        (3, {"image_size": 32}, "must be a name"),
        (torch.nn.Identity(), {"pictures": [1, 2, 3, 4], "image_size": 32}, "a picture must be a path or a PIL"),
        (no_embeddings, {"limit": 0, "image_size": 32}, "limit must be a positive"),
        (no_embeddings, {"pictures": [sample_picture()], "image_size": 32}, "got 1 pictures"),
    ]:
        with pytest.raises(SpatialTokensError, match=message):
            probe(encoder, **options)


def test_a_vision_language_model_needs_its_processor():
    pytest.importorskip("transformers")
    from tests.adapters.huggingface.models import llava

    with pytest.raises(SpatialTokensError, match="needs its processor"):
        probe(llava()[0])
