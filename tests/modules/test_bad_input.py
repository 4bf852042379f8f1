"""Every error says what was given, what was expected, and what to do."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import DetailFeatureIntegrator, SpatialFeatureExtractor, SpatialTokensError
from spatial_tokens.modules import LinearHead, MLPHead
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor
from tests.modules.cases import CASES, every_case, every_reader

LAYOUTS = (torch.strided, torch.jagged)  # of nested tensors


def refused(message):
    return pytest.raises(SpatialTokensError, match=re.escape(message))


@every_reader
@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ([[1.0]], "patch features must be a tensor (B, N, C), got list"),
        (None, "patch features must be a tensor (B, N, C), got NoneType"),
        (torch.zeros(48, 4), "patch features must have shape (B, N, C), got (48, 4)"),
        (torch.zeros(2, 6, 8, 4), "patch features must have shape (B, N, C), got (2, 6, 8, 4)"),
        (torch.zeros(2, 48, 5), "patch features have 5 channels, this module was built for 4; got shape (2, 48, 5)"),
        (torch.zeros(2, 4, 48), "got shape (2, 4, 48), expected (B, N, C) with the channels last"),
        (torch.zeros(2, 48, 4).long(), "patch features must be floating point, got torch.int64; encode the picture first"),
        (torch.zeros(2, 48, 4).bool(), "patch features must be floating point, got torch.bool"),
        (torch.zeros(2, 48, 4).cfloat(), "patch features must be floating point, got torch.complex64"),
        (torch.zeros(2, 48, 4).bfloat16(), "patch features are torch.bfloat16, the weights torch.float32; cast one of them"),
        (torch.zeros(2, 48, 4).double(), "the weights torch.float32; cast one of them: .to(torch.float32), or use torch.autocast"),
        (torch.zeros(2, 48, 4, device="meta"), "patch features are on meta, the weights on cpu; move one of them: .to('cpu')"),
        (torch.zeros(2, 47, 4), "got 47 positions for a grid of 6 x 8 = 48 patches; resize the picture or build the module with"),
        (torch.zeros(2, 0, 4), "got 0 positions for a grid of 6 x 8 = 48 patches; resize the picture"),
        (torch.zeros(2, 49, 4), "48 patches: one too many, which looks like the class token; drop it: patches[:, 1:]"),
        (torch.zeros(2, 53, 4), "48 patches: 5 too many, which look like class and register tokens; drop them: patches[:, 5:]"),
        (torch.zeros(2, 96, 4), "got 96 positions for a grid of 6 x 8 = 48 patches; resize the picture"),
        (torch.zeros(2, 48, 4).to_sparse(), "features must be a dense tensor (B, N, C), got torch.sparse_coo; call .to_dense()"),
        (torch.zeros(2, 48, 4).to_mkldnn(), "features must be a dense tensor (B, N, C), got torch._mkldnn; call .to_dense()"),
        *((torch.nested.nested_tensor([torch.zeros(48, 4)] * 2, layout=layout),
           "patch features must be a dense tensor (B, N, C), got a nested tensor; pad and stack it") for layout in LAYOUTS),
    ],
)  # fmt: skip
def test_patch_features(case, patches, message):
    *tokens, _ = case.inputs()
    with refused(message):
        case.build()(*tokens, patches)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("tokens", "spatial tokens must be a tensor (B, K, S), got str"),
        (torch.zeros(2, 6), "spatial tokens must have shape (B, K, S), got (2, 6)"),
        (torch.zeros(2, 3, 5), "spatial tokens have 5 channels, this module was built for 6"),
        (torch.zeros(2, 3, 6).int(), "spatial tokens must be floating point, got torch.int32"),
        (torch.zeros(2, 3, 6).half(), "spatial tokens are torch.float16, the weights torch.float32"),
        (torch.zeros(2, 3, 6, device="meta"), "spatial tokens are on meta, the weights on cpu"),
        (torch.zeros(3, 3, 6), "spatial tokens are for a batch of 3, patch features for one of 2; give both of the same images"),
        (torch.zeros(1, 3, 6), "spatial tokens are for a batch of 1, patch features for one of 2"),
    ],
)
def test_spatial_tokens(tokens, message):
    case = CASES["integrator"]
    with refused(message):
        case.build()(tokens, case.inputs()[1])


@pytest.mark.parametrize("kind", [MLPHead, LinearHead])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "features must be a tensor (..., in_features), got NoneType"),
        (torch.tensor(1.0), "features must have shape (..., in_features), got ()"),
        (torch.zeros(2, 5), "features have 5 channels, this module was built for 4; got shape (2, 5)"),
        (torch.zeros(2, 4).int(), "features must be floating point, got torch.int32"),
        (torch.zeros(2, 4).half(), "features are torch.float16, the weights torch.float32; cast one of them"),
        (torch.zeros(2, 4, device="meta"), "features are on meta, the weights on cpu"),
        (torch.zeros(2, 4).to_sparse(), "features must be a dense tensor (..., in_features), got torch.sparse_coo"),
    ],
)
def test_heads(kind, given, message):
    with refused(message):
        kind(4, 5)(given)


@every_case
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.int8"),
        ({"dtype": torch.complex64}, "got torch.complex64"),
        ({"dtype": "float32"}, "got 'float32'"),
        ({"device": "gpu9"}, "cannot use the device 'gpu9': Invalid device string: 'gpu9'; give 'cpu', 'cuda' or 'meta'"),
        ({"device": 1.5}, "cannot use the device 1.5: "),
    ],
)
def test_devices_and_dtypes(case, arguments, message):
    with refused(message):
        case.build(**arguments)


def test_autocast_lifts_the_check_of_the_dtype_alone():
    module, patches = CASES["cropping"].build(), torch.zeros(2, 48, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(patches.bfloat16()).dtype == torch.bfloat16
        with refused("patch features are on meta, the weights on cpu"):
            module(patches.to("meta"))
        with refused("patch features are torch.float64, the weights torch.float32"):  # which autocast leaves as it is
            module(patches.double())


PAIR = "must be a positive integer or a (height, width) pair of them, got"
TOO_LARGE = "kernel size 8 x 8 is larger than grid_size (6, 8); use at most 6 x 8"
EXTRACTOR = (
    SpatialFeatureExtractor,
    {"vision_hidden_size": 4, "spatial_hidden_size": 6, "grid_size": (6, 8), "kernel_sizes": (2, 4)},
)
INTEGRATOR = (DetailFeatureIntegrator, {"vision_hidden_size": 4, "spatial_hidden_size": 6, "grid_size": (6, 8), "kernel_size": 2})
SLIDING = (SlidingWindowExtractor, INTEGRATOR[1])
TRANSFORMER = (TransformerExtractor, {"vision_hidden_size": 4, "grid_size": (6, 8), "kernel_sizes": (2, 4), "num_heads": 2})
MLP, LINEAR = ((kind, {"in_features": 4, "out_features": 5}) for kind in (MLPHead, LinearHead))
WIDTHS = [
    (built, name)
    for built in (EXTRACTOR, INTEGRATOR, SLIDING, TRANSFORMER, MLP, LINEAR)
    for name in (*built[1], *(["num_layers", "feedforward_size"] if built is TRANSFORMER else []))
    if name.endswith(("hidden_size", "features", "num_heads", "num_layers", "feedforward_size"))
]


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", None])
@pytest.mark.parametrize(("built", "name"), WIDTHS, ids=[f"{built[0].__name__}-{name}" for built, name in WIDTHS])
def test_widths(built, name, value):
    kind, sizes = built
    with refused(f"{name} must be a positive integer, got {value!r}"):
        kind(**{**sizes, name: value})


@pytest.mark.parametrize("built", [EXTRACTOR, INTEGRATOR, SLIDING, TRANSFORMER], ids=lambda built: built[0].__name__)
@pytest.mark.parametrize("value", [0, (6, 0), (6, -8), (6,), (6, 8, 1), 6.0, "68", None, (True, 8)], ids=repr)
def test_grids(built, value):
    kind, sizes = built
    with refused(f"grid_size {PAIR} {value!r}"):
        kind(**{**sizes, "grid_size": value})


@pytest.mark.parametrize("built", [EXTRACTOR, TRANSFORMER], ids=lambda built: built[0].__name__)
@pytest.mark.parametrize(
    ("kernel_sizes", "variant", "message"),
    [
        ((), "cropping", "kernel_sizes must be a non-empty tuple such as (4, 8, 12), got ()"),
        (4, "cropping", "kernel_sizes must be a non-empty tuple such as (4, 8, 12), got 4"),
        ((2, 0), "cropping", f"each of kernel_sizes {PAIR} 0"),
        ((2, 8), "cropping", TOO_LARGE),
        ((2, 8), "pooling", TOO_LARGE),
        ((2, 3), "cropping", "cannot be cropped to a centered 3 x 3 window: 6 - 3 is odd; use kernel sizes (2, 4), (6, 8)"),
        ((4, 2), "cropping", "kernel_sizes must increase, got (4, 2); sort them and drop repeated ones"),
        ((2, (2, 2)), "pooling", "kernel_sizes must increase, got (2, 2); sort them and drop repeated ones"),
        (((2, 6), (4, 4)), "cropping", "kernel_sizes must increase, got ((2, 6), 4)"),
        ((2, 4), "croping", "variant must be 'cropping' or 'pooling', got 'croping'"),
        ((2, 4), None, "variant must be 'cropping' or 'pooling', got None"),
        ((2, 4), ["pooling"], "variant must be 'cropping' or 'pooling', got ['pooling']"),
        ((2, 4), np.array(["cropping", "pooling"]), "variant must be 'cropping' or 'pooling', got array(['cropping', 'pooling']"),
    ],
)  # fmt: skip
def test_scales(built, kernel_sizes, variant, message):
    kind, sizes = built
    with refused(message):
        kind(**{**sizes, "kernel_sizes": kernel_sizes, "variant": variant})


@pytest.mark.parametrize("built", [INTEGRATOR, SLIDING], ids=lambda built: built[0].__name__)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kernel_size", 8, TOO_LARGE),
        ("kernel_size", 0, f"kernel_size {PAIR} 0"),
        ("kernel_size", [2], f"kernel_size {PAIR} [2]"),
        ("stride", 0, f"stride {PAIR} 0"),
        ("stride", (2, -1), f"stride {PAIR} (2, -1)"),
    ],
)
def test_kernels_and_strides(built, name, value, message):
    kind, sizes = built
    with refused(message):
        kind(**{**sizes, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_heads", 3, "num_heads must divide vision_hidden_size, got 3 and 4"),
        *(
            ("dropout", value, f"dropout must be between 0 and 1, got {value!r}")
            for value in (1.5, -0.1, float("nan"), "0.1", None)
        ),
    ],
)
def test_transformer(name, value, message):
    kind, sizes = TRANSFORMER
    with refused(message):
        kind(**{**sizes, name: value})


@pytest.mark.parametrize("value", [1, None, "False", np.array([True, False])], ids=repr)
def test_the_bias_of_a_head_is_a_bool(value):
    with refused("bias must be True or False, got "):
        LinearHead(4, 5, bias=value)


numbers = st.integers(-1, 9)
junk = numbers | st.tuples(numbers, numbers) | st.lists(numbers, max_size=3) | st.sampled_from([None, True, 2.0, "2", "pooling"])


@given(data=st.data(), built=st.sampled_from([EXTRACTOR, INTEGRATOR, SLIDING, TRANSFORMER]))
def test_any_arguments_make_a_module_that_runs_or_are_refused(data, built):
    kind, sizes = built
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(sizes)), junk, max_size=2))
    try:
        module = kind(**{**sizes, **changes})
    except SpatialTokensError as error:
        assert str(error)  # noqa: PT017
        return
    (height, width), channels = module.grid_size, module.vision_hidden_size
    tokens = [torch.zeros(1, 2, module.spatial_hidden_size)] if kind is DetailFeatureIntegrator else []
    assert module(*tokens, torch.zeros(1, height * width, channels)).isfinite().all()
