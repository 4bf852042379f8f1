"""The projector against the reference: every variant small, the paper's full size once."""

import sys
from functools import partial

import pytest
import torch

from spatial_tokens import SPProjector, SPProjectorConfig
from tests import reference
from tests.modules.checks import assert_equals_reference
from tests.tolerances import assert_close, rounding

VARIANTS = pytest.mark.parametrize("variant", ["cropping", "pooling"])
DETAIL = pytest.mark.parametrize("detail", [None, 16], ids=["no DFI", "DFI"])
HEADS = pytest.mark.parametrize(
    ("head", "bias"), [("mlp", True), ("linear", True), ("linear", False)], ids=["mlp", "linear", "linear without bias"]
)
SIX = (4, 8, 12, 16, 20, 24)
TOKENS = pytest.mark.parametrize("kernel_sizes", [(24,), (8, 16, 24), SIX, tuple(range(2, 25, 2))], ids=["1", "3", "6", "12"])
SMALL = {"vision_hidden_size": 4, "spatial_hidden_size": 6, "text_hidden_size": 8, "grid_size": (24, 24), "kernel_sizes": SIX}


def assert_parity(fields, device="cpu", dtype=torch.float32, **options):
    config = SPProjectorConfig(**fields)
    projector = SPProjector.from_config(config, device=device, dtype=dtype)
    patches = torch.randn(2, config.num_patches, config.vision_hidden_size, device=device, dtype=dtype)
    if config.detail_kernel_size:
        options["return_attention"] = True
    assert_equals_reference(projector, partial(reference.projector, **fields), patches, **options)


@TOKENS
@HEADS
@DETAIL
@VARIANTS
def test_output_attention_and_gradients_in_float32(variant, detail, head, bias, kernel_sizes):
    heads = {"spatial_head": head, "spatial_head_bias": bias}
    assert_parity({**SMALL, "variant": variant, "kernel_sizes": kernel_sizes, "detail_kernel_size": detail, **heads})


@pytest.mark.gpu
@DETAIL
@VARIANTS
def test_output_attention_and_gradients_on_a_gpu(variant, detail):
    assert_parity({**SMALL, "variant": variant, "detail_kernel_size": detail}, device="cuda")


@DETAIL
@VARIANTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_off_by_rounding_alone(dtype, variant, detail):
    widths = {"vision_hidden_size": 16, "spatial_hidden_size": 32, "text_hidden_size": 32}
    fields = {**SMALL, **widths, "variant": variant, "detail_kernel_size": detail}
    # The reference has the same rounded weights and input. From patches to tokens lie ten operations whose results are rounded:
    # kernel, norm, projection, scale, scores, softmax, look-up and the three of a head. The way back has as many.
    assert_parity(fields, dtype=dtype, tolerance=rounding(dtype, 10))


@HEADS
@pytest.mark.parametrize("detail", [None, (2, 3)], ids=["no DFI", "DFI"])
@pytest.mark.parametrize(
    ("variant", "kernel_sizes"), [("cropping", ((2, 1), (4, 3))), ("pooling", (1, (3, 2), (4, 3)))], ids=["cropping", "pooling"]
)
def test_gradcheck(variant, kernel_sizes, detail, head, bias):
    config = SPProjectorConfig(
        vision_hidden_size=2, spatial_hidden_size=3, text_hidden_size=2, grid_size=(4, 3), variant=variant,
        kernel_sizes=kernel_sizes, detail_kernel_size=detail, spatial_head=head, spatial_head_bias=bias,
    )  # fmt: skip
    projector = SPProjector.from_config(config, dtype=torch.float64)
    names = dict(projector.named_parameters())

    def run(patches, *parameters):
        parameters = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(projector, parameters, (patches,), {"return_attention": detail is not None})

    patches = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (patches, *projector.parameters()))


@torch.no_grad()
def test_the_paper_size_within_8_gb():
    resource = pytest.importorskip("resource")
    config = SPProjectorConfig(vision_hidden_size=1024, text_hidden_size=4096, grid_size=(24, 24))
    projector = SPProjector.from_config(config, device="meta").to_empty(device="cpu")
    for parameter in projector.parameters():
        parameter.uniform_(-1, 1).mul_(parameter.shape[-1] ** -0.5)
    patches = torch.randn(1, 576, 1024)
    spatial_tokens = projector.extractor(patches)
    detailed_tokens = projector.integrator(spatial_tokens, patches)
    tokens, attention = projector(patches, return_attention=True)

    def by_chunks(convolve, kernel):
        """In float64, of which a whole weight would not fit; freed one by one."""
        return torch.cat([convolve(some.double()) for some in kernel.weight.split(64)], dim=-1)

    exact, expected = patches.double(), []
    for kernel, size in zip(projector.extractor.kernels, config.kernel_sizes, strict=True):
        window = reference.scale(reference.as_map(exact, 24), size, "cropping")
        expected.append(by_chunks(lambda w, x=window, k=size: reference.convolve(x, w, k).flatten(1), kernel))
        assert_close(spatial_tokens[:, len(expected) - 1], expected[-1])

    sizes = {"grid_size": 24, "kernel_size": 16, "stride": 2}
    detail = by_chunks(lambda w: reference.detail_map(w, exact, **sizes), projector.integrator.detail_kernel)
    small = {name: parameter.double() for name, parameter in projector.named_parameters() if "kernel" not in name}
    expected, expected_attention = reference.attend(reference.part(small, "integrator."), torch.stack(expected, 1), detail)
    assert_close(detailed_tokens, expected)
    assert_close(attention, expected_attention)
    assert_close(tokens[:, :6], reference.head(reference.part(small, "spatial_head."), expected))
    assert_close(tokens[:, 6:], reference.head(reference.part(small, "patch_head."), exact))

    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 8e9
