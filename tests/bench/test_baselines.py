"""The other projectors: sizes by hand, values against plain torch."""

import sys

import pytest
import torch
import torch.nn.functional as F

from spatial_tokens.bench.baselines import CAbstractor, DecoProjector, LlavaMLP, PerceiverResampler, QFormer
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from tests.tolerances import assert_close

SMALL = {
    LlavaMLP: {},
    DecoProjector: {"num_tokens": 4},
    CAbstractor: {"num_tokens": 4, "hidden_size": 16, "num_blocks": 2},
    PerceiverResampler: {"num_tokens": 3, "num_layers": 2, "num_heads": 2, "head_size": 4},
    QFormer: {"num_tokens": 3, "hidden_size": 8, "num_layers": 3, "num_heads": 2, "feedforward_size": 12},
}
PAPER_TOKENS = {LlavaMLP: 576, DecoProjector: 144, CAbstractor: 144, PerceiverResampler: 64, QFormer: 32}
ALL = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)


def build(kind, *sizes, **options):
    if kind in (CAbstractor, QFormer):
        pytest.importorskip("timm" if kind is CAbstractor else "transformers")
    return kind(*sizes, **options).eval()


def small(kind, grid_size=(5, 7), **options):
    return build(kind, 12, 20, grid_size=grid_size, **{**SMALL[kind], **options})


def linear(inputs, outputs, bias=True):
    return inputs * outputs + (outputs if bias else 0)


def llava_mlp(c, d):
    return linear(c, d) + linear(d, d)


def c_abstractor(c, d, patches, hidden):
    def block(channels):
        squeezed = channels // 4
        convolutions = linear(channels, hidden, bias=False) + 9 * hidden + linear(hidden, hidden, bias=False)  # 3 x 3 depthwise
        excitation = linear(hidden, squeezed) + linear(squeezed, hidden)
        shortcut = 0 if channels == hidden else linear(channels, hidden, bias=False) + 2 * hidden
        return convolutions + 3 * 2 * hidden + excitation + shortcut

    return patches * c + block(c) + 5 * block(hidden) + linear(hidden, d) + linear(d, d)


def perceiver_resampler(c, d):
    inner = 8 * 64
    attention = 2 * 2 * c + linear(c, inner, False) + linear(c, 2 * inner, False) + linear(inner, c, False)
    feedforward = 2 * c + linear(c, 4 * c, False) + linear(4 * c, c, False)
    return 64 * c + 6 * (attention + feedforward) + 2 * c + linear(c, d)


def q_former(c, d):
    h, norm = 768, 2 * 768
    self_attention = 4 * linear(h, h) + norm
    cross_attention = 2 * linear(h, h) + 2 * linear(c, h) + norm
    feedforward = linear(h, 3072) + linear(3072, h) + norm
    return 32 * h + 2 * c + norm + 12 * (self_attention + feedforward) + 6 * cross_attention + linear(h, d)


