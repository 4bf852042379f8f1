"""Kernels on windows in plain torch: values, gradients of any order, dtypes, layouts, and what an operator owes torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_tokens import SpatialTokensError
from spatial_tokens.grid import Window
from spatial_tokens.ops.window_linear import gemm, window_linear
from tests.ops.checks import GEOMETRIES, Geometry, assert_equals_reference, doubles, evaluate
from tests.tolerances import assert_close

BACKENDS = ["naive", "gemm"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
strided = Geometry((5, 6), [Window(0, 1, 2, 3), Window(1, 0, 3, 1)], (1, 2), (2, 2))
once = Geometry((4, 5), [Window(1, 1, 2, 3), Window(0, 0, 4, 5)])
both_counts = pytest.mark.parametrize("geometry", [strided, once], ids=["several windows", "one window"])


@st.composite
def geometries(draw):
    grid = draw(st.tuples(*[st.integers(1, 7)] * 2))
    count = tuple(draw(st.integers(1, min(3, side))) for side in grid)
    step = tuple(draw(st.integers(1, (side - 1) // (n - 1) if n > 1 else 3)) for side, n in zip(grid, count, strict=True))
    room = [side - (n - 1) * by for side, n, by in zip(grid, count, step, strict=True)]
    windows = []
    for _ in range(draw(st.integers(1, 4))):
        (height, top), (width, left) = [
            (size, draw(st.integers(0, side - size))) for side in room for size in [draw(st.integers(1, side))]
        ]
        windows.append(Window(top, left, height, width))
    return Geometry(grid, windows, step, count)


@every_backend
@given(
    geometry=geometries(), batch=st.integers(0, 3), widths=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 99)
)
def test_whole_numbers_give_what_convolutions_give(backend, geometry, batch, widths, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(-8, 9, t.shape, generator=generator).float() for t in flat(geometry.tensors(batch, *widths))]
    patch_map, *weights, grad = tensors
    ours = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad)
    theirs = evaluate(geometry.reference, *doubles(patch_map, weights, grad))
    for given_tensor, exact in zip(ours, theirs, strict=True):  # whole numbers of this size are exact in any order
        assert torch.equal(given_tensor.double(), exact)


def flat(tensors):
    patch_map, weights, grad = tensors
    return [patch_map, *weights, grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_backend
@every_geometry
def test_values_and_gradients_are_within_rounding(geometry, backend, dtype):
    for batch in (1, 5):
        assert_equals_reference(geometry, backend, *geometry.tensors(batch, 19, 13, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gemm_adds_in_float32(dtype):
    """Of the rows of a window, and of the windows of a patch: a large term, then 63 that each round to nothing in 16 bits."""
    geometry = Geometry((127, 1), [Window(0, 0, 64, 1)], (1, 1), (64, 1))
    weight = torch.ones(1, 64, dtype=dtype)
    weight[0, 0] = 2 / torch.finfo(dtype).eps
    tensors = [torch.ones(1, 127, 1, 1, dtype=dtype), [weight], torch.ones(1, 64, 1, dtype=dtype)]
    tokens, to_map, _ = evaluate(lambda x, w: geometry.run(x, w, "gemm"), *tensors)
    assert weight[0, 0] + 1 == weight[0, 0]
    assert (tokens == weight.float().sum().to(dtype)).all()
    assert to_map[0, 63, 0, 0] == weight.float().sum().to(dtype)


@every_backend
@both_counts
def test_gradcheck_and_gradgradcheck(geometry, backend):
    patch_map, weights, _ = geometry.tensors(2, 2, 2, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (patch_map, *weights)]
    torch.autograd.gradcheck(lambda x, *w: geometry.run(x, w, backend), inputs)
    torch.autograd.gradgradcheck(lambda x, *w: geometry.run(x, w, backend), inputs)


class Record(TorchDispatchMode):
    """The names of the operators that run, and the largest tensor that they make anew."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        known = {tensor.untyped_storage().data_ptr() for tensor in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(tensor)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, True, True), (False, False, True)])
