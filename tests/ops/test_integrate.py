import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from spatial_tokens.ops.integrate import attend, integrate
from tests.tolerances import FLOAT32, FLOAT64, assert_close, assert_each_close, relative_error, rounding

every_backend = pytest.mark.parametrize("backend", ["auto", "naive", "gemm"])
EPS = (1e-5, 1e-5, 1e-5)
NAMES = ["norm weight", "norm bias", "weight", "bias"]


def tensors(batch, tokens, positions, width, dtype=torch.float32):
    """Spatial tokens, detail, and the twelve parameters of query, key and value, none of them trivial."""
    parameters = []
    for _ in range(3):
        scale, shift, bias = 1 + torch.randn(width) / 4, torch.randn(width) / 4, torch.randn(width) / 4
        parameters += [scale, shift, torch.randn(width, width) / width**0.5, bias]
    return [t.to(dtype) for t in (torch.randn(batch, tokens, width), torch.randn(batch, positions, width), *parameters)]


def run(backend, eps=EPS):
    return lambda x, detail, *p: integrate(x, detail, p[:4], p[4:8], p[8:], eps=eps, backend=backend)


def reference(eps=EPS):
    def project(features, parameters, one_eps):
        norm_weight, norm_bias, weight, bias = parameters
        centered = features - features.mean(-1, keepdim=True)
        normal = centered / (centered.square().mean(-1, keepdim=True) + one_eps).sqrt()
        return (normal * norm_weight + norm_bias) @ weight.T + bias

    def call(x, detail, *p):
        query, key, value = project(x, p[:4], eps[0]), project(detail, p[4:8], eps[1]), project(detail, p[8:], eps[2])
        exponentials = torch.einsum("bks,bps->bkp", query, key).div(x.shape[-1] ** 0.5).exp()
        attention = exponentials / exponentials.sum(-1, keepdim=True)
        return torch.cat([x, torch.einsum("bkp,bps->bks", attention, value)], dim=-1), attention

    return call


