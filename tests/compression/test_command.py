"""`spatial-tokens compress` as a user meets it."""

import io
import json
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.adapters.timm import TimmPatchEncoder
from spatial_tokens.adapters.transformers import TransformersPatchEncoder
from spatial_tokens.checkpoint import to_llava_sp
from spatial_tokens.cli import main
from spatial_tokens.compression import compress
from spatial_tokens.compression.encoded import EncodedPictures, pictures_in
from spatial_tokens.pictures import read_picture
from tests.tolerances import assert_close

CONFIG = SPProjectorConfig(
    vision_hidden_size=16, text_hidden_size=12, grid_size=6, kernel_sizes=(2, 4, 6), spatial_hidden_size=6, detail_kernel_size=4,
    spatial_head="linear",
)  # fmt: skip


def run(capsys, *arguments, code=0):
    """What it printed, and what it said on standard error; the last line of that if it should fail."""
    try:
        given = main(["compress", *(str(each) for each in arguments)])
    except SystemExit as exit_:
        given = exit_.code
    printed = capsys.readouterr()
    assert given == code, printed.err
    if code:
        assert printed.out == ""
        return printed.err.splitlines()[-1]
    return printed


@pytest.fixture
def projector(tmp_path):
    made = SPProjector.from_config(CONFIG)
    made.save_pretrained(tmp_path / "dense")
    return made


@pytest.fixture
def features(tmp_path):
    made = torch.randn(30, 36, 16)
    save_file({"features": made}, tmp_path / "features.safetensors")
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(11):
        pixels = torch.randint(0, 256, (20 + i, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else "") / f"{i:02}.{'png' if i % 3 else 'JPG'}", format="PNG")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def test_a_file_of_features(capsys, tmp_path, projector, features):
    out = tmp_path / "small"
    printed = run(capsys, tmp_path / "dense", out, "--features", tmp_path / "features.safetensors", "--rank", 4)
    expected, report = compress(projector, features, rank=4)
    assert_close(SPProjector.from_pretrained(out)(features), expected(features))
    assert sorted(path.name for path in out.iterdir()) == [
        "compression.json",
        "compression.png",
        "config.json",
        "model.safetensors",
    ]
    assert printed.out.startswith(str(report))
    assert printed.out.endswith(f"wrote {out}: the projector, compression.json and compression.png\n")
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["moments of features", "tokens of dense kernels"]
    assert json.loads((out / "compression.json").read_text()) == json.loads(report.to_json())


def test_json_options_and_a_released_file(capsys, tmp_path, projector, features):
    save_file(to_llava_sp(projector), tmp_path / "released.safetensors")
    projector.save_pretrained(tmp_path / "dense")
    arguments = ["--features", tmp_path / "features.safetensors", "--parameters", 500, "--frequencies", 2, "--basis", "learned"]
    values = json.loads(run(capsys, tmp_path / "dense", tmp_path / "small", *arguments, "--json").out)
    assert values["parameters"] <= 500
    assert values["spatial_basis"] == SPProjector.from_pretrained(tmp_path / "small").config.spatial_basis == "learned"
    assert (values["input"], values["output"]) == (str(tmp_path / "dense"), str(tmp_path / "small"))
    whole = run(capsys, tmp_path / "released.safetensors", tmp_path / "again", *arguments, code=2)
    assert "on a grid of 24 x 24" in whole  # which no released model's kernels tell


def test_pictures_and_a_vision_model_of_transformers(capsys, tmp_path, projector, photos, clip):
    from transformers import AutoModel, CLIPImageProcessor

    out = tmp_path / "small"
    run(capsys, tmp_path / "dense", out, "--images", photos, "--encoder", clip, "--rank", 3)
    model, processor = AutoModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    pictures = [read_picture(path) for path in sorted([*photos.rglob("*.png"), *photos.rglob("*.JPG")])]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected, report = compress(projector, features, rank=3)
    assert report.pictures == 11
    assert_close(SPProjector.from_pretrained(out)(features), expected(features), 1e-4)
    values = json.loads(
        run(capsys, tmp_path / "dense", out, "--images", photos, "--encoder", clip, "--limit", 5, "--overwrite", "--json").out
    )
    assert values["pictures"] == 5


def test_vision_models_that_do_not_fit(clip, tmp_path):
    encoder = TransformersPatchEncoder(str(clip))
    assert (encoder.grid_size, encoder.hidden_size, encoder.image_size) == ((6, 6), 16, (24, 24))
    with pytest.raises(SpatialTokensError, match=r"reads images of \(24, 24\) pixels, got \(28, 28\)"):
        encoder(torch.zeros(1, 3, 28, 28))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpatialTokensError, match="transformers cannot load"):
        TransformersPatchEncoder(str(tmp_path))


