"""What each module promises as an `nn.Module`."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from spatial_tokens.modules.ablations import TransformerExtractor
from tests.modules.cases import CASES, GRID, every_case
from tests.modules.checks import assert_all_close, outputs_and_gradients
from tests.tolerances import FLOAT32, assert_close, rounding


def evaluate(case, module, inputs, compiled=None):
    function = module if compiled is None else compiled
    return outputs_and_gradients(lambda *x: case.run(function, x), inputs, dict(module.named_parameters()))


@every_case
def test_device_and_dtype_reach_every_parameter(case):
    tensors = case.build(device="meta", dtype=torch.bfloat16).state_dict().values()
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.bfloat16)}
    assert {output.dtype for output in case.run(case.build(dtype=torch.float64), case.inputs(dtype=torch.float64))} == {
        torch.float64
    }


@every_case
def test_from_meta_by_to_empty_and_reset_parameters(case):
    module = case.build(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
    module.reset_parameters()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.reset_parameters()
    random = 0
    for name, after in module.state_dict().items():
        assert after.isfinite().all(), name
        if "maps" in name:  # cosines
            assert torch.equal(before[name], after), name
        elif after.unique().numel() > 1:
            assert not torch.equal(before[name], after), name
            random += 1
        else:  # norms and queries
            assert after.unique() in (0, 1), name
    assert random >= len([p for p in module.parameters() if p.ndim == 2])
    assert all(output.isfinite().all() for output in case.run(module, case.inputs()))


@every_case
def test_linear_layers_start_within_the_bound_of_a_convolution(case):
    module = case.build()
    for _ in range(2):
        for name, layer in module.named_modules():
            if "channel_projection" in name or ".cores." in f".{name}" or isinstance(module, TransformerExtractor):
                continue  # factors, whose variance is tested in test_factorized.py; Xavier's rule
            if type(layer) is nn.Linear:
                assert 0.7 < layer.weight.abs().max() * layer.in_features**0.5 <= 1
        module.reset_parameters()


@every_case
def test_autocast_to_bfloat16(case):
    module, inputs = case.build(), case.inputs()
    exact = case.run(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        given = evaluate(case, module, inputs)
    outputs = [given.pop(f"output {i}") for i in range(len(exact))]
    for output, expected in zip(outputs, exact, strict=True):
        assert_close(output, expected, rounding(torch.bfloat16, 10))
    assert not all(map(torch.equal, outputs, exact))
    assert {gradient.dtype for gradient in given.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in given.values())


@every_case
def test_compile_without_graph_break_or_recompilation(case):
    torch._dynamo.reset()
    module, counter, graphs = case.build(), CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5, 3):
        inputs = case.inputs(batch)
        assert_all_close(evaluate(case, module, inputs, compiled), evaluate(case, module, inputs), FLOAT32)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_compile_with_inductor():
    torch._dynamo.reset()
    case = CASES["projector"]
    module, inputs = case.build(), case.inputs()
    compiled = torch.compile(module, fullgraph=True)
    assert_all_close(evaluate(case, module, inputs, compiled), evaluate(case, module, inputs), FLOAT32)


@every_case
def test_export_with_a_dynamic_batch(case):
    module, inputs = case.build(), case.inputs()
    names, batch = list(inspect.signature(module.forward).parameters), {0: torch.export.Dim("batch", max=64)}
    shapes = dict.fromkeys(names[: len(inputs)], batch) | dict.fromkeys(case.options)
    exported = torch.export.export(module, tuple(inputs), case.options, dynamic_shapes=shapes)
    loaded = torch.export.load(as_file(torch.export.save, exported)).module()
    for size in (0, 1, 5):
        inputs = case.inputs(size)
        for given, expected in zip(case.run(loaded, inputs), case.run(module, inputs), strict=True):
            assert_close(given, expected)


def as_file(save, *content):
    file = io.BytesIO()
    save(*content, file)
    file.seek(0)
    return file


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_save(module):
    return torch.load(as_file(torch.save, module), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_save], ids=["deepcopy", "pickle", "save"])
@every_case
def test_copies_are_equal_and_their_own(case, duplicate):
    module, inputs = case.build(), case.inputs()
    other = duplicate(module)
    for given, expected in zip(case.run(other, inputs), case.run(module, inputs), strict=True):
        assert torch.equal(given, expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in module.parameters())


@every_case
def test_the_state_dict_is_the_whole_state(case):
    module, other, inputs = case.build(), case.build(), case.inputs()
    other.load_state_dict(module.state_dict())
    for given, expected in zip(case.run(other, inputs), case.run(module, inputs), strict=True):
        assert torch.equal(given, expected)


@every_case
def test_no_images(case):
    module = case.build()
    some = case.run(module, case.inputs(2))
    inputs = [x.requires_grad_() for x in case.inputs(0)]
    none = case.run(module, inputs)
    assert [output.shape for output in none] == [(0, *output.shape[1:]) for output in some]
    sum(output.sum() for output in none).backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
    assert not any(parameter.grad.any() for parameter in module.parameters())


@every_case
def test_images_do_not_know_each_other_and_stay_as_they_are(case):
    module, inputs = case.build(), case.inputs(3)
    before = [x.clone() for x in inputs]
    for together, alone in zip(case.run(module, inputs), case.run(module, [x[1:2] for x in inputs]), strict=True):
        assert_close(together[1:2], alone, FLOAT32 / 10)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cropping", f"4, 6, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='cropping'"),
        ("pooling", f"4, 6, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='pooling'"),
        ("integrator", f"4, 6, grid_size={GRID}, kernel_size=(4, 2), stride=2"),
        (
            "factorized pooling",
            f"4, 6, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='pooling', frequencies=(1, 3, 2), rank=3, "
            "spatial_basis='cosine'",
        ),
        ("factorized integrator", f"4, 6, grid_size={GRID}, kernel_size=(4, 2), stride=2"),
        ("sliding window", f"4, 6, grid_size={GRID}, kernel_size=(3, 4), stride=(3, 4)"),
        ("transformer", f"4, grid_size={GRID}, kernel_sizes=(2, (4, 6)), variant='cropping'"),
    ],
)
def test_extra_repr(name, expected):
    module = CASES[name].build(device="meta")
    assert module.extra_repr() == expected
    assert expected in repr(module)
