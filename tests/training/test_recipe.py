"""The recipe against the paper's table 11, and its schedule against transformers'."""

import dataclasses

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING, STAGES, LoRA, Parts, Stage, freeze, parameter_groups, schedule


def test_stages_are_the_papers():
    first, second = ALIGNMENT, INSTRUCTION_TUNING
    assert (first.global_batch_size, first.projector_learning_rate, first.lora) == (256, 1e-3, None)
    assert (second.global_batch_size, second.projector_learning_rate) == (128, 2e-5)
    assert (second.lora.rank, second.lora.alpha, second.lora.learning_rate) == (128, 256, 2e-4)
    for stage in (first, second):
        assert (stage.warmup_ratio, stage.weight_decay, stage.num_epochs) == (0.03, 0, 1)
    assert dict(STAGES) == {"alignment": first, "instruction_tuning": second}


@pytest.mark.parametrize(
    ("field", "value"),
    [("global_batch_size", 0), ("projector_learning_rate", -1e-3), ("projector_learning_rate", "2e-5"),
     ("warmup_ratio", 1.5), ("weight_decay", float("nan")), ("num_epochs", None), ("num_epochs", 0),
     ("projector_learning_rate", float("inf")), pytest.param("projector_learning_rate", 10**400, id="huge"),
     ("weight_decay", True), ("kernel_learning_rate", -1e-5)],
)  # fmt: skip
def test_a_stage_refuses_numbers_out_of_range(field, value):
    with pytest.raises(SpatialTokensError, match=field):
        dataclasses.replace(ALIGNMENT, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", float("inf")), ("dropout", float("nan")), ("learning_rate", -1), ("rank", 2.0)]
)
def test_a_lora_refuses_numbers_out_of_range(field, value):
    with pytest.raises(SpatialTokensError, match=f"^{field} must be"):
        LoRA(**{field: value})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector, self.language, self.adapter, self.vision = (nn.Linear(3, 3) for _ in range(4))


def test_only_the_parts_train():
    model = Model()
    freeze(model, Parts([model.projector], [model.adapter]))
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"projector", "adapter"}


def test_groups_are_those_of_the_parts():
    model = Model()
    freeze(model, Parts([model.projector], [model.adapter]))
    groups = parameter_groups(Parts([model.projector], [model.adapter]), INSTRUCTION_TUNING)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("projector", 2e-5, 0), ("lora", 2e-4, 0)]
    assert [list(map(id, g["params"])) for g in groups] == [
        [id(model.projector.weight), id(model.projector.bias)],
        [id(model.adapter.weight), id(model.adapter.bias)],
    ]


def test_weight_decay_leaves_biases_alone():
    head = nn.Linear(3, 3)
    groups = parameter_groups(Parts([head]), dataclasses.replace(ALIGNMENT, weight_decay=0.1))
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0, [1])]


def test_kernels_have_a_rate_of_their_own_where_a_stage_names_one():
    kernel, head, adapter = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
    parts = Parts([nn.Sequential(kernel, head)], [adapter], [kernel])
    common = parameter_groups(parts, INSTRUCTION_TUNING)
    assert [(g["name"], g["lr"], len(g["params"])) for g in common] == [("projector", 2e-5, 3), ("lora", 2e-4, 2)]
    stage = dataclasses.replace(INSTRUCTION_TUNING, kernel_learning_rate=1e-6, weight_decay=0.1)
    found = [(g["name"], g["lr"], g["weight_decay"], list(map(id, g["params"]))) for g in parameter_groups(parts, stage)]
    assert found == [
        ("kernels", 1e-6, 0.1, [id(kernel.weight)]),
        ("projector", 2e-5, 0.1, [id(head.weight)]),
        ("projector", 2e-5, 0.0, [id(head.bias)]),
        ("lora", 2e-4, 0.1, [id(adapter.weight)]),
        ("lora", 2e-4, 0.0, [id(adapter.bias)]),
    ]


def test_a_rate_for_kernels_needs_kernels_of_the_projector():
    head, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(SpatialTokensError, match="has a learning rate for kernels, but no kernel requires a gradient"):
        parameter_groups(Parts([head]), dataclasses.replace(ALIGNMENT, kernel_learning_rate=1e-5))
    with pytest.raises(SpatialTokensError, match="a parameter of kernels is not the projector's"):
        parameter_groups(Parts([head], kernels=[other]), ALIGNMENT)


def test_a_shared_parameter_is_given_once():
    head = nn.Linear(3, 3)
    (group,) = parameter_groups(Parts([head, nn.Sequential(head)]), ALIGNMENT)
    assert len(group["params"]) == 2


def test_groups_refuse_what_they_cannot_place():
    head, frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(SpatialTokensError, match="in another part"):
        parameter_groups(Parts([head], [head]), INSTRUCTION_TUNING)
    with pytest.raises(SpatialTokensError, match="no parameter of that part requires a gradient"):
        parameter_groups(Parts([frozen]), ALIGNMENT)
    with pytest.raises(SpatialTokensError, match="no parameter of that part requires a gradient"):
        parameter_groups(Parts([head]), INSTRUCTION_TUNING)
    with pytest.raises(SpatialTokensError, match="no learning rate for lora"):
        parameter_groups(Parts([head], [nn.Linear(2, 2)]), ALIGNMENT)


def test_parts_are_lists_of_modules():
    for modules in (nn.Linear(3, 3), [None], "projector"):
        with pytest.raises(SpatialTokensError, match="projector must be a list of modules, got"):
            Parts(modules)


def test_quantized_weights_cannot_be_trained():
    model = Model()
    model.projector.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SpatialTokensError, match="weight of a Linear is quantized and cannot be trained"):
        freeze(model, Parts([model.projector]))
    assert model.vision.weight.requires_grad


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_a_schedule_needs_a_number_of_steps(steps):
    optimizer = torch.optim.SGD(parameter_groups(Parts([nn.Linear(1, 1)]), ALIGNMENT))
    with pytest.raises(SpatialTokensError, match="num_training_steps must be a positive integer"):
        schedule(optimizer, ALIGNMENT, steps)


@pytest.mark.parametrize("steps", [1, 7, 33, 100, 2181])
def test_schedule_is_transformers(steps):
    transformers = pytest.importorskip("transformers")
    stage = Stage(name="any", global_batch_size=1, projector_learning_rate=0.5, lora=LoRA(learning_rate=0.25))
    rates = []
    for make in (
        lambda o: schedule(o, stage, steps),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, -(-3 * steps // 100), steps),
    ):
        optimizer = torch.optim.SGD(parameter_groups(Parts([nn.Linear(1, 1)], [nn.Linear(1, 1)]), stage))
        scheduler = make(optimizer)
        taken = []
        for _ in range(steps):
            taken.append(scheduler.get_last_lr())
            optimizer.step()
            scheduler.step()
        rates.append(torch.tensor([*taken, scheduler.get_last_lr()], dtype=torch.float64))
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-12, atol=1e-12)
    if steps > 33:
        assert rates[0].max(0).values.tolist() == [0.5, 0.25]


def test_any_optimizer_learns_with_it():
    torch.manual_seed(0)
    head = nn.Linear(4, 1)
    inputs = torch.randn(64, 4)
    targets = inputs.sum(1, keepdim=True)
    stage = dataclasses.replace(ALIGNMENT, projector_learning_rate=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(Parts([head]), stage))
    scheduler = schedule(optimizer, stage, 200)
    for _ in range(200):
        loss = (head(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss < 1e-3
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
