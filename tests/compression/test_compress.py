import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from spatial_tokens import FactorizedFeatureExtractor, SpatialFeatureExtractor, SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.compression import compress, fit
from spatial_tokens.compression.plot import plot_report
from spatial_tokens.modules import LinearHead, MLPHead
from spatial_tokens.visualize import save
from tests.tolerances import FLOAT64, assert_close

C, S, GRID = 12, 10, (6, 8)
CONFIG = SPProjectorConfig(
    vision_hidden_size=C, text_hidden_size=14, grid_size=GRID, kernel_sizes=((2, 4), (4, 6), (6, 8)), spatial_hidden_size=S,
    detail_kernel_size=(3, 4),
)  # fmt: skip
VARIANTS = pytest.mark.parametrize("variant", ["cropping", "pooling"])
BASES = pytest.mark.parametrize("basis", ["cosine", "learned"])


def dense(dtype=torch.float64, **fields):
    return SPProjector.from_config(replace(CONFIG, **fields), dtype=dtype)


def correlated(pictures, channels=C, grid=GRID, dtype=torch.float64):
    """Features as encoders give them: smooth over the grid, a few directions strong, and with a mean."""
    coarse = torch.randn(pictures, channels, 3, 3, dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=grid, mode="bilinear").flatten(2).mT
    mix = torch.randn(channels, channels, dtype=torch.float64) * torch.logspace(0, -1.5, channels, dtype=torch.float64)[:, None]
    noise = torch.randn(pictures, grid[0] * grid[1], channels, dtype=torch.float64)
    return (smooth @ mix + 0.05 * noise + torch.randn(channels, dtype=torch.float64)).to(dtype)


def mean_of(report, name):
    return sum(getattr(token, name) for token in report.tokens) / len(report.tokens)


@BASES
@VARIANTS
@pytest.mark.parametrize("detail", [(3, 4), None])
def test_kernels_that_are_low_rank_are_found(variant, basis, detail):
    made = SPProjector.from_config(
        replace(CONFIG, variant=variant, detail_kernel_size=detail, detail_stride=None, rank=4, frequencies=2, spatial_basis=basis),
        dtype=torch.float64,
    )
    for name, values in made.named_parameters():
        if ".maps." in name:
            nn.init.normal_(values)
    whole = made.to_dense()
    found, report = compress(whole, correlated(60), rank=4, frequencies=2, spatial_basis=basis)
    assert found.config == made.config
    fresh = torch.randn(3, 48, C, dtype=torch.float64)
    assert_close(found(fresh), whole(fresh), FLOAT64)
    assert max(token.unexplained for token in report.tokens) < FLOAT64


@settings(max_examples=20)
@given(
    rank=st.integers(1, 5),
    channels=st.integers(5, 8),
    width=st.integers(5, 9),
    pictures=st.integers(10, 40),
    seed=st.integers(0, 99),
)
def test_one_patch_is_compressed_as_well_as_can_be(rank, channels, width, pictures, seed):
    """On one patch the best rank is known: what the least eigenvalues of the tokens' second moments say is missed."""
    torch.manual_seed(seed)
    extractor = SpatialFeatureExtractor(channels, width, grid_size=1, kernel_sizes=[1], dtype=torch.float64)
    projector = SPProjector(extractor, None, LinearHead(width, 4, dtype=torch.float64), None)
    features = torch.randn(pictures, 1, channels, dtype=torch.float64) @ torch.randn(channels, channels, dtype=torch.float64) + 1
    small, _ = compress(projector, features, rank=rank)
    tokens = extractor(features)[:, 0].detach().numpy()
    missed = (small.extractor(features)[:, 0].detach().numpy() - tokens) ** 2
    least = np.linalg.svd(tokens, compute_uv=False)[rank:] ** 2
    assert missed.sum() == pytest.approx(least.sum(), rel=1e-6, abs=1e-12 * (tokens**2).sum())