def evaluate(function, inputs):
    """Tokens, attention, and the gradient of a fixed random weighting of both."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return [output.detach() for output in outputs], torch.autograd.grad(outputs, inputs, weights)


def assert_equals_reference(backend, inputs, tolerance=FLOAT32, eps=EPS):
    (tokens, attention), gradients = evaluate(run(backend, eps), inputs)
    (exact_tokens, exact_attention), exact = evaluate(reference(eps), [tensor.double() for tensor in inputs])
    assert_close(tokens, exact_tokens, tolerance)
    assert_close(attention, exact_attention, tolerance)
    assert torch.equal(tokens[..., : inputs[0].shape[-1]], inputs[0])
    largest = max([gradient.abs().max().item() for gradient in exact if gradient.numel()], default=0)
    for given_tensor, one in zip(gradients, exact, strict=True):
        assert (given_tensor.shape, given_tensor.dtype) == (one.shape, inputs[0].dtype)
        assert (given_tensor - one).abs().le(tolerance * max(largest, 1e-30)).all()  # a key's shift moves nothing


@every_backend
@given(shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(2, 9)), seed=st.integers(0, 999))
def test_equals_attention_written_out(backend, shape, seed):
    torch.manual_seed(seed)
    inputs = tensors(*shape, torch.float64)
    assert_equals_reference(backend, inputs, 1000 * FLOAT64 if shape[3] == 2 else FLOAT64)  # a LayerNorm of two numbers is a step


@every_backend
@pytest.mark.parametrize("shape", [(3, 6, 25, 64), (257, 2, 3, 8), (0, 6, 25, 8), (2, 1, 1, 16)], ids=str)
def test_float32(backend, shape):
    assert_equals_reference(backend, tensors(*shape))


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_within_rounding(backend, dtype):
    assert_equals_reference(backend, tensors(3, 6, 25, 32, dtype), rounding(dtype, 10))


@every_backend
@pytest.mark.parametrize("eps", [(1e-1, 1e-5, 1e-5), (1e-5, 1e-1, 1e-5), (1e-5, 1e-5, 1e-1), (0.3, 0.2, 0.1)], ids=str)
def test_each_norm_has_its_own_eps(backend, eps):
    inputs = tensors(2, 3, 5, 8)
    assert_equals_reference(backend, inputs, eps=eps)
    assert relative_error(run(backend, eps)(*inputs)[0], run(backend)(*inputs)[0]) > 10 * FLOAT32


@every_backend
def test_what_torchs_own_layers_give(backend):
    x, detail, *parameters = tensors(2, 3, 5, 8)
    projectors = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)]
    for projector, *own in zip(projectors, *[parameters[i::4] for i in range(4)], strict=True):
        projector.load_state_dict(dict(zip(projector.state_dict(), own, strict=True)))
    query, key, value = projectors
    for ours, theirs in zip(run(backend)(x, detail, *parameters), attend(x, query(x), key(detail), value(detail)), strict=True):
        assert_close(ours, theirs)


@every_backend
def test_the_keys_shifts_get_a_gradient_that_is_zero_but_for_rounding(backend):
    inputs = [tensor.requires_grad_() for tensor in tensors(2, 3, 5, 8)]
    tokens, _ = run(backend)(*inputs)
    tokens.square().sum().backward()
    for shift in (inputs[7], inputs[9]):
        assert shift.grad is not None
        assert shift.grad.abs().max() <= FLOAT32 * inputs[8].grad.abs().max()


@every_backend
def test_gradcheck_and_gradgradcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 2, 3, 4, torch.float64)]
    torch.autograd.gradcheck(run(backend), inputs)
    torch.autograd.gradgradcheck(run(backend), inputs)


@every_backend
def test_one_input_alone_gets_a_gradient(backend):
    for wanted in (0, 1, 2, 8, 13):
        inputs = tensors(2, 3, 5, 8)
        exact = evaluate(reference(), [tensor.double() for tensor in inputs])[1][wanted]
        inputs[wanted].requires_grad_()
        outputs = run(backend)(*inputs)
        generator = torch.Generator().manual_seed(1)
        sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
        assert_close(inputs[wanted].grad, exact)
        assert all(tensor.grad is None for i, tensor in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("eps", [EPS, (1e-5, 1e-6, 1e-4)], ids=["one eps", "three"])
def test_opcheck(eps):
    x, detail, *p = [tensor.requires_grad_() for tensor in tensors(2, 3, 5, 4)]
    torch.library.opcheck(torch.ops.spatial_tokens.integrate.default, (x, detail, p[:4], p[4:8], p[8:], list(eps)))


@every_backend
def test_compiles_into_one_graph_for_every_batch(backend):
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(run(backend), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 3):
        inputs = tensors(batch, 3, 5, 8)
        (ours, gradients), (theirs, exact) = evaluate(compiled, inputs), evaluate(run(backend), inputs)
        for given_tensor, expected in zip([*ours, *gradients], [*theirs, *exact], strict=True):
            assert_each_close(given_tensor, expected)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@every_backend
def test_repeats_are_equal_to_the_bit(backend):
    inputs = tensors(4, 6, 25, 32)
    (first, gradients), (second, others) = evaluate(run(backend), inputs), evaluate(run(backend), inputs)
    assert all(map(torch.equal, [*first, *gradients], [*second, *others]))


@every_backend
def test_any_layout_in_memory(backend):
    x, detail, *parameters = tensors(3, 4, 5, 6)
    for views in (
        [x.transpose(0, 1).contiguous().transpose(0, 1), detail.transpose(1, 2).contiguous().transpose(1, 2)],
        [x[:1].expand(3, -1, -1), detail[:, :1].expand(-1, 5, -1)],
        [torch.cat([x, x], -1)[..., ::2], torch.cat([detail, detail])[::2]],
    ):
        assert_equals_reference(backend, [*views, *parameters])


@every_backend
def test_autocast_keeps_the_softmax_in_float32_and_gives_the_same(backend):
    inputs = tensors(2, 3, 5, 8)
    exact = run(backend)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        given_tensors = run(backend)(*inputs)
        expected = run("naive")(*inputs)
    for ours, theirs, one in zip(given_tensors, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, one, rounding(torch.bfloat16, 8))


@every_backend
def test_nan_stays_in_its_image(backend):
    inputs = tensors(3, 2, 4, 6)
    inputs[1][1, 2, 3] = torch.nan
    for output in run(backend)(*inputs):
        assert output[1].isnan().any()
        assert not output[[0, 2]].isnan().any()


@every_backend
def test_meta_tensors_give_shapes(backend):
    outputs = run(backend)(*[tensor.to("meta") for tensor in tensors(2, 3, 5, 8)])
    assert [output.shape for output in outputs] == [(2, 3, 16), (2, 3, 5)]
