"""The suites at tiny size: every row runs, says what it should, and compares what it claims to compare."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from spatial_tokens import DetailFeatureIntegrator, SpatialFeatureExtractor, SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.bench import measure
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.options import factorized as with_factors
from spatial_tokens.bench.reference_conv import ConvDetail, ConvExtractor
from spatial_tokens.bench.runner import run_comparison
from spatial_tokens.bench.suites import SUITES, factorized, kernels, limits, llm, projectors, scaling
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.ops.window_linear import gemm
from tests.bench.tiny import COLLECT, CPU, LLAVA, MODELS, TINY, options, shrink
from tests.tolerances import assert_close

TIMED = {"ms", "p20_ms", "p80_ms", "rounds"}
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def rows_of(comparisons, peak=1e9):
    return [row for comparison in comparisons for row in run_comparison(comparison, CPU, peak)]


def failures(rows):
    return [(row.subject, row.implementation, dict(row.setting), row.failure) for row in rows if row.failure]


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_every_suite_runs(suite):
    if suite == "llm":
        pytest.importorskip("transformers")
    if suite == "projectors":
        pytest.importorskip("transformers")
        pytest.importorskip("timm")
    comparisons = list(SUITES[suite](options("float32", "bfloat16")))
    rows = rows_of(comparisons)
    assert failures(rows) == []
    assert all(row.suite == suite and row.values.keys() >= TIMED for row in rows)
    assert all(row.values["p20_ms"] <= row.values["ms"] <= row.values["p80_ms"] for row in rows)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values.values())


def test_an_integrator_needs_a_config_that_has_one():
    config = replace(TINY, detail_kernel_size=None, detail_stride=None)
    with pytest.raises(SpatialTokensError, match="detail_kernel_size is None"):
        kernels._integrator(config, CPU, torch.float32)


def test_limits_count_what_is_moved_and_done(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: (work(), 0.5)[1])
    rows = {row.implementation: row.values for row in rows_of(SUITES["limits"](options()))}
    assert rows["read"]["gb_per_s"] == pytest.approx(2**16 / 0.5 / 1e9)
    assert rows["copy"]["gb_per_s"] == pytest.approx(2 * 2**16 / 0.5 / 1e9)
    assert rows["torch.mm"]["tflop_per_s"] == pytest.approx(2 * 32**3 / 0.5 / 1e12)


def test_limits_measure_each_dtype():
    products = [
        comparison for comparison in limits.comparisons(options("float32", "bfloat16")) if comparison.subject == "matrix product"
    ]
    assert [comparison.setting for comparison in products] == [{"width": 32, "dtype": name} for name in ("float32", "bfloat16")]


# What the authors wrote. In float64, where no library's choice of algorithm is in the way: oneDNN's weight gradient is wrong in
# float32 for some shapes (torch 2.15, AVX-512: 64 to 32 channels, kernel 16, batch 1).


def compare(ours, theirs, features):
    given = ours(features), theirs(features)
    grad = torch.randn(given[0].shape, dtype=features.dtype)
    grads = [torch.autograd.grad(tokens, [features, *module.parameters()], grad)
             for tokens, module in zip(given, (ours, theirs), strict=True)]  # fmt: skip
    assert_close(given[1], given[0], 1e-12)
    assert len(grads[0]) == len(grads[1])
    for mine, other in zip(*grads, strict=True):
        assert_close(kernels._as_linear(other), mine, 1e-12)


@LAYOUTS
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize(("grid", "sizes"), [(12, (4, 8, 12)), ((8, 12), ((4, 8), (8, 12))), (7, (3, 5, 7))])
def test_the_authors_extractor_is_ours(memory_format, variant, grid, sizes):
    ours = SpatialFeatureExtractor(5, 6, grid_size=grid, kernel_sizes=sizes, variant=variant, dtype=torch.float64)
    theirs = ConvExtractor(ours, memory_format)
    assert all(kernel.is_contiguous(memory_format=memory_format) for kernel in theirs.kernels)
    patches = ours.grid_size[0] * ours.grid_size[1]
    compare(ours, theirs, torch.randn(2, patches, 5, dtype=torch.float64, requires_grad=True))


@LAYOUTS
@pytest.mark.parametrize(("grid", "size", "stride"), [(12, 8, 2), ((8, 12), (3, 5), (1, 3)), (7, 7, 1)])
def test_the_authors_detail_map_is_ours(memory_format, grid, size, stride):
    integrator = DetailFeatureIntegrator(5, 6, grid_size=grid, kernel_size=size, stride=stride, dtype=torch.float64)
    patches = integrator.grid_size[0] * integrator.grid_size[1]
    features = torch.randn(2, patches, 5, dtype=torch.float64, requires_grad=True)
    compare(kernels._Detail(integrator), ConvDetail(integrator, memory_format), features)


@LAYOUTS
@pytest.mark.parametrize("config", [TINY, replace(TINY, detail_kernel_size=None, detail_stride=None)], ids=["dfi", "bare"])
def test_the_authors_projector_is_ours(memory_format, config):
    projector = SPProjector.from_config(config, dtype=torch.float64)
    authors = kernels._AuthorsProjector(projector, memory_format)
    features = torch.randn(2, 144, 16, dtype=torch.float64)
    assert_close(authors(features), projector(features), 1e-12)
    assert sum(p.numel() for p in authors.parameters()) == config.num_parameters


# kernels


def kernel_contests(config=TINY, **fields):
    return {
        (comparison.subject, *comparison.setting.values()): comparison
        for comparison in kernels.comparisons(options(config=config, batches=(3,), **fields))
    }


def test_kernels_compare_every_operator_and_backend_with_the_authors_convolution():
    found = kernel_contests()
    subjects = ("tokens, cropping", "tokens, pooling", "detail map", "integrator", "projector")
    assert set(found) == {(subject, direction, "float32", 3) for subject in subjects for direction in kernels.PASSES}
    for (subject, direction, *_), comparison in found.items():
        names = ["naive", "gemm"]
        if subject not in ("integrator", "projector"):
            names += ["factorized"]
        if subject != "integrator":
            names += ["Conv2d (authors)"]
        if subject != "integrator" and direction == "forward":  # on a CPU
            names += ["Conv2d, channels last"]
        if (subject, direction) == ("tokens, cropping", "forward"):
            names += ["Conv2d, torch.compile"]
        assert list(comparison.candidates) == names
        assert comparison.reference == "naive"
        assert comparison.baseline == ("naive" if subject == "integrator" else "Conv2d (authors)")


def test_kernels_without_an_integrator_have_no_detail_map():
    bare = replace(TINY, detail_kernel_size=None, detail_stride=None)
    assert {subject for subject, *_ in kernel_contests(bare)} == {"tokens, cropping", "tokens, pooling", "projector"}
    assert failures(rows_of(kernel_contests(bare).values())) == []


def test_kernels_values():
    for row in rows_of(kernels.comparisons(options(batches=(2,)))):
        expected = TIMED | {"ratio"}
        if row.implementation != "naive":
            expected |= {"error"}
        if row.subject != "integrator":
            expected |= {"read_gb_per_s", "limit_ms", "share_of_limit"}
        assert row.values.keys() - {"peak_mib"} == expected
        if row.implementation in (kernels.AUTHORS, "naive") and row.subject == "integrator":
            assert row.values["ratio"] == 1


@pytest.mark.parametrize("direction", kernels.PASSES)
def test_forward_makes_no_graph_and_backward_all_gradients(direction):
    found = kernel_contests()["tokens, cropping", direction, "float32", 3]
    candidate = found.candidates["gemm"]()
    outcome = candidate.run()
    if direction == "forward":
        assert not outcome.requires_grad
        assert outcome.shape == (3, 3, 16)
        return
    assert [tuple(t.shape) for t in outcome] == [(3, 3, 16), (3, 144, 16), *[(16, side * side * 16) for side in (4, 8, 12)]]
    assert not any(tensor.requires_grad for tensor in outcome)


@pytest.mark.parametrize("direction", kernels.PASSES)
@pytest.mark.parametrize("subject", ["integrator", "projector"])
def test_gradients_that_are_rounding_alone_are_not_compared(subject, direction):
    """A shift of all keys is a shift of all of a query's scores: the gradients of whatever does that alone are zero."""
    for seed in range(4):
        torch.manual_seed(seed)
        assert failures(rows_of([kernel_contests()[subject, direction, "float32", 3]])) == []


