import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.presets import PRESETS
from tests.strategies import configs

MIB = 2**20


def costs_of(name, **changes):
    return {cost.part: cost for cost in SPProjectorConfig.from_preset(name, **changes).costs()}


def counted_parameters(projector):
    """The parameters of each part, counted on the modules."""
    numbers = {name: parameter.numel() for name, parameter in projector.named_parameters()}
    starts = {
        "extractor": "extractor.",
        "integrator detail map": "integrator.detail_kernel.",
        "integrator attention": ("integrator.query_", "integrator.key_", "integrator.value_"),
        "spatial head": "spatial_head.",
        "patch head": "patch_head.",
    }
    parts = {part: sum(n for name, n in numbers.items() if name.startswith(start)) for part, start in starts.items()}
    assert sum(parts.values()) == sum(numbers.values())
    return {part: number for part, number in parts.items() if number}


def counted_multiply_adds(projector, patches):
    """The multiply-adds of each part, as torch counts them while the projector runs."""
    projector(patches)  # which makes the weights of a grid's patches, once
    with FlopCounterMode(display=False) as counter:
        projector(patches)
    work = {name.removeprefix("SPProjector."): sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    parts = {"extractor": work["extractor"], "spatial head": work["spatial_head"]}
    if projector.patch_head is not None:
        parts["patch head"] = work["patch_head"]
    if projector.integrator is not None:
        parts["integrator detail map"] = work["integrator.detail_kernel"]
        parts["integrator attention"] = work["integrator"] - work["integrator.detail_kernel"]
    assert sum(parts.values()) == work["Global"]
    return parts


def check_costs(config, device):
    projector = SPProjector.from_config(config, device=device)
    patches = torch.zeros(1, config.num_patches, config.vision_hidden_size, device=device)
    costs = config.costs()
    assert {cost.part: cost.parameters for cost in costs} == counted_parameters(projector)
    if config.spatial_basis == "cosine":  # learned maps are laid on the patches in every call, which is not work of an image
        assert {cost.part: cost.multiply_adds for cost in costs} == counted_multiply_adds(projector, patches)
    assert config.num_parameters == sum(parameter.numel() for parameter in projector.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_costs_of_a_preset_are_those_of_its_modules(name):
    check_costs(SPProjectorConfig.from_preset(name), "meta")


@given(configs)
@settings(max_examples=50)
def test_costs_are_those_of_the_modules(config):
    check_costs(config, "cpu")


def test_sizes_of_the_paper():
    costs = costs_of("siglip-l-16-384")  # the paper's six kernels, detail kernel 16 and two MLPs 1024 -> 4096 -> 4096
    extractor, detail, attention, *heads = costs.values()
    assert extractor.parameters == 1456 * 1024 * 512 == pytest.approx(763.4e6, rel=1e-4)
    assert extractor.bytes == 1456 * MIB
    assert detail.parameters == 256 * 1024 * 512 == pytest.approx(134.2e6, rel=1e-3)
    assert detail.bytes == 256 * MIB
    assert attention.parameters == 3 * (512 * 512 + 512 + 2 * 512)
    assert sum(head.parameters for head in heads) == pytest.approx(42.0e6, rel=1e-3)
    assert sum(head.bytes for head in heads) == pytest.approx(80 * MIB, rel=1e-3)
    assert extractor.bytes + sum(head.bytes for head in heads) == pytest.approx(1536 * MIB, rel=1e-4)


def test_multiply_adds_of_the_paper():
    costs = costs_of("siglip-l-16-384")
    assert costs["extractor"].multiply_adds == pytest.approx(0.76e9, rel=0.01)
    assert costs["integrator detail map"].multiply_adds == pytest.approx(3.36e9, rel=0.01)
    assert costs["patch head"].multiply_adds == pytest.approx(12.1e9, rel=0.01)


@pytest.mark.parametrize("value", [0, -2, 2.0, "2", None])
def test_bytes_of_a_parameter_are_positive(value):
    with pytest.raises(SpatialTokensError, match=f"bytes_per_parameter must be a positive integer, got {value!r}"):
        SPProjectorConfig.from_preset("siglip-l-16-384").costs(bytes_per_parameter=value)


def test_bytes_follow_the_dtype():
    config = SPProjectorConfig.from_preset("llava-sp-cropping")
    for size in (1, 2, 4):
        assert all(cost.bytes == size * cost.parameters for cost in config.costs(bytes_per_parameter=size))
    assert config.costs() == config.costs(bytes_per_parameter=2)


def test_parts_are_those_that_the_projector_has():
    assert list(costs_of("llava-sp-pooling")) == ["extractor", "spatial head", "patch head"]
    with_detail = ["extractor", "integrator detail map", "integrator attention", "spatial head", "patch head"]
    assert list(costs_of("llava-sp-pooling-dfi")) == with_detail


@pytest.mark.parametrize("name", PRESETS)
def test_counting_allocates_nothing(name):
    config = SPProjectorConfig.from_preset(name)
    tracemalloc.start()
    config.costs()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000