@pytest.mark.parametrize(("c", "d"), [(1024, 4096), (1152, 3584)])
@ALL
def test_parameters_at_the_papers_sizes(kind, c, d):
    expected = {
        LlavaMLP: llava_mlp(c, d),
        DecoProjector: llava_mlp(c, d),
        CAbstractor: c_abstractor(c, d, 576, 1024),
        PerceiverResampler: perceiver_resampler(c, d),
        QFormer: q_former(c, d),
    }[kind]
    module = build(kind, c, d, grid_size=(24, 24), device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    if kind is LlavaMLP and c == 1024:
        assert expected == 20_979_712
    tokens = module(torch.zeros(2, 576, c, device="meta"))
    assert module.num_tokens == PAPER_TOKENS[kind]
    assert tokens.shape == (2, PAPER_TOKENS[kind], d)


@pytest.mark.parametrize("grid_size", [6, (5, 7), (8, 3)])
@ALL
def test_any_grid(kind, grid_size):
    module = small(kind, grid_size)
    height, width = module.grid_size
    tokens = module(torch.randn(2, height * width, 12))
    assert tokens.shape == (2, module.num_tokens, 20)
    assert module.num_tokens == SMALL[kind].get("num_tokens", height * width)
    assert f"12, 20, grid_size={module.grid_size}, num_tokens={module.num_tokens}" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL
def test_gradients_reach_every_parameter(kind, dtype):
    module = small(kind, dtype=dtype).train()
    patches = torch.randn(2, 35, 12, dtype=dtype, requires_grad=True)
    tokens = module(patches)
    assert tokens.dtype == dtype
    assert tokens.device.type == "cpu"
    tokens.square().sum().backward()
    for name, parameter in [*module.named_parameters(), ("input", patches)]:
        assert parameter.dtype == dtype
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith(".key.bias"):  # softmax does not see it: its gradient is zero but for rounding
            assert parameter.grad.count_nonzero(), name


@ALL
def test_device(kind):
    module = small(kind, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert {p.device.type for p in small(kind).parameters()} == {"meta"}


@ALL
def test_deterministic_and_independent_of_the_batch(kind):
    module, patches = small(kind), torch.randn(3, 35, 12)
    with torch.inference_mode():
        assert_close(module(patches)[1:2], module(patches[1:2]))


def perturb(module):
    """Makes norms and biases do something."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)


def plain_mlp(head, features):
    return F.linear(F.gelu(F.linear(features, head.fc1.weight, head.fc1.bias)), head.fc2.weight, head.fc2.bias)


def test_llava_mlp_is_an_mlp_on_each_patch():
    module, patches = small(LlavaMLP), torch.randn(2, 35, 12)
    expected = torch.stack([plain_mlp(module.mlp, patches[:, i]) for i in range(35)], dim=1)
    assert_close(module(patches), expected)


def test_deco_averages_bins_in_row_order():
    module, patches = small(DecoProjector), torch.randn(2, 35, 12)
    patch_map = patches.view(2, 5, 7, 12)
    rows, columns = (slice(0, 3), slice(2, 5)), (slice(0, 4), slice(3, 7))  # 5 and 7 into two bins each, which overlap
    means = [patch_map[:, row, column].mean(dim=(1, 2)) for row in rows for column in columns]
    assert_close(module(patches), plain_mlp(module.mlp, torch.stack(means, dim=1)))


def plain_block(weights, x):
    """RegNet's block, by its layers' names in timm: 1 x 1, depthwise 3 x 3, squeeze-and-excitation, 1 x 1."""

    def convolve(name, x, **options):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], **options).movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]).movedim(-1, 1)

    def squeeze(name, x):
        return F.linear(x, weights[f"se.{name}.weight"].flatten(1), weights[f"se.{name}.bias"])

    shortcut = convolve("downsample", x) if "downsample.conv.weight" in weights else x
    x = F.silu(convolve("conv1", x))
    x = F.silu(convolve("conv2", x, padding=1, groups=x.shape[1]))
    x = x * squeeze("fc2", F.silu(squeeze("fc1", x.mean(dim=(2, 3))))).sigmoid()[:, :, None, None]
    return F.silu(convolve("conv3", x) + shortcut)


def test_c_abstractor_is_made_of_regnet_blocks_around_a_pooling():
    module, patches = small(CAbstractor).double(), torch.randn(2, 35, 12).double()
    perturb(module)
    x = (patches + module.positions.view(35, 12)).transpose(1, 2).reshape(2, 12, 5, 7)
    for block in module.before.children():
        x = plain_block(block.state_dict(), x)
    x = torch.stack([x[..., r, c].mean(dim=(2, 3)) for r in (slice(0, 3), slice(2, 5)) for c in (slice(0, 4), slice(3, 7))], dim=2)
    x = x.view(2, 16, 2, 2)
    for block in module.after.children():
        x = plain_block(block.state_dict(), x)
    x = module.fc2(F.silu(module.fc1(x.flatten(2).transpose(1, 2))))
    assert_close(module(patches), x, 1e-12)
    assert [len(list(stage.children())) for stage in (module.before, module.after)] == [2, 2]


def plain_layer_norm(norm, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_perceiver_resampler_is_attention_head_by_head():
    module, patches = small(PerceiverResampler).double(), torch.randn(2, 35, 12).double()
    perturb(module)
    latents = torch.stack([module.latents] * 2)
    for layer in module.layers:
        normed = plain_layer_norm(layer.latent_norm, latents)
        sources = torch.cat([plain_layer_norm(layer.patch_norm, patches), normed], dim=1)
        key_weight, value_weight = layer.key_value.weight[:8], layer.key_value.weight[8:]
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            queries, keys, values = (
                normed @ layer.query.weight[head].T,
                sources @ key_weight[head].T,
                sources @ value_weight[head].T,
            )
            heads.append((queries @ keys.transpose(1, 2) / 4**0.5).softmax(-1) @ values)
        latents = latents + torch.cat(heads, dim=-1) @ layer.output.weight.T
        norm, widen, _, narrow = layer.feedforward
        latents = latents + F.gelu(plain_layer_norm(norm, latents) @ widen.weight.T) @ narrow.weight.T
    expected = plain_layer_norm(module.norm, latents) @ module.projection.weight.T + module.projection.bias
    assert_close(module(patches), expected, 1e-12)


def test_q_former_looks_at_the_patches_in_every_second_layer():
    module, patches = small(QFormer), torch.randn(2, 35, 12)
    layers = module.qformer.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [True, False, True]
    with torch.inference_mode():
        tokens = module(patches)
        assert_close(module(patches.flip(1)), tokens)  # a set of patches, without order
        assert not torch.allclose(module(patches + torch.randn(12)), tokens, atol=1e-3)
        assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-3)  # the queries differ


def test_q_former_without_its_norm():
    with_norm, without = small(QFormer), small(QFormer, vision_norm=False)
    assert {name for name, _ in with_norm.named_parameters()} - {name for name, _ in without.named_parameters()} == {
        "vision_norm.weight",
        "vision_norm.bias",
    }
    without.load_state_dict(with_norm.state_dict(), strict=False)
    patches = torch.randn(2, 35, 12)
    assert_close(without(F.layer_norm(patches, (12,))), with_norm(patches))


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (torch.zeros(35, 12), r"must have shape \(B, N, C\)"),
        (torch.zeros(2, 5, 7, 12), r"must have shape \(B, N, C\)"),
        (torch.zeros(2, 35, 13), "13 channels, this module was built for 12"),
        (torch.zeros(2, 36, 12), "looks like the class token"),
        (torch.zeros(2, 12, 12), "got 12 positions for a grid of 5 x 7"),
        (torch.zeros(2, 35, 12, dtype=torch.int64), "must be floating point"),
        (torch.zeros(2, 35, 12, dtype=torch.float64), "are torch.float64, the weights torch.float32"),
        ([[1.0]], "must be a tensor"),
    ],
)
@ALL
def test_bad_input(kind, patches, message):
    module = small(kind)
    with pytest.raises(SpatialTokensError, match=message):
        module(patches)


@ALL
def test_bad_widths(kind):
    for sizes in [(0, 20), (12, -1), (12.0, 20), (True, 20)]:
        with pytest.raises(SpatialTokensError, match="hidden_size must be a positive integer"):
            kind(*sizes, grid_size=4)
    with pytest.raises(SpatialTokensError, match="grid_size must be"):
        kind(12, 20, grid_size=(4, 0))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DecoProjector, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (DecoProjector, {"num_tokens": 8}, "num_tokens must be a perfect square such as 4, got 8"),
        (CAbstractor, {"num_tokens": 8}, "num_tokens must be a perfect square such as 4, got 8"),
        (DecoProjector, {"num_tokens": 36}, r"token grid 6 x 6 is larger than grid_size \(5, 7\)"),
        (CAbstractor, {"num_tokens": 36}, r"token grid 6 x 6 is larger than grid_size \(5, 7\)"),
        (CAbstractor, {"num_blocks": 0}, "num_blocks must be"),
        (PerceiverResampler, {"num_tokens": -1}, "num_tokens must be"),
        (PerceiverResampler, {"head_size": 0}, "head_size must be"),
        (QFormer, {"num_layers": 0}, "num_layers must be"),
        (QFormer, {"num_heads": 3}, "num_heads must divide hidden_size, got 3 and 8"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(SpatialTokensError, match=message):
        kind(12, 20, grid_size=(5, 7), **{**SMALL[kind], **options})


@pytest.mark.parametrize(("kind", "library", "extra"), [(CAbstractor, "timm", "timm"), (QFormer, "transformers", "hf")])
def test_without_the_library(monkeypatch, kind, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"{library} is not installed; run: pip install 'spatial-tokens\[{extra}\]'"):
        kind(12, 20, grid_size=(5, 7), **SMALL[kind])