def costs(config):
    return {cost.part: cost for cost in config.costs()}


@pytest.mark.parametrize("direction", kernels.PASSES)
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_work_is_what_the_config_counts(direction, head):
    config, batch = replace(TINY, spatial_head=head), 3
    found, parts = kernel_contests(config), costs(config)
    features = 4 * batch * 144 * 16
    factor = 1 if direction == "forward" else 3
    for subject, operations, parameters in [
        ("tokens, cropping", parts["extractor"].multiply_adds, parts["extractor"].parameters),
        ("tokens, pooling", parts["extractor"].multiply_adds, parts["extractor"].parameters),
        ("detail map", parts["integrator detail map"].multiply_adds, parts["integrator detail map"].parameters),
        ("projector", sum(part.multiply_adds for part in parts.values()), config.num_parameters),
    ]:
        comparison = found[subject, direction, "float32", batch]
        assert comparison.num_flops == factor * 2 * batch * operations
        assert comparison.num_bytes == factor * (4 * parameters + features)
        weights = sum(weight.numel() for weight in comparison.weights())
        assert parameters * 0.95 < weights <= parameters
        assert comparison.memory >= 4 * weights + features
        assert not any(weight.requires_grad for weight in comparison.weights())


@pytest.mark.parametrize("direction", kernels.PASSES)
def test_the_work_of_factorized_kernels_is_their_own(direction):
    batch, small = 3, costs(options().factorized)
    for subject, part in [("tokens, cropping", "extractor"), ("detail map", "integrator detail map")]:
        num_bytes, num_flops = kernel_contests()[subject, direction, "float32", batch].candidates["factorized"]().work
        features, parameters, forward = 4 * batch * 144 * 16, 4 * small[part].parameters, 2 * batch * small[part].multiply_adds
        assert num_bytes == (1 if direction == "forward" else 3) * (parameters + features)
        if direction == "forward":
            assert num_flops == forward
        else:  # the maps are constant: what reads them has one gradient, not two
            assert 2 * forward < num_flops < 3 * forward


