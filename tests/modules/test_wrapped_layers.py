"""Layers that an adapter, a quantizer or an offloader wrapped say for themselves what dtype they take."""

import pytest
import torch
from torch import nn

from spatial_tokens import SpatialTokensError
from tests.modules.cases import CASES
from tests.tolerances import assert_close, rounding


class LowRank(nn.Module):
    """The layer in another dtype inside, and a product of two small ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.bfloat16()
        self.down = nn.Linear(base.in_features, 1, bias=False)
        self.up = nn.Linear(1, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x.bfloat16()).to(x.dtype) + self.up(self.down(x))


def by_module(layer):
    return LowRank(layer)


def by_hooks(layer):
    layer.bfloat16().register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    layer.register_forward_hook(lambda _, __, output: output.float())
    return layer


def by_forward(layer):
    forward = layer.bfloat16().forward
    layer.forward = lambda x: forward(x.bfloat16()).float()
    return layer


class Bfloat16Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x.bfloat16()).to(x.dtype)


def by_class(layer):
    layer.bfloat16().__class__ = Bfloat16Linear
    return layer


FIRST = {
    "cropping": ["kernels.0"],
    "pooling": ["kernels.0"],
    "integrator": ["detail_kernel", "query_projector.1"],
    "projector": ["extractor.kernels.0", "integrator.detail_kernel", "integrator.query_projector.1"],
    "projector, tokens alone": ["extractor.kernels.0"],
    "projector without DFI": ["extractor.kernels.0"],
    "factorized cropping": ["kernels.channel_projection", "kernels.cores.0"],
    "factorized pooling": ["kernels.cores.2"],
    "learned maps": ["kernels.channel_projection", "kernels.cores.1"],
    "factorized integrator": ["detail_kernel.channel_projection", "detail_kernel.cores.0", "query_projector.1"],
    "factorized projector": ["extractor.kernels.channel_projection", "extractor.kernels.cores.0"],
    "sliding window": ["kernels.0"],
    "transformer": ["transformers.0.encoder.layers.0.linear1"],
}


@pytest.mark.parametrize("wrap", [by_module, by_hooks, by_forward, by_class])
@pytest.mark.parametrize("name", FIRST)
def test_wrapped_layers_of_another_dtype_run(name, wrap):
    case = CASES[name]
    module, inputs = case.build(), case.inputs()
    expected = case.run(module, inputs)
    for layer in FIRST[name]:
        module.set_submodule(layer, wrap(module.get_submodule(layer)))
    for given, exact in zip(case.run(module, inputs), expected, strict=True):
        assert_close(given, exact, rounding(torch.bfloat16, 10))


@pytest.mark.parametrize("name", FIRST)
def test_other_mistakes_are_still_named(name):
    case = CASES[name]
    module = case.build()
    for layer in FIRST[name]:
        by_hooks(module.get_submodule(layer))
    *tokens, patches = case.inputs()
    with pytest.raises(SpatialTokensError, match="patch features have 3 channels, this module was built for 4"):
        module(*tokens, patches[..., :3])