def test_features_are_worth_knowing():
    projector, features = dense(), correlated(400)
    _, report = compress(projector, features, rank=4, frequencies=2)
    assert mean_of(report, "unexplained") <= mean_of(report, "whitened") < mean_of(report, "plain_hosvd") / 2
    white = torch.randn(400, 48, C, dtype=torch.float64)
    _, report = compress(projector, white, rank=4, frequencies=2)
    assert mean_of(report, "unexplained") > 0.9 * mean_of(report, "plain_hosvd")


def test_the_report_tells_what_a_fit_to_the_others_misses():
    """Each fifth picture is held out: what is missed there is measured by hand, with the projector of the others."""
    projector, features = dense(detail_kernel_size=None, detail_stride=None), correlated(4000)
    _, report = compress(projector, features, rank=4, frequencies=2)
    held_out = torch.arange(4000) % 5 == 4
    small, _ = compress(projector, features[~held_out], rank=4, frequencies=2)
    tokens, missed = projector.extractor(features), small.extractor(features[held_out]) - projector.extractor(features[held_out])
    variance = tokens.var(0, unbiased=False).sum(-1)
    expected = missed.square().sum(-1).mean(0) / variance
    assert (report.pictures, report.held_out) == (4000, 800)
    given = torch.tensor([token.unexplained for token in report.tokens], dtype=torch.float64)
    torch.testing.assert_close(given, expected.detach(), rtol=0.02, atol=0)  # its channels were chosen with all pictures


def test_plain_hosvd_is_numpys():
    projector = dense(kernel_sizes=((4, 6),), detail_kernel_size=None, detail_stride=None)
    features = correlated(50)
    _, report = compress(projector, features, rank=3, frequencies=2, spatial_basis="learned")
    weight = projector.extractor.kernels[0].weight.detach().numpy().reshape(S, 24, C)
    maps = np.linalg.svd(weight.transpose(1, 0, 2).reshape(24, -1))[0][:, :4]
    contracted = np.einsum("spc,pm->smc", weight, maps)
    channels = np.linalg.svd(contracted.transpose(2, 0, 1).reshape(C, -1))[0][:, :3]
    small = np.einsum("smc,cr,dr,pm->spd", contracted, channels, channels, maps)
    window = features.unflatten(1, GRID)[:, 1:5, 1:7].flatten(1).numpy()
    tokens, missed = window @ weight.reshape(S, -1).T, window[4::5] @ (small - weight).reshape(S, -1).T
    expected = (missed**2).sum(1).mean() / tokens.var(0).sum()
    assert report.tokens[0].plain_hosvd == pytest.approx(expected, rel=1e-9)


@BASES
def test_points_of_the_curve_are_what_their_rank_gives(basis):
    projector, features = dense(), correlated(80)
    _, report = compress(projector, features, rank=8, spatial_basis=basis)
    assert [point.rank for point in report.curve] == [1, 2, 4, 8]
    for point in report.curve:
        small, alone = compress(projector, features, rank=point.rank, spatial_basis=basis)
        assert alone.parameters == point.parameters == sum(cost_of(small))
        assert alone.unexplained == pytest.approx(point.unexplained, rel=1e-3)
        assert mean_of(alone, "plain_hosvd") == pytest.approx(point.plain_hosvd, rel=1e-6)


def cost_of(projector):
    costs = {cost.part: cost.parameters for cost in projector.config.costs()}
    return costs["extractor"], costs["integrator detail map"]


def test_parameters_are_kept_to_and_used():
    projector, features = dense(), correlated(80)
    small, report = compress(projector, features, parameters=900)
    assert sum(cost_of(small)) == report.parameters <= 900
    assert report.unexplained == min(point.unexplained for point in report.curve)
    one_more = replace(small.config, rank=small.config.rank + 1)
    assert sum(cost_of(SPProjector.from_config(one_more, device="meta"))) > 900
    fewer = compress(projector, features, parameters=300)[1]
    assert fewer.parameters <= 300
    assert fewer.unexplained > report.unexplained