@pytest.mark.parametrize("direction", kernels.PASSES)
@pytest.mark.parametrize("subject", ["tokens, cropping", "tokens, pooling", "detail map"])
def test_dense_and_factorized_kernels_are_the_same(subject, direction):
    """Their tokens and the gradients of the features are compared before they are timed, in any config."""
    config = replace(TINY, kernel_sizes=(2, 12), vision_hidden_size=40)  # fewer patches a side than cosines; a rank that is given
    rows = rows_of([kernel_contests(config)[subject, direction, "float32", 3]])
    assert failures(rows) == []
    assert {row.implementation: row.values["error"] < 1e-5 for row in rows if row.implementation != "naive"}["factorized"]


def test_factorized_kernels_that_are_wrong_are_a_row_that_says_so(monkeypatch):
    sound = FactorizedKernels.forward
    monkeypatch.setattr(FactorizedKernels, "forward", lambda *arguments: 1.01 * sound(*arguments))
    for direction in kernels.PASSES:
        rows = rows_of([kernel_contests()["tokens, cropping", direction, "float32", 3]])
        assert {row.implementation for row in rows if row.failure} == {"factorized"}


def test_work_in_half_precision_is_half_the_bytes():
    full, half = (kernel_contests()["projector", "forward", "float32", 3],
                  {c.subject: c for c in kernels.comparisons(options("bfloat16", batches=(3,)))
                   if c.setting["pass"] == "forward"}["projector"])  # fmt: skip
    assert full.num_bytes == 2 * half.num_bytes
    assert full.num_flops == half.num_flops
    assert half.tolerance > full.tolerance


def test_flops_of_a_linear_layer():
    layer = nn.Linear(5, 7, device="meta")
    assert kernels.flops_of(layer, torch.empty(3, 5, device="meta")) == 2 * 3 * 5 * 7