@every_backend
def test_only_what_is_asked_for_gets_a_gradient(backend, wanted):
    patch_map, weights, grad = strided.tensors(2, 3, 4)
    expected = evaluate(strided.reference, *doubles(patch_map, weights, grad))[1:]
    leaves = [tensor.requires_grad_(asked) for tensor, asked in zip([patch_map, *weights], wanted, strict=True)]
    tokens = strided.run(leaves[0], leaves[1:], backend)
    with Record() as record:
        tokens.backward(grad)
    for leaf, asked, exact in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == asked
        if asked:
            assert_close(leaf.grad, exact)
    if backend == "gemm":
        ran = [any(f"window_linear_{kind}_grad" in name for name in record.names) for kind in ("input", "weight")]
        assert ran == [wanted[0], any(wanted[1:])]


def test_nothing_is_kept_for_gradients_that_nobody_asks_for():
    patch_map, weights, _ = strided.tensors(2, 3, 4)
    assert not strided.run(patch_map, weights, "gemm").requires_grad
    with torch.no_grad():
        assert not strided.run(patch_map.requires_grad_(), weights, "gemm").requires_grad


LAYOUTS = {
    "channels first": lambda b, h, w, c: torch.randn(b, c, h, w).permute(0, 2, 3, 1),
    "every second channel": lambda b, h, w, c: torch.randn(b, h, w, 2 * c)[..., ::2],
    "class token dropped": lambda b, h, w, c: torch.randn(b, h * w + 1, c)[:, 1:].unflatten(1, (h, w)),
    "every second image": lambda b, h, w, c: torch.randn(2 * b, h, w, c)[::2],
    "batch last": lambda b, h, w, c: torch.randn(h, w, c, b).permute(3, 0, 1, 2),
    "columns first": lambda b, h, w, c: torch.randn(b, w, h, c).transpose(1, 2),
    "expanded batch": lambda b, h, w, c: torch.randn(1, h, w, c).expand(b, h, w, c),
    "expanded map": lambda b, h, w, c: torch.randn(b, 1, 1, c).expand(b, h, w, c),
    "expanded channels": lambda b, h, w, c: torch.randn(b, h, w, 1).expand(b, h, w, c),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_backend
@both_counts
def test_any_layout_in_memory(geometry, backend, layout):
    _, weights, grad = geometry.tensors(3, 4, 5)
    assert_equals_reference(geometry, backend, layout(3, *geometry.grid, 4), weights, grad)
    transposed = [weight.t().contiguous().t() for weight in weights]
    assert_equals_reference(geometry, backend, layout(3, *geometry.grid, 4), transposed, grad[:, :1, :1].expand_as(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 257])
@every_backend
@both_counts
def test_empty_and_large_batches(geometry, backend, batch, dtype):
    assert_equals_reference(geometry, backend, *geometry.tensors(batch, 3, 4, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_backend
@every_geometry
def test_repeats_are_equal_to_the_bit(geometry, backend, dtype):
    tensors = geometry.tensors(7, 33, 20, dtype)
    first, *others = [evaluate(lambda x, w: geometry.run(x, w, backend), *tensors) for _ in range(4)]
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.fixture
def poisoned():
    """New memory holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@every_geometry
def test_every_element_is_written(geometry, poisoned):
    assert_equals_reference(geometry, "gemm", *geometry.tensors(3, 5, 7))
    assert_equals_reference(geometry, "gemm", *geometry.tensors(3, 5, 7, torch.bfloat16))


@every_backend
@both_counts
def test_a_nan_patch_reaches_only_the_windows_it_lies_in(geometry, backend):
    for y, x in [(0, 0), (2, 1), (1, 3), (geometry.grid[0] - 1, geometry.grid[1] - 1)]:
        patch_map, weights, grad = geometry.tensors(2, 3, 4)
        patch_map[1, y, x] = torch.nan
        given_tensors = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad)
        exact = evaluate(geometry.reference, *doubles(patch_map, weights, grad))
        tokens = given_tensors[0].isnan()
        assert torch.equal(tokens, exact[0].isnan())
        assert not tokens[0].any()
        assert not given_tensors[1].isnan().any()
        for i, window in enumerate(geometry.windows):
            seen = given_tensors[2 + i].unflatten(1, (window.height, window.width, -1)).isnan()
            assert torch.equal(seen, weight_elements_that_meet(geometry, window, y, x).expand_as(seen))


def weight_elements_that_meet(geometry, window, y, x):
    meets = torch.zeros(1, window.height, window.width, 1, dtype=torch.bool)
    for i in range(geometry.count[0]):
        for j in range(geometry.count[1]):
            row, column = y - window.top - i * geometry.step[0], x - window.left - j * geometry.step[1]
            if 0 <= row < window.height and 0 <= column < window.width:
                meets[0, row, column, 0] = True
    return meets


@every_backend
@both_counts
def test_a_nan_weight_reaches_only_its_tokens_and_its_windows(geometry, backend):
    patch_map, weights, grad = geometry.tensors(2, 3, 4)
    weights[1][2, 0] = torch.nan  # its first patch's first channel, for output 2
    tokens, to_map, *to_weights = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad)
    expected = torch.zeros_like(tokens, dtype=torch.bool)
    expected.chunk(2, dim=1)[1][..., 2] = True
    assert torch.equal(tokens.isnan(), expected)
    exact = evaluate(geometry.reference, *doubles(patch_map, weights, grad))[1]
    assert torch.equal(to_map.isnan(), exact.isnan())
    assert to_map.isnan().sum() == 2 * geometry.count[0] * geometry.count[1]
    assert not any(gradient.isnan().any() for gradient in to_weights)


@every_backend
@both_counts
def test_autocast_is_that_of_linear(geometry, backend):
    patch_map, weights, grad = geometry.tensors(2, 3, 4)
    window = geometry.windows[0]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            given_tensors = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad.to(dtype))
            first = patch_map[:, window.top : window.bottom, window.left : window.right].flatten(1)
            expected = F.linear(first, weights[0])
            mixed = geometry.run(patch_map.to(dtype), weights, backend)
            double = geometry.run(
                *[[t.double() for t in x] if isinstance(x, list) else x.double() for x in (patch_map, weights)], backend
            )
        tokens, *gradients = given_tensors
        assert tokens.dtype == mixed.dtype == expected.dtype == dtype
        assert double.dtype == torch.float64
        assert torch.equal(mixed, tokens)
        assert_close(tokens[:, 0], expected, 2 * torch.finfo(dtype).eps)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        rounded = [patch_map.to(dtype), [weight.to(dtype) for weight in weights], grad.to(dtype)]
        for ours, theirs in zip(given_tensors, evaluate(lambda x, w: geometry.run(x, w, backend), *rounded), strict=True):
            assert torch.equal(ours.to(dtype), theirs)


@every_backend
def test_autocast_leaves_meta_tensors_alone(backend):
    patch_map, weights, _ = strided.tensors(2, 3, 4, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert strided.run(patch_map, weights, backend).dtype == torch.float32


@every_backend
@both_counts
def test_meta_tensors_give_shapes(geometry, backend):
    patch_map, weights, grad = geometry.tensors(2, 3, 4, torch.bfloat16, "meta")
    tokens, *gradients = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad)
    for given_tensor, expected in zip([tokens, *gradients], [grad, patch_map, *weights], strict=True):
        assert (given_tensor.shape, given_tensor.dtype, given_tensor.device) == (expected.shape, expected.dtype, expected.device)


@both_counts
def test_opcheck(geometry):
    patch_map, weights, grad = geometry.tensors(2, 3, 4)
    operators, windows = torch.ops.spatial_tokens, [number for window in geometry.windows for number in window]
    shared = (windows, list(geometry.step), list(geometry.count))
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        patch_map, grad = patch_map.requires_grad_(wanted[0]), grad.requires_grad_(wanted[0])
        weights = [weight.requires_grad_(wanted[1]) for weight in weights]
        torch.library.opcheck(operators.window_linear.default, (patch_map, weights, *shared, "gemm"))
        torch.library.opcheck(operators.window_linear_input_grad.default, (grad, weights, *shared, list(geometry.grid), "gemm"))
        torch.library.opcheck(operators.window_linear_weight_grad.default, (grad, patch_map, *shared, "gemm"))


@every_backend
@both_counts
def test_compiles_into_one_graph_for_every_batch(geometry, backend):
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(lambda x, w: geometry.run(x, w, backend), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 3):
        tensors = geometry.tensors(batch, 3, 4)
        ours, theirs = evaluate(compiled, *tensors), evaluate(lambda x, w: geometry.run(x, w, backend), *tensors)
        for given_tensor, expected in zip(ours, theirs, strict=True):
            assert_close(given_tensor, expected)
        graphs.add(counter.frame_count)
    assert graphs == {1}


def test_compiles_with_inductor():
    torch._dynamo.reset()
    tensors = strided.tensors(2, 3, 4)
    ours = evaluate(torch.compile(lambda x, w: strided.run(x, w, "gemm"), fullgraph=True), *tensors)
    for given_tensor, expected in zip(ours, evaluate(strided.reference, *doubles(*tensors)), strict=True):
        assert_close(given_tensor, expected)


@pytest.mark.parametrize("transform", ["jvp", "forward mode", "grad", "vmap", "jacobian", "gradients of each image"])
@every_backend
def test_torchs_other_transforms(backend, transform):
    patch_map, weights, _ = strided.tensors(3, 2, 2, torch.float64)
    tangent = torch.randn_like(patch_map)

    def call(run):
        if transform == "jvp":
            return torch.func.jvp(lambda x: run(x, weights), (patch_map,), (tangent,))[1]
        if transform == "forward mode":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(run(forward_ad.make_dual(patch_map, tangent), weights)).tangent
        if transform == "grad":
            return torch.func.grad(lambda x: run(x, weights).square().sum())(patch_map)
        if transform == "vmap":
            return torch.func.vmap(lambda x: run(x[None], weights))(patch_map)
        if transform == "jacobian":
            return torch.func.jacrev(lambda x: run(x, weights))(patch_map)
        each = torch.func.vmap(torch.func.grad(lambda w, x: run(x[None], w).square().sum()), in_dims=(None, 0))
        return torch.cat([gradient.flatten(1) for gradient in each(weights, patch_map)], dim=1)

    assert_close(call(lambda x, w: strided.run(x, w, backend)), call(strided.reference))


@pytest.mark.parametrize("create_graph", [False, True])
@every_backend
@both_counts
def test_gradients_in_batches_are_those_of_each(geometry, backend, create_graph):
    patch_map, weights, grad = geometry.tensors(2, 3, 4, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (patch_map, *weights)]
    grads = torch.stack([grad, -2 * grad.flip(0), grad.roll(1, 1)])

    def gradients(run, outputs, inputs):
        tokens = run(patch_map, weights)
        if not create_graph:
            return torch.autograd.grad(tokens, inputs, outputs, is_grads_batched=outputs.ndim > grad.ndim)
        first = torch.autograd.grad(tokens, inputs, grad, create_graph=True)
        sums = outputs.sum((-1, -2, -3))  # as many gradients of each first gradient as there are of the tokens
        scaled = [torch.tensordot(sums, tensor.detach(), dims=0) for tensor in first]
        return torch.autograd.grad(first, inputs, scaled, is_grads_batched=outputs.ndim > grad.ndim)

    found = gradients(lambda x, w: geometry.run(x, w, backend), grads, leaves)
    each = [gradients(geometry.reference, outputs, leaves) for outputs in grads]
    for ours, *theirs in zip(found, *each, strict=True):
        assert_close(ours, torch.stack(theirs))


@every_backend
def test_vectorized_jacobians(backend):
    patch_map, weights, _ = strided.tensors(1, 2, 2, torch.float64)
    for vectorized in (
        lambda run: jacobian(lambda x: run(x, weights), patch_map, vectorize=True),
        lambda run: jacobian(lambda w: run(patch_map, [w, *weights[1:]]), weights[0], vectorize=True),
        lambda run: jacobian(lambda x: run(x, weights), patch_map, vectorize=True, strategy="forward-mode"),
        lambda run: torch.compile(torch.func.vmap(lambda x: run(x[None], weights)), backend="aot_eager")(patch_map),
    ):
        assert_close(vectorized(lambda x, w: strided.run(x, w, backend)), vectorized(strided.reference))


def test_the_operators_batched_over_any_dimension():
    """Eager code of vmap runs the naive backend; compiled code asks the operator's own rule."""
    patch_map, weights, _ = strided.tensors(2, 2, 4, torch.float64)
    flat = [number for window in strided.windows for number in window]

    def run(maps, *kernels):
        return torch.ops.spatial_tokens.window_linear(maps, list(kernels), flat, list(strided.step), list(strided.count), "gemm")

    for in_dims in ((3, None, None), (None, 1, None), (1, 0, 1)):
        given = (patch_map, *weights)
        batched = [
            each if dim is None else torch.stack([each, i * each], dim)
            for i, (each, dim) in enumerate(zip(given, in_dims, strict=True), 2)
        ]
        found = torch.func.vmap(run, in_dims=in_dims)(*batched)
        for j in range(2):
            one = [each if dim is None else each.select(dim, j) for each, dim in zip(batched, in_dims, strict=True)]
            assert_close(found[j], strided.reference(one[0], one[1:]))


def test_forward_reads_single_windows_in_place_and_several_row_by_row():
    geometry = Geometry((24, 24), [Window(0, 0, 16, 16)], (2, 2), (5, 5))
    patch_map, weights, _ = geometry.tensors(4, 8, 2)
    unfolded = 4 * 25 * weights[0].shape[1] * patch_map.itemsize
    with Record() as record:
        gemm.window_linear(patch_map, weights, *geometry[1:])
    assert 0 < record.largest <= unfolded / 16
    single = Geometry((24, 24), [Window(4, 4, 16, 16)])
    with Record() as record:
        gemm.window_linear(patch_map, weights, *single[1:])
    assert 0 < record.largest <= unfolded / 25 / 16


def test_gradients_take_no_unfolded_copy():
    geometry = Geometry((24, 24), [Window(0, 0, 16, 16)], (2, 2), (5, 5))
    patch_map, weights, grad = geometry.tensors(4, 8, 2)
    unfolded = 4 * 25 * weights[0].shape[1] * patch_map.itemsize
    for run in (
        lambda: gemm.input_grad(grad, weights, *geometry[1:], geometry.grid),
        lambda: gemm.weight_grad(grad, patch_map, *geometry[1:]),
    ):
        with Record() as record:
            run()
        assert 0 < record.largest <= max(unfolded / 16, patch_map.nbytes)


WRONG = {
    "no weights": ({"weights": [], "windows": []}, "each weight needs a window: got 0 weights and 0 windows"),
    "a window too few": ({"windows": [Window(0, 0, 2, 3)]}, "each weight needs a window: got 2 weights and 1 windows"),
    "below the map": (
        {"windows": [Window(4, 0, 2, 3), Window(0, 0, 1, 1)]},
        r"leaves the patch map of 5 x 6 .*build the module for its",
    ),
    "right of the map": ({"windows": [Window(0, 4, 2, 3), Window(0, 0, 1, 1)]}, "leaves the patch map"),
    "above the map": ({"windows": [Window(-1, 0, 2, 3), Window(0, 0, 1, 1)]}, "leaves the patch map"),
    "left of the map": ({"windows": [Window(0, 0, 2, 3), Window(0, -1, 1, 1)]}, "leaves the patch map"),
    "counted over the edge": ({"count": (5, 1)}, r"leaves the patch map of 5 x 6 \(step \(1, 1\), count \(5, 1\)\)"),
    "stepped over the edge": ({"count": (1, 2), "step": (1, 4)}, "leaves the patch map"),
    "no count": ({"count": (0, 1)}, "leaves the patch map"),
    "step back": ({"step": (1, -1)}, "leaves the patch map"),
    "another window's weight": (
        {"windows": [Window(0, 0, 1, 1), Window(0, 0, 2, 3)]},
        r"Window\(top=0, left=0, height=1, width=1\) of 3 channels needs a weight \(4, 3\), got \(4, 18\)",
    ),
    "other outputs": ({"weights": [torch.zeros(4, 18), torch.zeros(5, 3)]}, r"needs a weight \(4, 3\), got \(5, 3\)"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@every_backend
def test_what_does_not_fit_is_named(backend, change, message):
    arguments = {"weights": [torch.zeros(4, 18), torch.zeros(4, 3)], "windows": [Window(0, 0, 2, 3), Window(1, 1, 1, 1)]} | change
    with pytest.raises(SpatialTokensError, match=message):
        window_linear(torch.zeros(2, 5, 6, 3), backend=backend, **arguments)
