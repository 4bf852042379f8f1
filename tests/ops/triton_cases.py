"""The Triton kernels, on a GPU or, with TRITON_INTERPRET=1, on a CPU; `test_triton.py` runs this file in a process of its own.

The interpreter must be on before the kernels are imported. All new memory holds NaN here, and so does what lies around the inputs:
a tail that is read or left unwritten shows.
"""

import os

import pytest
import torch

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.grid import Window
from spatial_tokens.ops import backends
from spatial_tokens.ops.pyramid import pyramid
from tests.modules.checks import assert_all_close, outputs_and_gradients
from tests.ops.checks import GEOMETRIES, Geometry, assert_equals_reference, doubles, evaluate, kernel_rounding
from tests.tolerances import FLOAT32, assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

kernel_dtypes = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", kernel_dtypes, ids=str)
several = Geometry((4, 5), [Window(0, 0, 2, 3), Window(1, 0, 1, 1), Window(0, 1, 1, 2)], (1, 2), (3, 2))
detail = Geometry((6, 7), [Window(0, 1, 2, 2)], (1, 1), (5, 5))
once = Geometry((3, 4), [Window(1, 1, 2, 3), Window(0, 1, 3, 2)])
tiny = Geometry((2, 3), [Window(0, 0, 1, 2), Window(0, 1, 1, 1)], (1, 1), (2, 2))
both_counts = pytest.mark.parametrize("geometry", [several, once], ids=["several windows", "one window"])


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA's own pooling has no such gradient
    assert torch.empty(9, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def framed(tensor, lead=0):
    """The tensor in the middle of NaN, its first `lead` dimensions and its strides' order as they are."""
    shape = [size + (2 if i >= lead else 0) for i, size in enumerate(tensor.shape)]
    place = tuple(slice(1, -1) if i >= lead else slice(None) for i in range(tensor.ndim))
    around = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    around[place] = tensor
    return around[place]


def tensors(geometry, batch, channels, hidden, dtype=torch.float32):
    """The map is read in place; weights and gradient are contiguous, and NaN lies before and after each."""
    patch_map, weights, grad = geometry.tensors(batch, channels, hidden, dtype, DEVICE)
    return framed(patch_map), [between(weight) for weight in weights], between(grad)


def between(tensor):
    nan = torch.full_like(tensor[:1], torch.nan)
    return torch.cat([nan, tensor, nan])[1:-1] if len(tensor) else tensor


def check(geometry, batch, channels, hidden, dtype=torch.float32):
    assert_equals_reference(geometry, "triton", *tensors(geometry, batch, channels, hidden, dtype))


@pytest.mark.parametrize("name", ["crops", "detail", "overlapping", "apart"])
def test_geometry(name):
    check(GEOMETRIES[name], 1, 9, 5)


FEW_AND_MANY = [(1, torch.float32), (3, torch.bfloat16), (17, torch.float16), *[(130, dtype) for dtype in kernel_dtypes]]


@pytest.mark.parametrize(("batch", "dtype"), FEW_AND_MANY)
def test_few_and_many_windows(batch, dtype):
    check(Geometry((3, 3), [Window(1, 0, 1, 2), Window(0, 1, 2, 2)]), batch, 37, 70, dtype)


SIZES = [
    (1, 1, 1, torch.float32),
    (2, 37, 131, torch.float32),
    (2, 131, 3, torch.bfloat16),
    (3, 16, 64, torch.float16),
    (3, 70, 20, torch.float32),
]


@pytest.mark.parametrize(("batch", "channels", "hidden", "dtype"), SIZES)
@pytest.mark.parametrize("geometry", [several, detail], ids=["3 x 2 windows of three", "5 x 5 windows"])
def test_odd_sizes_and_overlapping_windows(geometry, batch, channels, hidden, dtype):
    check(geometry, batch, channels, hidden, dtype)


@pytest.mark.parametrize("programs", [1, 3, 1000])
@both_counts
def test_any_split_of_the_long_sum(geometry, programs, monkeypatch):
    from spatial_tokens.ops.window_linear import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    check(geometry, 3, 5, 7)


@both_counts
def test_empty_batch(geometry):
    check(geometry, 0, 5, 7)
    tokens, to_map, *to_weights = evaluate(lambda x, w: geometry.run(x, w, "triton"), *tensors(geometry, 0, 5, 7))
    assert (tokens.shape[0], to_map.shape[0]) == (0, 0)
    assert not any(gradient.any() for gradient in to_weights)


LAYOUTS = {
    "channels first": lambda b, h, w, c: torch.randn(b, c, h, w).permute(0, 2, 3, 1),
    "every second channel": lambda b, h, w, c: torch.randn(b, h, w, 2 * c)[..., ::2],
    "class token dropped": lambda b, h, w, c: torch.randn(b, h * w + 1, c)[:, 1:].unflatten(1, (h, w)),
    "every second image": lambda b, h, w, c: torch.randn(2 * b, h, w, c)[::2],
    "columns first": lambda b, h, w, c: torch.randn(b, w, h, c).transpose(1, 2),
    "expanded batch": lambda b, h, w, c: torch.randn(1, h, w, c).expand(b, h, w, c),
    "expanded map": lambda b, h, w, c: torch.randn(b, 1, 1, c).expand(b, h, w, c),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@both_counts
def test_any_layout_in_memory(geometry, layout):
    _, weights, grad = geometry.tensors(3, 4, 5, device=DEVICE)
    patch_map, grad = layout(3, *geometry.grid, 4).to(DEVICE), grad[:, :1, :1].expand_as(grad)
    assert_equals_reference(geometry, "triton", patch_map, [weight.t().contiguous().t() for weight in weights], grad)


@both_counts
def test_repeats_are_equal_to_the_bit(geometry):
    given = tensors(geometry, 3, 9, 5)
    first, second = [evaluate(lambda x, w: geometry.run(x, w, "triton"), *given) for _ in range(2)]
    assert all(map(torch.equal, first, second))


@both_counts
def test_nan_in_a_patch_a_weight_or_a_gradient_goes_where_a_convolution_sends_it(geometry):
    for poison in ("patch_map", "weight", "grad"):
        patch_map, weights, grad = tensors(geometry, 2, 37, 5)
        if poison == "patch_map":
            patch_map[1, 2, 2, 3] = torch.nan
        elif poison == "weight":
            weights[0][2, 40] = torch.nan
        else:
            grad[1, 1, 3] = torch.nan
        ours = evaluate(lambda x, w: geometry.run(x, w, "triton"), patch_map, weights, grad)
        theirs = evaluate(geometry.reference, *doubles(patch_map, weights, grad))
        for given, exact in zip(ours, theirs, strict=True):
            assert torch.equal(given.isnan().cpu(), exact.isnan()), poison


@both_counts
def test_gradients_of_gradients(geometry):
    def second(run, patch_map, weights, grad):
        leaves = [tensor.detach().requires_grad_() for tensor in (patch_map, *weights, grad)]
        tokens = run(leaves[0], leaves[1:-1])
        first = torch.autograd.grad(tokens, leaves[:-1], leaves[-1], create_graph=True)
        return torch.autograd.grad(sum((gradient**2).sum() for gradient in first), leaves)

    given = tensors(geometry, 2, 5, 3)
    ours = second(lambda x, w: geometry.run(x, w, "triton"), *given)
    for gradient, exact in zip(ours, second(geometry.reference, *doubles(*given)), strict=True):
        assert_close(gradient.cpu(), exact)


def test_opcheck_of_window_linear():
    patch_map, weights, grad = tensors(tiny, 2, 5, 3)
    patch_map, grad, weights = patch_map.requires_grad_(), grad.requires_grad_(), [weight.requires_grad_() for weight in weights]
    operators, windows = torch.ops.spatial_tokens, [number for window in tiny.windows for number in window]
    shared = (windows, list(tiny.step), list(tiny.count))
    torch.library.opcheck(operators.window_linear.default, (patch_map, weights, *shared, "triton"))
    torch.library.opcheck(operators.window_linear_input_grad.default, (grad, weights, *shared, list(tiny.grid), "triton"))
    torch.library.opcheck(operators.window_linear_weight_grad.default, (grad, patch_map, *shared, "triton"))


POOLINGS = {
    "squares": ((4, 4), [(1, 1), (2, 2), (3, 3), (4, 4)]),
    "rectangles": ((5, 7), [(2, 3), (5, 1)]),
}


@every_dtype
@pytest.mark.parametrize(("grid", "sizes"), POOLINGS.values(), ids=POOLINGS)
def test_pyramid(grid, sizes, dtype):
    patch_map = framed(torch.randn(2, *grid, 37).to(DEVICE, dtype))
    check_pyramid(patch_map, sizes, kernel_rounding(dtype))


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (1, 1), (2, 300), (1, 256)])
def test_pyramid_of_any_width_and_batch(batch, channels):
    check_pyramid(framed(torch.randn(batch, 3, 2, channels, device=DEVICE)), [(2, 1), (2, 2)])