def test_a_broken_backend_is_a_row_that_says_so(monkeypatch):
    sound = gemm.window_linear
    monkeypatch.setattr(gemm, "window_linear", lambda *arguments: 1.01 * sound(*arguments))
    rows = rows_of(kernels.comparisons(options(batches=(1,))))
    broken = [row for row in rows if row.subject != "integrator" and row.implementation == "gemm"]
    assert len(broken) == 8
    assert all(row.failure.startswith("wrong: off by ") and row.values == {} for row in broken)
    forward = [row for row in rows if row.implementation != "gemm" and row.setting["pass"] == "forward"]
    assert failures(forward) == []


def test_a_broken_gradient_is_a_row_that_says_so(monkeypatch):
    sound = gemm.weight_grad
    monkeypatch.setattr(gemm, "weight_grad", lambda *arguments: [grad * 1.01 for grad in sound(*arguments)])
    rows = rows_of([kernel_contests()["tokens, cropping", kernels.PASSES[1], "float32", 3]])
    assert {row.implementation for row in rows if row.failure} == {"gemm"}


def test_a_kernel_that_gives_nan_is_a_row_that_says_so(monkeypatch):
    sound = gemm.weight_grad
    monkeypatch.setattr(gemm, "weight_grad", lambda *arguments: [grad * float("nan") for grad in sound(*arguments)])
    rows = rows_of([kernel_contests()["tokens, cropping", kernels.PASSES[1], "float32", 3]])
    assert {row.implementation for row in rows if row.failure} == {"gemm"}


@pytest.mark.parametrize("suite", ["kernels", "factorized", "projectors", "scaling"])
def test_what_does_not_fit_is_a_row_and_is_not_tried(monkeypatch, suite):
    """The second half is what the user meets: the memory that is lacking is lacking for whatever is made first."""
    monkeypatch.setattr("spatial_tokens.bench.runner.free_memory", lambda device: 0)
    rows = [row for row in rows_of(SUITES[suite](options())) if row.subject != "integrator"]  # which is small at any size
    assert all(row.failure and row.failure.startswith("needs about ") for row in rows)

    linear, features = nn.Linear.__init__, Options.features

    def out(sound, device):
        if torch.device(device or "cpu").type != "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return sound()

    monkeypatch.setattr(
        nn.Linear, "__init__", lambda self, *args, **names: out(lambda: linear(self, *args, **names), names.get("device"))
    )
    monkeypatch.setattr(Options, "features", lambda self, *args: out(lambda: features(self, *args), self.device))
    assert rows_of(SUITES[suite](options()))


@pytest.mark.parametrize("suite", ["kernels", "factorized", "projectors", "scaling"])
def test_one_contest_is_gone_before_the_next_is_made(monkeypatch, suite):
    """At the paper's size each holds gigabytes: whoever lets go of a comparison must have let go of its tensors."""
    made, alive, features = [], [], Options.features

    def recorded(*arguments):
        COLLECT()
        tensor = features(*arguments)
        if tensor.device.type != "meta":
            alive.append([reference for reference in made if reference() is not None])
            made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Options, "features", recorded)
    comparisons = SUITES[suite](options(batches=(1,)))
    for _ in range(3):
        comparison = next(comparisons)
        assert not any(reference() for reference in made)
        run_comparison(comparison, CPU, None)
        del comparison
    if suite == "kernels":  # its features are the comparison's, not an candidate's
        assert alive == [[]] * 3


# factorized


def factorized_contests(*dtypes, config=TINY):
    found = factorized.comparisons(options(*dtypes, batches=(3,), config=config))
    return {(comparison.subject, *comparison.setting.values()): comparison for comparison in found}


