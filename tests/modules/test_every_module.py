"""What each module promises as an `nn.Module`."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.modules.cases import ATTENTION, CASES, GRID, every_case
from tests.modules.checks import outputs_and_gradients
from tests.tolerances import assert_close, rounding


def evaluate(case, module, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return outputs_and_gradients(case.run(module, inputs), inputs, dict(module.named_parameters()))


def assert_same(given, expected, tolerance):
    assert given.keys() == expected.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    for name in expected:  # with the largest at the end, since some gradients are zero but for rounding
        assert_close(*(torch.cat([side[name].flatten(), largest[None]]) for side in (given, expected)), tolerance)


@every_case
def test_device_and_dtype_reach_every_parameter(case):
    tensors = case.build(device="meta", dtype=torch.bfloat16).state_dict().values()
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.bfloat16)}
    assert {output.dtype for output in case.run(case.build(dtype=torch.float64), case.inputs(dtype=torch.float64))} == {torch.float64}


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
        assert after.abs().max() <= 1, name
        if after.unique().numel() > 1:
            assert not torch.equal(before[name], after), name
            random += 1
        else:  # norms and queries
            assert after.unique() in (0, 1), name
    assert random >= len([p for p in module.parameters() if p.ndim == 2])
    assert all(output.isfinite().all() for output in case.run(module, case.inputs()))


@every_case
def test_autocast_to_bfloat16(case):
    module, inputs = case.build(), case.inputs()
    expected = evaluate(case, module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        given = evaluate(case, module, inputs)
    assert {name: tensor.dtype for name, tensor in given.items() if "output" not in name} == {
        name: torch.float32 for name in expected if "output" not in name
    }
    assert any(not torch.equal(given[name], expected[name]) for name in expected)
    assert_same(given, expected, rounding(torch.bfloat16, 20))


@every_case
def test_compile_without_graph_break_or_recompilation(case):
    torch._dynamo.reset()
    module, counter = case.build(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        inputs = case.inputs(batch)
        inputs_of = [x.detach().requires_grad_() for x in inputs]
        given = outputs_and_gradients(case.run(compiled, inputs_of), inputs_of, dict(module.named_parameters()))
        assert_same(given, evaluate(case, module, inputs), 1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("attention", [False, True])
def test_compile_with_inductor(attention):
    torch._dynamo.reset()
    case = CASES["projector"]._replace(options=ATTENTION if attention else {})
    module = case.build()
    compiled = torch.compile(module, fullgraph=True)
    inputs = case.inputs()
    inputs_of = [x.detach().requires_grad_() for x in inputs]
    given = outputs_and_gradients(case.run(compiled, inputs_of), inputs_of, dict(module.named_parameters()))
    assert_same(given, evaluate(case, module, inputs), 1e-5)


@every_case
def test_export_with_a_dynamic_batch(case):
    module = case.build()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        module, tuple(case.inputs(2)), case.options,
        dynamic_shapes=([{0: batch} for _ in case.shapes], *([[None]] if 0 else [])) if 0 else None,
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2,):
        inputs = case.inputs(size)
        for given, expected in zip(case.run(loaded, inputs), case.run(module, inputs), strict=True):
            assert_close(given, expected, 1e-6)


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_file])
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
        assert_close(together[1:2], alone, 1e-6)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cropping", f"4, 6, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='cropping'"),
        ("pooling", f"4, 6, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='pooling'"),
        ("integrator", f"4, 6, grid_size={GRID}, kernel_size=(4, 2), stride=2"),
        ("sliding window", f"4, 6, grid_size={GRID}, kernel_size=(3, 4), stride=(3, 4)"),
        ("transformer", f"4, grid_size={GRID}, kernel_sizes=(2, (4, 6), (6, 8)), variant='cropping'"),
    ],
)
def test_extra_repr(name, expected):
    module = CASES[name].build(device="meta")
    assert module.extra_repr() == expected
    assert expected in repr(module)