def test_error_is_kept_to_with_the_fewest_parameters():
    projector, features = dense(), correlated(80)
    _, report = compress(projector, features, error=0.2)
    assert report.unexplained <= 0.2
    assert report.parameters == min(point.parameters for point in report.curve if point.unexplained <= 0.2)
    with pytest.raises(
        SpatialTokensError, match=r"of rank 12 or less miss 0.00% of the tokens' variance or less: .*% is the least"
    ):
        compress(projector, features, error=1e-9)


def test_features_come_in_many_forms(tmp_path):
    projector, features = dense(), correlated(50)
    expected, report = compress(projector, features, rank=4)
    save_file({"features": features, "labels": torch.zeros(50)}, tmp_path / "features.safetensors")
    save_file({"any name": features}, tmp_path / "one.safetensors")
    told = []
    batches = [features[:7], features[7:8], features[8:]]
    for form in (batches, tmp_path / "features.safetensors", str(tmp_path / "one.safetensors")):
        small, other = compress(projector, form, rank=4, progress=lambda *each: told.append(each))
        assert_close(small(features), expected(features), FLOAT64)
        assert other.unexplained == pytest.approx(report.unexplained, rel=1e-9)
    assert ("moments of features", 50) in told
    assert ("tokens of dense kernels", 50) in told