def check_pyramid(patch_map, sizes, tolerance=FLOAT32):
    patch_map = patch_map.detach().requires_grad_()
    exact = patch_map.detach().cpu().double().requires_grad_()
    pooled = pyramid(patch_map, sizes, backend="triton")
    bins = [torch.nn.functional.adaptive_avg_pool2d(exact.permute(0, 3, 1, 2), size).flatten(2).transpose(1, 2) for size in sizes]
    expected = torch.cat(bins, dim=1).unsqueeze(1)
    assert pooled.dtype == patch_map.dtype
    assert_close(pooled.cpu(), expected, tolerance)
    grad = torch.randn(pooled.shape).to(pooled)
    gradient, theirs = torch.autograd.grad(pooled, patch_map, grad), torch.autograd.grad(expected, exact, grad.cpu().double())
    assert_close(gradient[0].cpu(), theirs[0], tolerance)


@pytest.mark.parametrize("layout", ["channels first", "every second channel", "every second image", "expanded map"])
def test_pyramid_of_any_layout(layout):
    check_pyramid(LAYOUTS[layout](2, 3, 4, 6).to(DEVICE), [(2, 2), (3, 4)])


def test_pyramid_repeats_are_equal_to_the_bit_and_nan_stays_in_its_bins():
    patch_map = torch.randn(2, 5, 7, 9, device=DEVICE)
    patch_map[0, 2, 3, 4] = torch.nan
    first, second = [pyramid(patch_map, [(2, 3), (5, 7)], backend="triton") for _ in range(2)]
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    expected = pyramid(patch_map, [(2, 3), (5, 7)], backend="naive").isnan()
    assert torch.equal(first.isnan(), expected)
    assert expected.sum() == 3  # two bins of rows share row 2


