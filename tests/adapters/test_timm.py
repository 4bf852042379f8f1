"""The timm adapter against hooks on timm's own model."""

import re
import sys

import pytest
import torch
from PIL import Image

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.cli import main
from spatial_tokens.errors import MissingExtraError
from tests.fake_hub import no_connection
from tests.tolerances import relative_error, rounding

timm = pytest.importorskip("timm")

from spatial_tokens.adapters.timm import TimmPatchEncoder  # noqa: E402

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
MODELS = {
    "vit_large_patch14_clip_quickgelu_336": (14, 1),
    "vit_large_patch16_siglip_384": (16, 0),
    "vit_small_patch14_dinov2": (14, 1),
    "vit_small_patch14_reg4_dinov2": (14, 5),
    "eva02_tiny_patch14_224": (14, 1),
}


def encoder_and_blocks(name, layer, image_size):
    """The adapter, and the output of each block of the same model, unpruned, by hooks."""
    torch.manual_seed(0)
    encoder = TimmPatchEncoder(name, layer, image_size=image_size, **SMALL).eval()
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0, img_size=image_size, **SMALL).eval()
    outputs = []
    for block in whole.blocks:
        block.register_forward_hook(lambda module, given, output: outputs.append(output))
    return encoder, whole, outputs


@pytest.mark.parametrize(("name", "patch", "prefix"), [(name, *facts) for name, facts in MODELS.items()])
@pytest.mark.parametrize(("layer", "block"), [(-2, 2), (-1, 3), (1, 0), (3, 2)])
def test_features_are_those_of_the_block_without_prefix_tokens(name, patch, prefix, layer, block):
    image_size = (4 * patch, 6 * patch)
    encoder, whole, outputs = encoder_and_blocks(name, layer, image_size)
    pixels = torch.randn(2, 3, *image_size)
    with torch.inference_mode():
        patches = encoder(pixels)
        whole.forward_features(pixels)
    assert encoder.grid_size == (4, 6)
    assert encoder.hidden_size == 48
    assert patches.shape == (2, 24, 48)
    assert patches.is_contiguous()
    assert outputs[block].shape[1] == 24 + prefix
    assert torch.equal(patches, outputs[block][:, prefix:])


def test_patches_are_in_row_order():
    encoder = TimmPatchEncoder("vit_small_patch14_dinov2", 1, image_size=(42, 70), **SMALL).eval()
    pixels = torch.zeros(1, 3, 42, 70)
    changed = pixels.clone()
    changed[:, :, 14:28, 56:70] += 5  # row 1, column 4 of 3 x 5
    with torch.inference_mode():
        moved = (encoder(changed) - encoder(pixels)).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 5 + 4


@pytest.mark.parametrize(
    ("name", "image_size", "grid_size"),
    [
        ("vit_large_patch14_clip_quickgelu_336.openai", (336, 336), (24, 24)),
        ("vit_large_patch16_siglip_384", (384, 384), (24, 24)),
        ("vit_large_patch14_reg4_dinov2", (518, 518), (37, 37)),
        ("eva02_large_patch14_clip_336", (336, 336), (24, 24)),
        ("samvit_base_patch16", (1024, 1024), (64, 64)),
        ("naflexvit_base_patch16_gap", (384, 384), (24, 24)),
        ("swin_tiny_patch4_window7_224", (224, 224), (14, 14)),
    ],
)
def test_real_architectures(name, image_size, grid_size):
    if name.startswith("naflex") and not hasattr(timm.models.NaFlexVit, "prune_intermediate_layers"):
        pytest.skip(f"timm {timm.__version__} cannot prune {name}")
    with torch.device("meta"):
        encoder = TimmPatchEncoder(name)
        patches = encoder(torch.zeros(2, 3, *image_size))
    assert (encoder.image_size, encoder.grid_size) == (image_size, grid_size)
    assert patches.shape == (2, grid_size[0] * grid_size[1], encoder.hidden_size)


def test_feeds_a_projector_and_passes_gradients():
    encoder = TimmPatchEncoder("vit_large_patch14_clip_quickgelu_336", image_size=(112, 168), **SMALL)
    config = SPProjectorConfig(
        vision_hidden_size=encoder.hidden_size, text_hidden_size=32, grid_size=encoder.grid_size,
        kernel_sizes=(4, 8), spatial_hidden_size=16, detail_kernel_size=4,
    )  # fmt: skip
    SPProjector.from_config(config)(encoder(torch.randn(1, 3, 112, 168))).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.model.blocks.parameters())


def test_transform_and_back():
    encoder = TimmPatchEncoder("vit_large_patch14_clip_quickgelu_336", image_size=56, **SMALL)
    picture = Image.effect_noise((56, 56), 80).convert("RGB")
    pixels = encoder.transform()(picture)
    assert pixels.shape == (3, 56, 56)
    assert encoder.picture(pixels).tobytes() == picture.tobytes()