def test_pictures_and_a_timm_model(capsys, tmp_path, photos, monkeypatch):
    pytest.importorskip("timm")
    config = SPProjectorConfig(
        vision_hidden_size=192, text_hidden_size=8, grid_size=3, kernel_sizes=(1, 3), detail_kernel_size=None
    )
    SPProjector.from_config(config).save_pretrained(tmp_path / "dense")

    def untrained(name, layer, pretrained):
        assert pretrained
        return TimmPatchEncoder(name, layer, image_size=48)

    monkeypatch.setattr("spatial_tokens.cli.compress.TimmPatchEncoder", untrained)
    arguments = ["--images", photos, "--encoder", "vit_tiny_patch16_224", "--layer", "-1", "--rank", 4]
    run(capsys, tmp_path / "dense", tmp_path / "small", *arguments)
    assert SPProjector.from_pretrained(tmp_path / "small").config.rank == 4


def test_pictures_are_encoded_once(photos):
    calls = []

    def encoder(pixels):
        calls.append(len(pixels))
        return pixels.flatten(2).mT

    paths = pictures_in(photos, 100)
    assert [path.name for path in pictures_in(photos, 4)] == [paths[i].name for i in (0, 2, 5, 8)]
    with EncodedPictures(paths, encoder, lambda picture: torch.full((3, 2, 2), float(picture.height))) as encoded:
        first, second = torch.cat(list(encoded)), torch.cat(list(encoded))
        folder = encoded._folder.name
    assert calls == [8, 3]
    assert torch.equal(first, second)
    assert first[:, 0, 0].tolist() == [read_picture(path).height for path in paths]
    assert not os.path.exists(folder)