def test_factorized_measures_what_the_targets_name():
    timed, names = ("tokens, cropping", "detail map"), ["dense", "factorized", "factorized, in cache"]
    found = factorized_contests()
    assert set(found) == {*((s, d, "float32", 3) for s in timed for d in kernels.PASSES), ("training step", "float32", 3)}
    for (subject, direction, *_), comparison in found.items():
        expected = names[:2] if subject == "training step" else [*names, "Conv2d (authors)"] if direction == "forward" else names
        assert list(comparison.candidates) == expected
        assert comparison.baseline == "dense"
        assert comparison.suite == "factorized"
    candidates = found["tokens, cropping", "forward", "float32", 3].candidates
    assert [name for name, build in candidates.items() if build().in_cache] == ["factorized, in cache"]
    bare = factorized_contests(config=replace(TINY, detail_kernel_size=None, detail_stride=None))
    assert {subject for subject, *_ in bare} == {"tokens, cropping", "training step"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_trains_and_tells_what_it_holds(dtype):
    comparison = factorized_contests(dtype)["training step", dtype, 3]
    rows = {row.implementation: row.values for row in rows_of([comparison])}
    for name, config in (("dense", TINY), ("factorized", options().factorized)):
        assert rows[name]["parameters"] == config.num_parameters
        weights_and_moments = 3 * config.num_parameters * (4 if dtype == "float32" else 2)
        assert 0 <= 2**20 * rows[name]["held_mib"] - weights_and_moments < 500  # and a step number for each parameter
    assert rows["factorized"]["parameters"] < rows["dense"]["parameters"] / 2
    candidate = comparison.candidates["factorized"]()
    first, second = candidate.run(), candidate.run()
    assert not torch.equal(first, second)
    assert second.isfinite().all()


# projectors


def test_projectors_values(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: (work(), 0.5)[1])
    rows = rows_of(projectors.comparisons(options(batches=(2,))))
    assert failures(rows) == []
    by_name = {row.implementation: row.values for row in rows}
    assert next(iter(by_name)) == "LLaVA MLP"
    assert {name: values["tokens"] for name, values in by_name.items()} == {
        "LLaVA MLP": 144, "SP cropping": 147, "SP pooling": 147, "SP cropping + DFI": 147, "SP pooling + DFI": 147,
        **{f"SP {name}, factorized": 147 for name in ("cropping", "pooling", "cropping + DFI", "pooling + DFI")},
        "SP, 1 token": 145, "SP, 6 tokens": 150, "SP, transformer blocks": 147,
        "DeCo": 4, "C-Abstractor": 4, "Perceiver resampler": 3, "Q-Former": 3,
    }  # fmt: skip
    for values in by_name.values():
        assert values["tokens_per_s"] == 2 * values["tokens"] / 0.5
        assert values["ratio"] == 1
        assert values.keys() - {"peak_mib"} == TIMED | {"tokens", "parameters", "gflop_per_image", "tokens_per_s", "ratio"}
    for variant in ("cropping", "pooling"):
        for name, config in [
            (f"SP {variant} + DFI", TINY),
            (f"SP {variant}", replace(TINY, detail_kernel_size=None, detail_stride=None)),
        ]:
            assert by_name[name]["parameters"] == config.num_parameters
            assert by_name[name]["gflop_per_image"] == pytest.approx(2e-9 * sum(c.multiply_adds for c in config.costs()))
            small = by_name[f"{name}, factorized"]
            assert small["parameters"] == with_factors(config).num_parameters < config.num_parameters
            assert small["gflop_per_image"] == pytest.approx(2e-9 * sum(c.multiply_adds for c in with_factors(config).costs()))
    mlp = 16 * 24 + 24 * 24
    assert by_name["LLaVA MLP"]["parameters"] == mlp + 2 * 24
    assert by_name["LLaVA MLP"]["gflop_per_image"] == pytest.approx(2e-9 * 144 * mlp)


def test_projectors_at_the_papers_size_are_the_papers(monkeypatch):
    config = SPProjectorConfig.from_preset("llava-sp-cropping")
    names = list(projectors.builders(config))
    assert [name for name in names if name.startswith("SP, ") and "token" in name] == [
        "SP, 1 token",
        "SP, 3 tokens",
        "SP, 12 tokens",
    ]
    meta = torch.device("meta")
    sizes = {
        name: sum(p.numel() for p in projectors.builders(config)[name](meta, torch.float32).parameters())
        for name in names if name.startswith("SP") and "factorized" not in name
    }  # fmt: skip
    for name, preset in [
        ("SP cropping + DFI", "llava-sp-cropping"), ("SP, 1 token", "llava-sp-1-token"),
        ("SP, 3 tokens", "llava-sp-3-tokens"), ("SP, 12 tokens", "llava-sp-12-tokens"),
    ]:  # fmt: skip
        assert sizes[name] == SPProjectorConfig.from_preset(preset, spatial_head=config.spatial_head).num_parameters


def test_a_projector_that_differs_from_its_specification_is_not_timed(monkeypatch):
    sound = gemm.window_linear
    monkeypatch.setattr(gemm, "window_linear", lambda *arguments: sound(*arguments) * float("nan"))
    comparison = next(comparison for comparison in projectors.comparisons(options()) if comparison.subject == "SP cropping")
    rows = {row.implementation: row for row in run_comparison(comparison, CPU, None)}
    assert "wrong: off by nan" in rows["SP cropping"].failure
    assert rows["LLaVA MLP"].failure is None


def test_a_missing_library_is_its_projectors_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    found = [comparison for comparison in projectors.comparisons(options()) if comparison.subject in ("C-Abstractor", "DeCo")]
    rows = rows_of(found)
    assert [(row.implementation, "spatial-tokens[timm]" in row.failure) for row in rows if row.failure] == [("C-Abstractor", True)]


# scaling


def test_scaling_varies_only_what_it_says(monkeypatch):
    seen = []
    monkeypatch.setattr(scaling, "_candidate", lambda options, config, batch, dtype: seen.append((config, batch, dtype)) or 1 / 0)
    for sizes in ({"BATCHES": (1, 512)}, {"GRIDS": (16, 24, 64)}, {"CHANNELS": (768, 4096)}, {"NUM_TOKENS": (1, 2, 3, 6, 12, 24)}):
        monkeypatch.setattr(scaling, *next(iter(sizes.items())))
    monkeypatch.setattr("spatial_tokens.bench.runner.free_memory", lambda device: None)
    paper = SPProjectorConfig.from_preset("llava-sp-cropping")
    bare = replace(paper, detail_kernel_size=None, detail_stride=None)
    comparisons = list(scaling.comparisons(options(config=paper)))
    rows_of(comparisons)
    told = [(comparison.subject, comparison.setting[comparison.subject]) for comparison in comparisons[::2]]
    assert [next(iter(comparison.candidates)) for comparison in comparisons] == ["SP", "SP, factorized"] * len(told)
    assert told == [
        *(("batch", n) for n in (1, 512)), *(("grid", n) for n in (16, 24, 64)),
        *(("channels", n) for n in (768, 4096)), *(("tokens", n) for n in (1, 2, 3, 6, 12, 24)),
    ]  # fmt: skip
    assert [(with_factors(config), batch, dtype) for config, batch, dtype in seen[::2]] == seen[1::2]
    for (subject, value), (config, batch, dtype) in zip(told, seen[::2], strict=True):
        assert dtype == torch.float32
        assert batch == (value if subject == "batch" else 1)
        if subject == "batch":
            assert config == bare
        elif subject == "channels":
            assert config == replace(bare, vision_hidden_size=value)
        elif subject == "tokens":
            assert config.num_spatial_tokens == value
            assert config == replace(bare, kernel_sizes=config.kernel_sizes, variant="pooling")
        else:
            assert config == replace(bare, grid_size=(value, value), kernel_sizes=config.kernel_sizes)
            assert config.num_spatial_tokens == 6, f"grid {value} has another number of tokens too: {config.kernel_sizes}"


def test_scaling_takes_the_batches_it_is_given():
    comparisons = list(scaling.comparisons(options("float32", "bfloat16", batches=(3,))))
    taken = [(c.setting["dtype"], c.setting["batch"]) for c in comparisons if c.subject == "batch" and "SP" in c.candidates]
    assert taken == [("float32", 3), ("bfloat16", 3)]


@pytest.mark.parametrize("side", [7, 12, 16, 24, 27])
def test_scaling_sizes_are_as_many_as_asked_and_grow(side):
    config = replace(TINY, grid_size=(side, side), kernel_sizes=(side,), detail_kernel_size=None, detail_stride=None)
    for count in range(1, side + 1):
        sizes = scaling._sizes(config, count)
        assert len(set(sizes)) == count
        assert replace(config, kernel_sizes=sizes, variant="pooling").kernel_sizes[-1] == side
    assert scaling._sizes(config, side + 1) == ()


def test_scaling_shows_a_size_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(scaling, "CHANNELS", (8, 2**30))
    monkeypatch.setattr("spatial_tokens.bench.runner.free_memory", lambda device: 2**32)
    comparisons = scaling.comparisons(options())
    rows = {(row.subject, row.setting[row.subject], row.implementation): row for row in rows_of(comparisons)}
    assert rows["channels", 2**30, "SP"].failure.startswith("needs about ")
    assert rows["channels", 8, "SP"].failure is rows["channels", 8, "SP, factorized"].failure is None


def test_scaling_measures_factorized_kernels_where_dense_ones_do_not_fit(monkeypatch):
    monkeypatch.setattr(scaling, "GRIDS", (24,))
    monkeypatch.setattr("spatial_tokens.bench.runner.free_memory", lambda device: 2**28 + 2**20)
    rows = {row.implementation: row for row in rows_of(scaling.comparisons(options())) if row.subject == "grid"}
    assert rows["SP"].failure.startswith("needs about ")
    assert rows["SP, factorized"].failure is None


# llm


@pytest.fixture
def transformers():
    pytest.importorskip("transformers")


@pytest.mark.parametrize(("free_gib", "name"), [(80, "7B"), (16, "1.3B (7B does not fit)"), (1, LLAVA.name), (None, LLAVA.name)])
def test_llm_takes_the_largest_model_that_fits_and_says_which(monkeypatch, free_gib, name):
    monkeypatch.setattr(llm, "MODELS", (*MODELS[:2], LLAVA))
    monkeypatch.setattr(llm, "free_memory", lambda device: None if free_gib is None else free_gib * 2**30)
    paper = SPProjectorConfig.from_preset("llava-sp-cropping")
    asked = Options(torch.device("cuda"), ("bfloat16",), (), paper)
    assert llm.fitting(asked, "bfloat16").name == name


def test_llm_labels_what_is_scaled_down():
    shown = [llm.comparison(options(), model, "float32", 1).subject for model in MODELS]
    assert shown == ["LLaVA-1.5 7B", "LLaVA-1.5 1.3B (7B does not fit)", "LLaVA-1.5 0.1B (7B does not fit)"]


def test_llm_model_sizes():
    assert MODELS[0].num_parameters == pytest.approx(6.74e9, rel=0.01)
    assert MODELS[1].num_parameters == pytest.approx(1.3e9, rel=0.1)


def test_llm_model_is_the_size_it_says(transformers):
    made = llm._llava(LLAVA, replace(TINY, text_hidden_size=LLAVA.hidden_size), CPU, torch.bfloat16)
    norms = (2 * LLAVA.num_layers + 1) * LLAVA.hidden_size
    language = [*made.model.language_model.parameters(), *made.lm_head.parameters()]
    assert sum(p.numel() for p in language) == LLAVA.num_parameters + norms
    assert len(made.model.vision_tower.encoder.layers) == LLAVA.num_vision_layers
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_llm_ratio_is_tokens_a_second_with_over_without(transformers, monkeypatch):
    taken = iter([0.5, 0.8, 1.0])
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: next(taken))
    rows = {row.implementation: row for row in rows_of(llm.comparisons(options("bfloat16", batches=(2,))))}
    assert list(rows) == ["LLaVA-1.5", "SP cropping + DFI", "SP pooling + DFI"]
    assert failures(rows.values()) == []
    rates = {name: row.values["tokens_per_s"] for name, row in rows.items()}
    assert rates["LLaVA-1.5"] == pytest.approx(2 * LLAVA.answer / 0.5)
    for name, row in rows.items():
        assert row.values["ratio"] == pytest.approx(rates[name] / rates["LLaVA-1.5"])
        assert row.setting == {"dtype": "bfloat16", "batch": 2, "prompt": 3, "answer": 2}


def test_llm_image_tokens(transformers):
    paper = replace(SPProjectorConfig.from_preset("llava-sp-cropping"), vision_hidden_size=8, spatial_hidden_size=2)
    rows = rows_of(llm.comparisons(options("float32", config=paper)))
    assert failures(rows) == []
    assert [row.values["image_tokens"] for row in rows] == [576, 582, 582]


def test_llm_has_one_model_for_all_three(transformers, monkeypatch):
    made = []
    build = llm._llava
    monkeypatch.setattr(llm, "_llava", lambda *arguments: (made.append(1), build(*arguments))[1])
    rows_of(llm.comparisons(options()))
    assert made == [1]


def test_llm_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert all("spatial-tokens[hf]" in row.failure for row in rows_of(llm.comparisons(options())))
