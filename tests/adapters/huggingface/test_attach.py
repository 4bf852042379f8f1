"""What `attach` takes: a ready projector, an extractor of one's own, options; and what it makes of patches on another grid."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.layouts import fitted
from spatial_tokens.modules import MLPHead
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen
from tests.tolerances import FLOAT32, assert_close, rounding

PRESET = "llava-sp-cropping"
WIDTHS = {"vision_hidden_size": 64, "text_hidden_size": 64, "patch_head": None, **FIELDS}


def ready_projector(seed=3, **fields):
    torch.manual_seed(seed)
    return SPProjector.from_config(SPProjectorConfig.from_preset(PRESET, **{**WIDTHS, **fields}))


def test_a_ready_projector(tmp_path):
    """It is the one in the model; what it was trained to, and its dtype, stay."""
    base, plain = llava()
    projector = ready_projector().to(torch.float64)
    model, processor = attach(base, plain, projector)
    assert model.spatial_tokens is projector
    assert not projector.training, "the model is in evaluation mode"
    assert {each.dtype for each in projector.parameters()} == {torch.float64}
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    expected = model(**inputs).logits
    save_adapter(model, tmp_path)
    detach(model)
    loaded, _ = load_adapter(base, tmp_path, plain)
    assert torch.equal(loaded(**inputs).logits, expected)
    detach(loaded)
    other, _ = attach(base, plain, projector=projector.config)
    assert not torch.equal(other(**inputs).logits, expected)


class Means(nn.Module):
    """An extractor of the user's own: the mean of each half of the patches."""

    num_spatial_tokens = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, patches):
        return torch.stack([half.mean(1) for half in patches.chunk(2, dim=1)], dim=1) * self.scale


def test_an_extractor_of_ones_own():
    base, plain = llava()
    head = MLPHead(64, 64)
    model, processor = attach(base, plain, SPProjector(Means(), None, head, None))
    inputs = processor(images=pictures(1), text="<image> is", return_tensors="pt")
    seen, features = [], []
    hooks = [
        model.get_decoder().register_forward_pre_hook(lambda _, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True),
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: features.append(args[0])),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    (patches,) = features
    halves = torch.stack([patches[0, :288].mean(0), patches[0, 288:].mean(0)])
    assert_close(seen[0][0, :2], head(halves))
    model.train()(**processor(text="ab", return_tensors="pt")).logits.sum().backward()
    assert not model.spatial_tokens.extractor.scale.grad.any()


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        (lambda: ready_projector(patch_head="mlp"), "the projector has a patch head"),
        (lambda: ready_projector(vision_hidden_size=32), "vision_hidden_size 32, not 64"),
        (lambda: ready_projector(grid_size=32, kernel_sizes=(8, 32)), r"grid_size \(32, 32\), not \(24, 24\)"),
        (lambda: ready_projector(text_hidden_size=32), "the projector's tokens have 32 channels, the language model has 64"),
        (lambda: nn.Linear(2, 2), "projector must be"),
        (lambda: None, "projector must be"),
    ],
)
def test_projectors_that_do_not_fit(projector, message):
    base, plain = llava()
    with pytest.raises(SpatialTokensError, match=message):
        attach(base, plain, projector())
    assert not hasattr(base, "spatial_tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be 'auto', 'own' or 'image', got 'both'"),
        ({"mode": None}, "mode must be"),
        ({"unit": torch.zeros(2)}, "unit must be"),
        ({"resize": "nearest"}, "resize must be None, 'pool' or 'interpolate'"),
        ({"resize": ["pool"]}, "resize must be"),
        ({"preset": PRESET}, "a preset is given as the projector: attach"),
    ],
)
def test_options(options, message):
    base, plain = llava()
    with pytest.raises(SpatialTokensError, match=message):
        attach(base, plain, **options, **FIELDS)


@pytest.mark.parametrize(("side", "sizes"), [(32, (12, 16, 20, 24, 28, 32)), (16, (6, 8, 10, 12, 14, 16))])
def test_kernels_of_another_grid(side, sizes):
    """Two patches inward on every side, as in the paper; one where the grid is too small for six of these."""
    model, _ = attach(llava()[0], grid_size=side, resize="pool", **FIELDS)
    assert model.spatial_tokens.config.kernel_sizes == sizes


def test_its_old_name_for_the_projector():
    base, plain = llava()
    with pytest.warns(FutureWarning, match="attach takes projector= now"):
        attach(base, plain, config=ready_projector().config)
    assert torch.equal(torch.tensor(base.spatial_tokens.config.kernel_sizes), torch.tensor([4, 8, 12, 16, 20, 24]))


def pooled(patches, size):
    """Adaptive average pooling of `(H, W, C)`: each cell is the mean of the patches from floor to ceiling of its share."""
    height, width, channels = patches.shape
    made = torch.empty(size, size, channels, dtype=patches.dtype)
    for y in range(size):
        for x in range(size):
            rows = slice(y * height // size, -(-(y + 1) * height // size))
            columns = slice(x * width // size, -(-(x + 1) * width // size))
            made[y, x] = patches[rows, columns].mean((0, 1))
    return made


def weights(length, size):
    """Bilinear interpolation along a side, antialiased: a triangle as wide as the scale, at each cell's center."""
    scale = max(1.0, length / size)
    centers = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size
    places = torch.arange(length, dtype=torch.float64) + 0.5
    made = (1 - (places[None] - centers[:, None]).abs() / scale).clamp(min=0)
    return made / made.sum(1, keepdim=True)


def interpolated(patches, size):
    rows, columns = weights(patches.shape[0], size), weights(patches.shape[1], size)
    return torch.einsum("yh,xw,hwc->yxc", rows, columns, patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("resize", "reference"), [("pool", pooled), ("interpolate", interpolated)])
def test_patches_on_another_grid(resize, reference, dtype):
    """Larger and smaller grids than the projector's, in every dtype: float32 values, rounded once."""
    base, _ = qwen()
    model, _ = attach(base, None, resize=resize, **FIELDS)
    for size in ((5, 31), (40, 24), (24, 24), (3, 3)):
        patches = torch.randn(*size, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = fitted(patches, attachment_of(model).to_tokens.grid_size, resize)
        assert found.shape == (24, 24, 24)
        assert found.dtype == dtype
        expected = reference(patches.double(), 24)
        assert_close(found, expected, FLOAT32 if dtype == torch.float32 else rounding(dtype, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_model_in_16_bits_whose_patches_are_interpolated(dtype):
    base, plain = qwen()
    model, processor = attach(base.to(dtype), plain, resize="interpolate", **FIELDS)
    text = ["<|vision_start|><|image_pad|><|vision_end|>"]
    assert model(**processor(images=pictures(1, (48, 32)), text=text, return_tensors="pt")).logits.isfinite().all()