def test_opcheck_and_second_gradient_of_pyramid():
    patch_map, sizes = torch.randn(2, 4, 5, 3, device=DEVICE, requires_grad=True), [(3, 2), (1, 5)]
    torch.library.opcheck(torch.ops.spatial_tokens.pyramid.default, (patch_map, [3, 2, 1, 5]))
    grad = torch.randn(2, 1, 11, 3, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.spatial_tokens.pyramid_grad.default, (grad, [3, 2, 1, 5], [4, 5]))

    def second(backend):
        (gradient,) = torch.autograd.grad(pyramid(patch_map, sizes, backend=backend), patch_map, grad, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), grad)[0]

    assert_close(second("triton"), second("naive"))


def test_gradients_of_pyramid_in_batches():
    patch_map, sizes = torch.randn(2, 4, 5, 3, device=DEVICE, requires_grad=True), [(3, 2), (1, 5)]
    grads = torch.randn(3, 2, 1, 11, 3, device=DEVICE)
    batched = torch.autograd.grad(pyramid(patch_map, sizes, backend="triton"), patch_map, grads, is_grads_batched=True)[0]
    for found, grad in zip(batched, grads, strict=True):
        assert_close(found, torch.autograd.grad(pyramid(patch_map, sizes, backend="naive"), patch_map, grad)[0])


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_a_whole_projector(variant, monkeypatch):
    config = SPProjectorConfig(
        vision_hidden_size=9,
        spatial_hidden_size=7,
        text_hidden_size=5,
        grid_size=4,
        kernel_sizes=(2, 4),
        variant=variant,
        detail_kernel_size=2,
        detail_stride=1,
    )
    projector, patches = SPProjector.from_config(config, device=DEVICE), torch.randn(3, 16, 9, device=DEVICE)
    results = {}
    for backend in ("naive", "triton"):
        monkeypatch.setattr(backends, "OVERRIDE", backend)
        with Launches() as launches:
            call = lambda x: projector(x, return_attention=True)  # noqa: E731
            results[backend] = outputs_and_gradients(call, [patches], dict(projector.named_parameters()))
        assert bool(launches.names) == (backend == "triton")
    assert_all_close(results["triton"], results["naive"], FLOAT32)


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """The calls of our operators with backend "triton"."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "spatial_tokens" and ("triton" in args or "pyramid" in function.name()):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    given = tensors(tiny, 2, 5, 3)
    ours = evaluate(torch.compile(lambda x, w: tiny.run(x, w, "triton"), backend="aot_eager", fullgraph=True), *given)
    for gradient, exact in zip(ours, evaluate(tiny.reference, *doubles(*given)), strict=True):
        assert_close(gradient.cpu(), exact)


def test_float64_is_refused():
    with pytest.raises(SpatialTokensError, match=r"float32, bfloat16 and float16, got torch.float64; use 'auto' or 'gemm'"):
        once.run(*once.tensors(1, 2, 2, torch.float64, DEVICE)[:2], "triton")