def test_dropped_blocks_hold_no_parameters():
    names = {
        name.split(".")[2]
        for name, _ in TimmPatchEncoder("vit_small_patch14_dinov2", -2, **SMALL).named_parameters()
        if ".blocks." in name
    }
    assert names == {"0", "1", "2"}


@pytest.mark.parametrize("layer", [0, 5, -5, 1.0, True, None])
def test_unknown_layer(layer):
    with pytest.raises(SpatialTokensError, match="layer must be one of 'vit_small_patch14_dinov2': 1 to 4, or -4 to -1"):
        TimmPatchEncoder("vit_small_patch14_dinov2", layer, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_model",), "timm does not know a model 'no_such_model'"),
        (("patch14_dinov2",), "did you mean vit_"),
        (("test_resnet",), "layer must be one of"),
    ],
)
def test_unusable_models(arguments, message):
    with pytest.raises(SpatialTokensError, match=message):
        TimmPatchEncoder(*arguments, layer=-99)


def test_argument_that_timm_refuses():
    with pytest.raises(SpatialTokensError, match=r"timm cannot make 'vit_small_patch14_dinov2'.*no_such_option"):
        TimmPatchEncoder("vit_small_patch14_dinov2", no_such_option=1)


def test_wrong_image_size():
    with pytest.raises(SpatialTokensError, match="image_size must be a positive integer"):
        TimmPatchEncoder("vit_small_patch14_dinov2", image_size=(0, 14))


@pytest.mark.parametrize("shape", [(1, 3, 28, 42), (3, 42, 42), (1, 1, 42, 42)])
def test_wrong_pixels(shape):
    encoder = TimmPatchEncoder("vit_small_patch14_dinov2", image_size=42, **SMALL)
    with pytest.raises(SpatialTokensError, match=r"pixels must have shape \(B, 3, 42, 42\)"):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: None, r"pixels must be a tensor \(B, 3, 42, 42\), got NoneType"),
        (lambda pixels: pixels.to_sparse(), "got torch.sparse_coo; call .to_dense()"),
        (lambda pixels: pixels.byte(), "pixels are torch.uint8, the weights torch.float32"),
        (lambda pixels: pixels.to("meta"), "pixels are on meta, the weights on cpu"),
    ],
)
def test_pixels_that_the_model_cannot_read(change, message):
    encoder = TimmPatchEncoder("vit_small_patch14_dinov2", image_size=42, **SMALL)
    with pytest.raises(SpatialTokensError, match=message):
        encoder(change(torch.zeros(1, 3, 42, 42)))


@pytest.mark.parametrize("name", [None, 3, b"vit_tiny_patch16_224"])
def test_names_are_strings(name):
    with pytest.raises(SpatialTokensError, match="name must be that of a timm model, such as 'vit_base_patch16_224', got "):
        TimmPatchEncoder(name)


def test_timms_own_name_of_the_image_size():
    assert TimmPatchEncoder("vit_small_patch14_dinov2", img_size=42, **SMALL).grid_size == (3, 3)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spatial-tokens\[timm\]'"):
        TimmPatchEncoder("vit_small_patch14_dinov2")


def test_half_precision():
    encoder = TimmPatchEncoder("vit_small_patch14_dinov2", image_size=42, **SMALL).eval()
    pixels = torch.randn(1, 3, 42, 42)
    with torch.inference_mode():
        expected = encoder(pixels)
        assert relative_error(encoder.to(torch.bfloat16)(pixels.to(torch.bfloat16)), expected) < rounding(torch.bfloat16, 12)


def test_a_model_that_cannot_give_its_layers(monkeypatch):
    monkeypatch.delattr("timm.models.VisionTransformer.forward_intermediates")
    with pytest.raises(SpatialTokensError, match="'vit_small_patch14_dinov2' has no forward_intermediates"):
        TimmPatchEncoder("vit_small_patch14_dinov2")


def test_weights_that_cannot_be_had_are_said_so_at_once(monkeypatch, tmp_path, capsys):
    no_connection(monkeypatch, tmp_path)
    reason = "/.* is neither a folder here nor in Hugging Face's cache, and it could not be downloaded from the Hugging Face Hub: "
    with pytest.raises(SpatialTokensError, match=f"timm cannot make 'vit_small_patch14_dinov2': timm{reason}"):
        TimmPatchEncoder("vit_small_patch14_dinov2", pretrained=True)
    assert main(["demo", "--pretrained", "--output", str(tmp_path)]) == 2
    assert re.fullmatch(f"spatial-tokens demo: error: timm cannot make '.*': timm{reason}.*\n", capsys.readouterr().err)