def test_progress_on_a_terminal(tmp_path, projector, features, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    arguments = [
        str(tmp_path / "dense"),
        str(tmp_path / "small"),
        "--features",
        str(tmp_path / "features.safetensors"),
        "--rank",
        "2",
    ]
    assert main(["compress", *arguments]) == 0
    assert terminal.getvalue().startswith("\rmoments of features: 30 pictures\033[K")
    assert terminal.getvalue().endswith("\n\rtokens of dense kernels: 30 pictures\033[K\n")


def test_without_matplotlib_there_is_no_plot(capsys, tmp_path, projector, features, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    printed = run(capsys, tmp_path / "dense", tmp_path / "small", "--features", tmp_path / "features.safetensors", "--rank", 2)
    assert "no compression.png: matplotlib is not installed; run: pip install 'spatial-tokens[viz]'\n" in printed.err
    assert printed.out.endswith("the projector, compression.json\n")


def test_a_plot_that_fails_does_not_cost_the_weights(capsys, tmp_path, projector, features, monkeypatch):
    def fails(report):
        raise ValueError("no such scale")

    monkeypatch.setattr("spatial_tokens.cli.compress.plot_report", fails)
    printed = run(capsys, tmp_path / "dense", tmp_path / "small", "--features", tmp_path / "features.safetensors", "--rank", 2)
    assert "no compression.png: no such scale\n" in printed.err
    assert SPProjector.from_pretrained(tmp_path / "small").config.rank == 2


def test_the_grid_is_that_of_the_image_processors_pixels(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    for name, kind, more in (("plain", "Dinov2", {}), ("registers", "Dinov2WithRegisters", {"num_register_tokens": 4})):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape, **more)).eval()
        model.save_pretrained(tmp_path / name)
        processor = transformers.BitImageProcessor(size={"shortest_edge": 50}, crop_size={"height": 28, "width": 42})
        processor.save_pretrained(tmp_path / name)
        encoder = TransformersPatchEncoder(str(tmp_path / name))
        pixels = torch.randn(2, 3, 28, 42)
        assert (encoder.image_size, encoder.grid_size) == ((28, 42), (2, 3))
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
            assert_close(encoder(pixels), states[:, -6:])
    encoder.model.config.num_register_tokens = 2
    with pytest.raises(SpatialTokensError, match=r"has shape \(2, 11, 16\): no grid of \(2, 3\) patches"):
        encoder(pixels)
    transformers.BitImageProcessor(size={"shortest_edge": 28}, do_center_crop=False).save_pretrained(tmp_path / "plain")
    prepare = TransformersPatchEncoder(str(tmp_path / "plain")).transform()
    with pytest.raises(SpatialTokensError, match="of another; make it resize or crop to one size"):
        prepare(Image.new("RGB", (40, 40)))


def test_a_picture_of_which_the_encoder_makes_nan_is_named(photos):
    paths = pictures_in(photos, 100)

    def encoder(pixels):
        return torch.where(pixels == read_picture(paths[3]).height, torch.nan, pixels).flatten(2).mT

    encoded = EncodedPictures(paths, encoder, lambda picture: torch.full((3, 2, 2), float(picture.height)))
    with encoded, pytest.raises(SpatialTokensError, match=f"NaN or infinity for the picture .*{paths[3].name}"):
        list(encoded)


def test_eight_bits(capsys, tmp_path, projector):
    pytest.importorskip("torchao")
    printed = run(capsys, tmp_path / "dense", tmp_path / "small", "--int8")
    assert "kernels of 8 bits" in printed.out
    patches = torch.randn(2, 36, 16)
    small = SPProjector.from_pretrained(tmp_path / "small")
    assert small.extractor.kernels[0].weight.qdata.dtype == torch.int8
    assert_close(small(patches), projector(patches), 0.02)
    values = json.loads(run(capsys, tmp_path / "dense", tmp_path / "again", "--int8", "--json").out)
    assert values["bytes"] < values["bytes_before"] / 2


def test_mistakes(capsys, tmp_path, projector, features, photos, clip):
    dense, out = tmp_path / "dense", tmp_path / "out"
    told = ["--features", tmp_path / "features.safetensors"]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    large = SPProjectorConfig(**{**CONFIG.to_dict(), "vision_hidden_size": 8})
    SPProjector.from_config(large).save_pretrained(tmp_path / "other")
    new = tmp_path / "new"
    for arguments, message in (
        ([dense, new], "one of the arguments --images --features --int8 is required"),
        ([dense, new, *told, "--int8"], "argument --int8: not allowed with argument --features"),
        ([dense, new, *told, "--rank", 2, "--error", 0.1], "argument --error: not allowed with argument --rank"),
        ([dense, new, *told, "--encoder", "x", "--limit", 3], "--encoder, --limit needs --images"),
        ([dense, new, "--int8", "--rank", 2], "--rank needs --images or --features"),
        ([dense, new, "--images", photos], "--images needs --encoder"),
        ([dense, new, "--images", tmp_path / "none", "--encoder", clip], "is not a folder; give one of pictures"),
        ([dense, new, "--images", dense, "--encoder", clip], "dense has no pictures; looked for .bmp, .gif"),
        ([dense, new, "--images", photos, "--encoder", tmp_path / "dense"], "transformers cannot load"),
        ([dense, new, "--images", photos, "--encoder", clip, "--layer", "5"], "1 to 2, or -2 to -1 from the end; got 5"),
        ([tmp_path / "other", new, "--images", photos, "--encoder", clip], "gives 16 channels on a grid of (6, 6), the"),
        ([dense, new, "--features", ""], "--features must be a path, got an empty string"),
        ([dense, new, *told, "--rank", 17], "rank 17 is larger than vision_hidden_size 16"),
        ([dense, new, *told, "--device", "nowhere"], "cannot use the device 'nowhere'"),
        ([dense, out, *told], "out is already there; choose another OUT or give --overwrite"),
        ([dense, out, *told, "--overwrite"], "holds files that the command does not write, notes.txt"),
        ([dense, tmp_path / "file", *told, "--overwrite"], "file is not overwritten: it is not a directory"),
        ([dense, dense, *told, "--overwrite"], "IN and OUT are both"),
        ([tmp_path / "none", new, *told], "none does not exist"),
    ):  # fmt: skip
        said = run(capsys, *arguments, code=2)
        assert message in said, said
        assert said.startswith("spatial-tokens compress: error: ")
        assert not new.exists()
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_frequencies_of_each_kernel(capsys, tmp_path, projector, features):
    told = [tmp_path / "dense", tmp_path / "small", "--features", tmp_path / "features.safetensors", "--rank", 2, "--frequencies"]
    assert "use frequencies=(2, 4, 5)" in run(capsys, *told, "5", code=2)
    run(capsys, *told, "2,3,4")
    assert SPProjector.from_pretrained(tmp_path / "small").config.frequencies == (2, 3, 4)
    assert "must be a positive integer, got" in run(capsys, *told, "2,,4", "--overwrite", code=2)


def test_a_share_that_no_kernels_reach(capsys, tmp_path, projector, features):
    told = [tmp_path / "dense", tmp_path / "small", "--features", tmp_path / "features.safetensors"]
    said = run(capsys, *told, "--error", 0.0001, "--frequencies", 1, code=2)
    assert said.endswith(
        "allow more, or give more frequencies, a higher rank, or learned maps (spatial_basis='learned', or --basis learned)"
    )


def test_what_was_there_is_kept_if_it_fails(capsys, tmp_path, projector, features):
    told = ["--features", tmp_path / "features.safetensors"]
    run(capsys, tmp_path / "dense", tmp_path / "small", *told, "--rank", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    run(capsys, tmp_path / "dense", tmp_path / "small", *told, "--overwrite", "--error", 0.0001, "--frequencies", 1, code=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "features.safetensors", "small"]
    run(capsys, tmp_path / "dense", tmp_path / "small", *told, "--overwrite", "--rank", 3)
    assert SPProjector.from_pretrained(tmp_path / "small").config.rank == 3


def test_a_picture_that_cannot_be_read_is_named(capsys, tmp_path, projector, clip):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG")
    said = run(capsys, tmp_path / "dense", tmp_path / "new", "--images", tmp_path / "photos", "--encoder", clip, code=2)
    assert "cannot read the picture" in said
    assert "broken.png" in said
