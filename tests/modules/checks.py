"""What the tests of the modules share: random sizes and inputs, and the comparison of a module with the reference."""

from functools import partial

import torch
from hypothesis import strategies as st

from tests.tolerances import FLOAT32, assert_close

ZERO = ("key_projector.0.bias", "key_projector.1.bias")  # they shift all scores of a softmax alike: no gradient but rounding


def assert_equals_reference(module, reference, *inputs, tolerance=FLOAT32, **options):
    """Outputs and the gradients of inputs and parameters equal those of `reference(parameters, *inputs)` in float64."""
    parameters = dict(module.named_parameters())
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    given = outputs_and_gradients(lambda *x: module(*x, **options), inputs, parameters)
    expected = outputs_and_gradients(lambda *x: reference(exact, *x), [x.double() for x in inputs], exact)
    assert_all_close(given, expected, tolerance)


def outputs_and_gradients(function, inputs, parameters):
    """All by name; the gradients are those of a fixed random weighting of all outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters.values()], weights)
    names = [f"output {i}" for i in range(len(outputs))] + [f"input {i}" for i in range(len(inputs))] + list(parameters)
    return dict(zip(names, (*outputs, *gradients), strict=True))


def assert_all_close(given, expected, tolerance):
    assert given.keys() == expected.keys()
    largest = max(tensor.norm() for tensor in expected.values())
    for name in expected:
        ours, theirs = given[name], expected[name]
        if name.endswith(ZERO):  # so it is measured against the weight's
            weight = name.removesuffix("bias") + "weight"
            ours, theirs = (torch.cat([tensors[name], tensors[weight].flatten()]) for tensors in (given, expected))
        if theirs.norm() < 1e-14 * largest:  # zero but for rounding, as behind a unit that gives nothing
            assert ours.norm() < 1e-9 * largest, name
            continue
        try:
            assert_close(ours, theirs, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


randn = partial(torch.randn, dtype=torch.float64)
LAYOUTS = {
    "contiguous": lambda b, n, c: randn(b, n, c),
    "channels first": lambda b, n, c: randn(b, c, n).transpose(1, 2),
    "class token dropped": lambda b, n, c: randn(b, n + 1, c)[:, 1:],
    "every second": lambda b, n, c: randn(b, 2 * n, c + 1)[:, ::2, 1:],
    "batch last": lambda b, n, c: randn(n, c, b).permute(2, 0, 1),
    "expanded": lambda b, n, c: randn(1, n, c).expand(b, n, c),
}
batches = st.integers(0, 3)
widths = st.integers(1, 5)
sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
variants = st.sampled_from(["cropping", "pooling"])


@st.composite
def features(draw, batch, positions, channels):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](batch, positions, channels)


@st.composite
def kernels(draw, grid):
    """A kernel that fits the grid, as the user may write it."""
    return draw(written([draw(st.integers(1, side)) for side in grid]))


@st.composite
def scales(draw, grid, variant):
    """Increasing kernel sizes that fit the grid, of its parity when cropping."""
    step = 2 if variant == "cropping" else 1
    count = draw(st.integers(1, 4))
    heights, lengths = (
        sorted(draw(st.lists(st.sampled_from(range(side, 0, -step)), min_size=count, max_size=count))) for side in grid
    )
    return [draw(written(size)) for size in dict.fromkeys(zip(heights, lengths, strict=True))]


@st.composite
def written(draw, size):
    height, width = size
    return height if height == width and draw(st.booleans()) else draw(st.sampled_from([(height, width), [height, width]]))


@st.composite
def strides(draw, grid):
    return draw(written([draw(st.integers(1, min(4, side))) for side in grid]))
