import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from spatial_tokens.ops.pyramid import pyramid
from tests.strategies import sizes, within
from tests.tolerances import FLOAT32, assert_close, rounding

SIZES = [(1, 1), (2, 3), (4, 2), (5, 6)]
every_backend = pytest.mark.parametrize("backend", ["auto", "naive", "gemm"])


def reference(patch_map, sizes):
    feature_map = patch_map.permute(0, 3, 1, 2)
    return torch.cat([F.adaptive_avg_pool2d(feature_map, size).flatten(2).transpose(1, 2) for size in sizes], dim=1)[:, None]


def evaluate(function, patch_map, sizes, grad):
    patch_map = patch_map.detach().requires_grad_()
    pooled = function(patch_map, sizes)
    return pooled.detach(), torch.autograd.grad(pooled, patch_map, grad.to(pooled))[0]


def assert_equals_reference(backend, patch_map, sizes, tolerance=FLOAT32):
    rows = sum(height * width for height, width in sizes)
    grad = torch.randn(patch_map.shape[0], 1, rows, patch_map.shape[3]).to(patch_map.dtype)
    ours = evaluate(lambda x, s: pyramid(x, s, backend=backend), patch_map, sizes, grad)
    theirs = evaluate(reference, patch_map.double(), sizes, grad)
    for given_tensor, exact in zip(ours, theirs, strict=True):
        assert given_tensor.dtype == patch_map.dtype
        assert_close(given_tensor, exact, tolerance)


@every_backend
@given(data=st.data(), grid=sizes, batch=st.integers(0, 3), channels=st.integers(1, 4))
def test_equals_adaptive_pooling_of_each_size_one_after_another(backend, data, grid, batch, channels):
    sizes = data.draw(st.lists(within(grid), min_size=1, max_size=4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    assert_equals_reference(backend, torch.rand(batch, *grid, channels) + 1, sizes)  # no cancellation


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_within_rounding(backend, dtype):
    # torch adds the sizes' gradients, and the bins' that share a patch, in 16 bits
    assert_equals_reference(backend, torch.randn(3, 5, 6, 7).to(dtype), SIZES, rounding(dtype, 2 * len(SIZES)))


LAYOUTS = {
    "channels first": lambda b, h, w, c: torch.randn(b, c, h, w).permute(0, 2, 3, 1),
    "class token dropped": lambda b, h, w, c: torch.randn(b, h * w + 1, c)[:, 1:].unflatten(1, (h, w)),
    "every second": lambda b, h, w, c: torch.randn(2 * b, h, 2 * w, 2 * c)[::2, :, ::2, ::2],
    "expanded": lambda b, h, w, c: torch.randn(1, h, w, 1).expand(b, h, w, c),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_backend
def test_any_layout_in_memory(backend, layout):
    assert_equals_reference(backend, layout(3, 5, 6, 4), SIZES)


@every_backend
@pytest.mark.parametrize("batch", [0, 257])
def test_empty_and_large_batches(backend, batch):
    assert_equals_reference(backend, torch.randn(batch, 5, 6, 2), SIZES)


@every_backend
def test_gradcheck_and_gradgradcheck(backend):
    patch_map = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: pyramid(x, [(2, 3), (3, 4)], backend=backend), patch_map)
    torch.autograd.gradgradcheck(lambda x: pyramid(x, [(2, 3), (3, 4)], backend=backend), patch_map)


@every_backend
def test_repeats_are_equal_to_the_bit(backend):
    patch_map, grad = torch.randn(4, 5, 6, 33), torch.randn(4, 1, 45, 33)
    first, second = [evaluate(lambda x, s: pyramid(x, s, backend=backend), patch_map, SIZES, grad) for _ in range(2)]
    assert all(map(torch.equal, first, second))


@every_backend
def test_compiles_into_one_graph_for_every_batch(backend):
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(lambda x, s: pyramid(x, s, backend=backend), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 3):
        patch_map, grad = torch.randn(batch, 5, 6, 3), torch.randn(batch, 1, 45, 3)
        ours, theirs = evaluate(compiled, patch_map, SIZES, grad), evaluate(reference, patch_map, SIZES, grad)
        for given_tensor, expected in zip(ours, theirs, strict=True):
            assert_close(given_tensor, expected)
        graphs.add(counter.frame_count)
    assert graphs == {1}


@every_backend
def test_meta_tensors_give_shapes(backend):
    pooled = pyramid(torch.empty(2, 5, 6, 3, device="meta", dtype=torch.bfloat16), SIZES, backend=backend)
    assert (pooled.shape, pooled.dtype, pooled.device.type) == ((2, 1, 45, 3), torch.bfloat16, "meta")


def test_the_kernels_shapes_are_known_without_running_them():
    patch_map = torch.empty(2, 5, 6, 3, device="meta", requires_grad=True)
    pooled = torch.ops.spatial_tokens.pyramid(patch_map, [number for size in SIZES for number in size])
    assert pooled.shape == (2, 1, 45, 3)
    assert torch.autograd.grad(pooled.sum(), patch_map)[0].shape == patch_map.shape


@every_backend
def test_a_nan_patch_reaches_only_its_bins(backend):
    patch_map = torch.randn(2, 4, 6, 3)
    patch_map[1, 1, 2, 0] = torch.nan
    pooled = pyramid(patch_map, [(1, 1), (2, 3)], backend=backend).isnan()
    expected = torch.zeros(2, 1, 7, 3, dtype=torch.bool)
    expected[1, 0, [0, 2], 0] = True
    assert torch.equal(pooled, expected)