def test_sums_that_do_not_fit_are_made_in_several_passes(monkeypatch):
    projector, features = dense(), correlated(50)
    expected, _ = compress(projector, features, rank=4)
    monkeypatch.setattr(fit, "PRODUCT_BYTES", 1)
    told = set()
    small, _ = compress(projector, features, rank=4, progress=lambda stage, _: told.add(stage))
    assert_close(small(features), expected(features), FLOAT64)
    assert told == {"moments of features", *(f"tokens of dense kernels ({i} of 4)" for i in (1, 2, 3, 4))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dense_projectors_dtype_is_kept(dtype):
    exact, features = dense(), correlated(100)
    expected = compress(exact, features, rank=6)[1]
    small, report = compress(exact.to(dtype), features.to(dtype), rank=6)
    assert {each.dtype for each in small.parameters()} == {dtype}
    assert report.unexplained == pytest.approx(expected.unexplained, rel=0.1)
    tokens, missed = exact.extractor(features.to(dtype)), small.extractor(features.to(dtype)) - exact.extractor(features.to(dtype))
    shares = missed.double().square().sum((0, 2)) / tokens.double().var(0, unbiased=False).sum(1) / 100
    assert shares.mean().item() < 1.2 * report.unexplained + 0.01  # the kernels' own rounding


def test_what_is_not_compressed_is_copied():
    projector = dense().eval()
    projector.spatial_head.requires_grad_(False)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    small, _ = compress(projector, correlated(20), rank=2)
    assert not small.training
    assert small.train().training
    own = dict(small.named_parameters())
    for name, value in projector.named_parameters():
        if "kernel" not in name:
            assert torch.equal(own[name], value)
            assert own[name].data_ptr() != value.data_ptr()
            assert own[name].requires_grad == value.requires_grad
    assert all(own[name].requires_grad for name in own if "kernel" in name)
    assert all(torch.equal(value, before[name]) for name, value in projector.state_dict().items())


def test_a_head_of_ones_own_is_copied_too():
    head = nn.Sequential(nn.Tanh(), nn.Linear(S, 5, dtype=torch.float64))
    extractor = SpatialFeatureExtractor(C, S, grid_size=GRID, kernel_sizes=((4, 6),), dtype=torch.float64)
    small, _ = compress(SPProjector(extractor, None, head, None), correlated(20), rank=2)
    assert isinstance(small.extractor, FactorizedFeatureExtractor)
    assert small(correlated(2)).shape == (2, 1, 5)


def test_training_goes_on_after_compression():
    projector, features = dense(torch.float32), correlated(64, dtype=torch.float32)
    small, _ = compress(projector, features, rank=2, frequencies=1, spatial_basis="learned")
    with torch.no_grad():
        targets = projector(features)[:, :3]
    optimizer = torch.optim.Adam(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (small(features)[:, :3] - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(each.grad.any() for name, each in small.named_parameters() if not name.startswith("patch_head"))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_defaults():
    small, report = compress(dense(), correlated(20))
    assert (small.config.rank, small.config.frequencies) == (C, (2, 3, 3))
    assert report.spatial_basis == small.config.spatial_basis == "cosine"


def test_frequencies_are_fitted_to_small_windows():
    projector = dense(kernel_sizes=((2, 4), (4, 6)), detail_kernel_size=2, detail_stride=None)
    small, report = compress(projector, correlated(20), rank=2)
    assert small.config.frequencies == report.frequencies == (2, 3)
    assert small.integrator.frequencies == small.config.detail_frequencies == 2
    small, _ = compress(dense(), correlated(20), rank=2, frequencies=(2, 4, 5))
    assert small.integrator.frequencies == small.config.detail_frequencies == 3
    small, report = compress(dense(), correlated(20), rank=2, frequencies=(2, 3, 1))
    assert small.config.frequencies == report.frequencies == (2, 3, 1)


def test_kernels_of_zeros_are_no_nan():
    projector = dense()
    nn.init.zeros_(projector.extractor.kernels[0].weight)
    small, report = compress(projector, correlated(20), rank=2)
    assert small.extractor(correlated(2)).isfinite().all()
    assert report.tokens[0].unexplained == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures_that_are_all_the_same_are_refused(dtype):
    for picture in (torch.zeros(1, 48, C), torch.ones(1, 48, C), torch.randn(1, 48, C)):
        with pytest.raises(SpatialTokensError, match="all pictures have the same token of kernel 2x4"):
            compress(dense(dtype), picture.repeat(20, 1, 1), rank=2)


def test_features_of_any_size():
    projector, features = dense(torch.float32), correlated(30, dtype=torch.float32)
    expected, report = compress(projector, features, rank=4)
    for exponent in (66, -66):  # squares of float32 beyond its range
        small, other = compress(projector, features * 2.0**exponent, rank=4)
        assert other.unexplained == pytest.approx(report.unexplained, rel=1e-6)
        assert_close(small(features), expected(features))
    with pytest.raises(SpatialTokensError, match="look for values that are much too large"):
        compress(projector, [features, features * 1e36], rank=4)


def test_the_report_is_json_a_table_and_a_plot(tmp_path):
    _, report = compress(dense(), correlated(30), rank=4)
    values = json.loads(report.to_json())
    assert values["tokens"][3]["token"] == "detail map"
    assert values["curve"][-1]["parameters"] == values["parameters"] == report.parameters
    assert values["dense_parameters"] == C * S * (8 + 24 + 48 + 12)
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[3:]] == ["kernel 2x4", "kernel 4x6", "kernel 6x8", "detail map"]
    save(plot_report(report), tmp_path / "plot.png")
    save(plot_report(replace(report, unexplained=0.0, curve=(replace(report.curve[0], unexplained=0.0),))), tmp_path / "exact.png")
    with pytest.raises(ValueError, match="JSON"):
        replace(report, unexplained=float("inf")).to_json()
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


class Once:
    """Batches that grow each time."""

    def __init__(self):
        self.times = 0

    def __iter__(self):
        self.times += 1
        yield correlated(10 * self.times)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (iter([correlated(10)]), "features are read several times, which a list_iterator cannot be; give a list or a DataLoader"),
        (7, r"features must be a tensor \(n, N, C\), a safetensors file or batches of features, got a int"),
        (correlated(10)[0], r"features must have shape \(n, N, C\), got \(48, 12\)"),
        ([correlated(10), "x"], "the batch of features after 10 pictures must be a tensor"),
        (correlated(10, channels=11), "features have 11 channels, the projector reads 12"),
        (correlated(10, grid=(6, 7)), "got 42 positions for a grid of 6 x 8 = 48 patches"),
        (torch.zeros(10, 49, C), "one too many, which looks like the class token"),
        (torch.zeros(10, 48, C, device="meta"), "features are on the meta device, without values; encode the pictures first"),
        (torch.zeros(10, 48, C, dtype=torch.int64), "features must be floating point, got torch.int64"),
        (correlated(4), "features are of 4 pictures; give 5 at least, better some hundreds"),
        ([], "features are of 0 pictures"),
        (torch.full((10, 48, C), torch.nan), "the features of picture 0, counted from 0, hold NaN or infinity"),
        (
            [correlated(8), torch.cat([correlated(1), torch.full((2, 48, C), torch.inf)])],
            "the features of picture 9, counted from 0, hold NaN or infinity",
        ),
        (Once(), "features were of 10 pictures when they were read first, and are of 20 now"),
        (os.curdir, "is a folder; give a safetensors file of features"),
        ("missing.safetensors", "missing.safetensors does not exist; give a safetensors file of features"),
    ],
)
def test_features_that_do_not_fit(features, message):
    with pytest.raises(SpatialTokensError, match=message):
        compress(dense(), features, rank=2)


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "features.safetensors"
    for tensors, message in (
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "holds 2 tensors; it must hold one, or one that is named 'features'"),
        ({"a": torch.zeros(2, 3)}, r"a of .* must have shape \(n, N, C\), got \(2, 3\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(SpatialTokensError, match=message):
            compress(dense(), path, rank=2)
    path.write_bytes(b"not a file")
    with pytest.raises(SpatialTokensError, match="is not a complete safetensors file"):
        compress(dense(), path, rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 13}, "rank 13 is larger than vision_hidden_size 12"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2, "frequencies": 5}, "5 frequencies a side are more than a kernel of 2 x 4 patches has"),
        ({"rank": 2, "frequencies": (1, 5, 4)}, "5 frequencies a side are more than a kernel of 4 x 6 patches has"),
        ({"rank": 2, "frequencies": (1, 2)}, "one for each of 3 kernels"),
        ({"rank": 2, "spatial_basis": "fourier"}, "spatial_basis must be 'cosine' or 'learned', got 'fourier'"),
        ({"rank": 2, "error": 0.1}, "rank and error exclude each other; give one of them"),
        ({"error": 2}, "error must be a share of the tokens' variance, between 0 and 1, got 2"),
        ({"parameters": 5}, "5 parameters are too few: kernels of rank 1 and one map have 64"),
        ({"parameters": -1}, "parameters must be a positive integer, got -1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(SpatialTokensError, match=message):
        compress(dense(), correlated(10), **options)


def test_projectors_that_cannot_be_compressed():
    features = correlated(10)
    small, _ = compress(dense(), features, rank=2)
    with pytest.raises(SpatialTokensError, match="the projector is factorized already, with rank 2"):
        compress(small, features)
    without = SPProjector(small.extractor, None, MLPHead(S, 4, dtype=torch.float64), None)
    with pytest.raises(SpatialTokensError, match="the projector is factorized already, with rank 2"):
        compress(without, features)
    with pytest.raises(SpatialTokensError, match="projector must be an SPProjector, got a Linear"):
        compress(nn.Linear(2, 2), features)
    with pytest.raises(SpatialTokensError, match="on the meta device, without values"):
        compress(SPProjector.from_config(CONFIG, device="meta"), features)
    broken = dense()
    broken.integrator.detail_kernel.weight.data[0, 0] = torch.nan
    with pytest.raises(SpatialTokensError, match="a kernel holds NaN or infinity"):
        compress(broken, features)
    wrapped = dense()
    wrapped.extractor.kernels[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SpatialTokensError, match="a kernel is wrapped, quantized or sharded; merge or unload it first"):
        compress(wrapped, features)
    mixed = dense()
    mixed.integrator.detail_kernel.float()
    with pytest.raises(SpatialTokensError, match=r"kernels are torch.float32 on cpu and torch.float64 on cpu; move them"):
        compress(mixed, features)
