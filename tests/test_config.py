import dataclasses
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import SpatialTokensError, SPProjectorConfig, __version__
from spatial_tokens.grid import as_size, crop_sizes
from spatial_tokens.presets import PRESETS
from tests.strategies import configs

GOOD = {"vision_hidden_size": 6, "text_hidden_size": 10, "grid_size": (8, 8), "kernel_sizes": (4, 8), "detail_kernel_size": 4}
WIDTHS = ["vision_hidden_size", "text_hidden_size", "spatial_hidden_size"]
NOT_COUNTS = [0, -1, True, False, 6.0, math.nan, "6", None, (6,), 6j]
NOT_SIZES = [0, -1, True, 8.0, "8", None, (), (8,), (8, 8, 8), (8, 0), (8, True), (8, 8.0), {8, 9}, [[8, 8], 8]]


def refused(message, **changes):
    with pytest.raises(SpatialTokensError, match=re.escape(message)):
        SPProjectorConfig(**{**GOOD, **changes})


@pytest.mark.parametrize("field", dataclasses.fields(SPProjectorConfig), ids=lambda field: field.name)
def test_no_field_can_be_changed(field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(SPProjectorConfig(**GOOD), field.name, 1)


def test_defaults():
    config = SPProjectorConfig(vision_hidden_size=1024, text_hidden_size=4096, grid_size=24)
    assert config.to_dict() == {
        "vision_hidden_size": 1024,
        "text_hidden_size": 4096,
        "grid_size": (24, 24),
        "variant": "cropping",
        "kernel_sizes": (4, 8, 12, 16, 20, 24),
        "spatial_hidden_size": 512,
        "detail_kernel_size": 16,
        "detail_stride": 2,
        "spatial_head": "mlp",
        "spatial_head_bias": True,
        "patch_head": "mlp",
    }
    assert SPProjectorConfig(**{**GOOD, "detail_kernel_size": None}).detail_stride is None


def test_equal_configs_are_equal_however_they_are_written():
    plain = SPProjectorConfig(**GOOD)
    written = SPProjectorConfig(
        **{**GOOD, "grid_size": 8, "kernel_sizes": [[4, 4], (8, 8)], "detail_kernel_size": (4, 4), "detail_stride": [2, 2]}
    )
    assert written == plain
    assert len({written, plain}) == 1
    assert plain != SPProjectorConfig(**GOOD, variant="pooling")


@given(configs)
def test_token_counts(config):
    (height, width), detail = config.grid_size, config.detail_kernel_size
    assert config.num_spatial_tokens == len(config.kernel_sizes)
    assert config.num_patches == height * width
    assert config.num_tokens == len(config.kernel_sizes) + (height * width if config.patch_head else 0)
    if detail is None:
        assert config.detail_grid_size == (0, 0)
    else:
        (h, w), (down, right) = as_size(detail, "it"), as_size(config.detail_stride, "it")
        assert config.detail_grid_size == (len(range(0, height - h + 1, down)), len(range(0, width - w + 1, right)))


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("field", WIDTHS)
def test_widths_are_positive_integers(field, value):
    refused(f"{field} must be a positive integer, got {value!r}", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("grid_size", "detail_kernel_size", "detail_stride")
        for value in NOT_SIZES
        if field == "grid_size" or value is not None
    ],
)
def test_sizes_are_positive_integers_or_pairs(field, value):
    refused(f"{field} must be a positive integer or a (height, width) pair of them, got {value!r}", **{field: value})


@pytest.mark.parametrize("value", [(), [], None, 4, "4, 8", {4, 8}, {4: 8}, 4.0])
def test_kernel_sizes_are_a_sequence(value):
    refused(f"kernel_sizes must be a non-empty tuple such as (4, 8, 12), got {value!r}", kernel_sizes=value)


@pytest.mark.parametrize("value", NOT_SIZES)
def test_every_kernel_size_is_a_size(value):
    expected = f"each of kernel_sizes must be a positive integer or a (height, width) pair of them, got {value!r}"
    refused(expected, kernel_sizes=(4, value))


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("kernels", [(8, 4), (4, 4), (4, 4, 8), (2, 8, 4), ((2, 8), (4, 4)), ((4, 4), 4), ((2, 4), (4, 2))])
def test_kernel_sizes_increase(variant, kernels):
    refused("kernel_sizes must increase, got ", variant=variant, kernel_sizes=kernels)


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("kernel", [10, (10, 8), (8, 10), 24])
def test_kernel_sizes_fit_the_grid(variant, kernel):
    height, width = as_size(kernel, "it")
    expected = f"kernel size {height} x {width} is larger than grid_size (8, 8); use at most 8 x 8"
    refused(expected, variant=variant, kernel_sizes=(4, kernel))


@pytest.mark.parametrize(
    ("grid", "kernels", "reason"),
    [
        (8, (4, 7), "7 x 7 window: 8 - 7 is odd; use kernel sizes 4, 8"),
        (9, (4, 9), "4 x 4 window: 9 - 4 is odd; use kernel sizes 1, 5, 9"),
        ((8, 9), (4,), "4 x 4 window: 9 - 4 is odd; use kernel sizes (4, 5), (8, 9)"),
        ((8, 9), ((3, 3),), "3 x 3 window: 8 - 3 is odd; use kernel sizes (4, 5), (8, 9)"),
    ],
)
def test_cropped_kernels_have_the_parity_of_the_grid(grid, kernels, reason):
    refused(f"cannot be cropped to a centered {reason}", grid_size=grid, kernel_sizes=kernels)
    assert SPProjectorConfig(**{**GOOD, "grid_size": grid, "kernel_sizes": kernels, "variant": "pooling"}).kernel_sizes


def test_the_parity_error_in_full():
    with pytest.raises(SpatialTokensError) as caught:
        SPProjectorConfig(**{**GOOD, "grid_size": (27, 27)})
    assert str(caught.value) == (
        "grid_size (27, 27) cannot be cropped to a centered 4 x 4 window: 27 - 4 is odd; use kernel sizes 3, 7, 11, ..."
    )


@pytest.mark.parametrize(
    "value", ["crop", "", None, 0, True, ("cropping",), ["pooling"], np.array(["cropping", "pooling"])], ids=repr
)
def test_variants(value):
    refused(f"variant must be 'cropping' or 'pooling', got {value!r}", variant=value)


@pytest.mark.parametrize("kernel", [10, (10, 4), (4, 10)])
def test_the_detail_kernel_fits_the_grid(kernel):
    height, width = as_size(kernel, "it")
    refused(f"detail_kernel_size {height} x {width} is larger than grid_size (8, 8); use at most 8 x 8", detail_kernel_size=kernel)


@pytest.mark.parametrize("stride", [1, 2, (2, 2), "2", 0])
def test_no_detail_stride_without_a_detail_kernel(stride):
    refused(f"detail_stride is {stride!r} but detail_kernel_size is None", detail_kernel_size=None, detail_stride=stride)


@pytest.mark.parametrize("value", ["MLP", "", None, True, 1, ["mlp"], np.array(["mlp", "linear"])], ids=repr)
def test_spatial_heads(value):
    refused(f"spatial_head must be 'mlp' or 'linear', got {value!r}", spatial_head=value)


@pytest.mark.parametrize("value", [0, 1, None, "True", 1.0])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_head_bias_is_a_bool(head, value):
    refused(f"spatial_head_bias must be True or False, got {value!r}", spatial_head=head, spatial_head_bias=value)


def test_the_mlp_head_has_biases():
    refused("spatial_head_bias=False needs spatial_head='linear'; the paper's MLP has biases", spatial_head_bias=False)
    assert SPProjectorConfig(**GOOD, spatial_head="linear", spatial_head_bias=False).spatial_head_bias is False


@pytest.mark.parametrize("changes", [{"kernel_sizes": (510,)}, {"variant": "pooling", "kernel_sizes": (511,)}])
def test_a_config_is_checked_without_listing_its_patches(changes):
    tracemalloc.start()
    try:
        SPProjectorConfig(**{**GOOD, "grid_size": 511, **changes})
    except SpatialTokensError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200_000


@given(configs)
def test_json_round_trip(config):
    text = config.to_json()
    back = SPProjectorConfig.from_json(text)
    assert back == config
    assert back.to_json() == text
    assert {name: type(value) for name, value in back.to_dict().items()} == {
        name: type(value) for name, value in config.to_dict().items()
    }
    assert SPProjectorConfig.from_dict(config.to_dict()) == config


def test_json_is_plain_and_ends_in_a_newline():
    text = SPProjectorConfig(**{**GOOD, "kernel_sizes": (4, (6, 8))}).to_json()
    assert json.loads(text)["kernel_sizes"] == [4, [6, 8]]
    assert text.endswith("}\n")


@pytest.mark.parametrize("missing", ["vision_hidden_size", "text_hidden_size", "grid_size"])
def test_missing_fields(missing):
    values = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(SpatialTokensError, match=f"missing field {missing}; an SPProjectorConfig needs them"):
        SPProjectorConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "proposal"),
    [("kernel_size", " (did you mean 'kernel_sizes'?)"), ("grid", " (did you mean 'grid_size'?)"), ("xyzzy", ""), ("", "")],
)
def test_unknown_fields(name, proposal):
    expected = f"unknown field {name!r}{proposal}; known: vision_hidden_size, text_hidden_size, grid_size, variant, "
    for read in (
        lambda: SPProjectorConfig.from_dict({**GOOD, name: 1}),
        lambda: SPProjectorConfig.from_json(json.dumps({**GOOD, name: 1})),
        lambda: SPProjectorConfig.from_preset("llava-sp-cropping", **{name: 1}),
    ):
        with pytest.raises(SpatialTokensError, match=re.escape(expected)):
            read()


def test_repeated_fields():
    text = json.dumps(GOOD).replace('"text_hidden_size"', '"vision_hidden_size"')
    with pytest.raises(SpatialTokensError, match="the config gives 'vision_hidden_size' twice; keep one"):
        SPProjectorConfig.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "{'grid_size': 8}", "nope", json.dumps(GOOD)[:-1], json.dumps(GOOD) + "}", "[" * 99_999])
def test_text_that_is_not_json(text):
    with pytest.raises(SpatialTokensError, match="the config is not valid JSON: "):
        SPProjectorConfig.from_json(text)


@pytest.mark.parametrize("values", [None, [], [["grid_size", 8]], 8, "grid_size", True, math.nan])
def test_json_that_is_not_an_object(values):
    with pytest.raises(SpatialTokensError, match="an SPProjectorConfig is read from a dict of fields, got "):
        SPProjectorConfig.from_json(json.dumps(values))


@pytest.mark.parametrize("values", [None, 8, list(GOOD), {8: 8}, {**GOOD, None: 1}])
def test_dicts_of_fields(values):
    with pytest.raises(SpatialTokensError, match="an SPProjectorConfig is read from a dict of fields, got "):
        SPProjectorConfig.from_dict(values)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_no_text_raises_anything_else(text):
    with pytest.raises(SpatialTokensError):
        SPProjectorConfig.from_json(text)


@pytest.mark.parametrize("digits", ["9" * 5000, "-" + "9" * 5000])
def test_numbers_too_long_for_python_are_refused(digits):
    with pytest.raises(SpatialTokensError):
        SPProjectorConfig.from_json(json.dumps(GOOD).replace("10", digits))
    refused("text_hidden_size", text_hidden_size=-(10**5000))


LLAVA = {"vision_hidden_size": 1024, "text_hidden_size": 4096, "grid_size": (24, 24), "spatial_hidden_size": 512}
SIX = (4, 8, 12, 16, 20, 24)
FACTORS = {"rank": 128, "frequencies": 3}
EXPECTED_PRESETS = {  # REFERENCE sections 2, 4, 5 and tables 4, 6, 7: variant, kernels, detail kernel, head, its bias, the rest
    "llava-sp-cropping": ("cropping", SIX, 16, "linear", True, {}),
    "llava-sp-pooling": ("pooling", SIX, None, "linear", False, {}),
    "llava-sp-pooling-dfi": ("pooling", SIX, 16, "linear", False, {}),
    "llava-sp-1-token": ("cropping", (24,), None, "mlp", True, {}),
    "llava-sp-3-tokens": ("cropping", (8, 16, 24), None, "mlp", True, {}),
    "llava-sp-12-tokens": ("cropping", (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24), None, "mlp", True, {}),
    "siglip-l-16-384": ("cropping", SIX, 16, "mlp", True, {}),
    "internvit-300m-448": (
        "cropping",
        (12, 16, 20, 24, 28, 32),
        16,
        "mlp",
        True,
        {"text_hidden_size": 896, "grid_size": (32, 32)},
    ),
    "factorized-cropping": ("cropping", SIX, 16, "mlp", True, FACTORS),
    "factorized-pooling": ("pooling", SIX, 16, "mlp", True, FACTORS),
    "factorized-siglip-so400m": (
        "cropping",
        (7, 11, 15, 19, 23, 27),
        16,
        "mlp",
        True,
        {**FACTORS, "vision_hidden_size": 1152, "grid_size": (27, 27), "rank": 144},
    ),
    "factorized-qwen2.5-vl": (
        "cropping",
        SIX,
        16,
        "mlp",
        True,
        {**FACTORS, "vision_hidden_size": 1280, "text_hidden_size": 3584, "rank": 160, "patch_head": None},
    ),
}


def test_there_are_no_other_presets():
    assert list(PRESETS) == list(EXPECTED_PRESETS)


@pytest.mark.parametrize("name", EXPECTED_PRESETS)
def test_presets_are_the_papers(name):
    variant, kernels, detail, head, bias, rest = EXPECTED_PRESETS[name]
    config = SPProjectorConfig.from_preset(name)
    assert config.to_dict() == {
        **LLAVA,
        "variant": variant,
        "kernel_sizes": kernels,
        "detail_kernel_size": detail,
        "detail_stride": None if detail is None else 2,
        "spatial_head": head,
        "spatial_head_bias": bias,
        "patch_head": "mlp",
        **rest,
    }
    assert SPProjectorConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("name", "stride", "tokens"),
    [("llava-sp-1-token", 12, 1), ("llava-sp-3-tokens", 4, 3), ("llava-sp-cropping", 2, 6), ("llava-sp-12-tokens", 1, 12)],
)
def test_presets_of_table_4_crop_inward_by_one_stride(name, stride, tokens):
    config = SPProjectorConfig.from_preset(name)
    assert config.kernel_sizes == crop_sizes(config.grid_size, stride)
    assert (config.num_spatial_tokens, config.num_patches, config.num_tokens) == (tokens, 576, 576 + tokens)


def test_presets_take_fields_of_your_own():
    given_fields = {"text_hidden_size": 5120, "detail_kernel_size": 8, "detail_stride": 4}
    config = SPProjectorConfig.from_preset("llava-sp-cropping", **given_fields)
    assert config.to_dict() == {**SPProjectorConfig.from_preset("llava-sp-cropping").to_dict(), **given_fields}
    assert SPProjectorConfig.from_preset("llava-sp-cropping").text_hidden_size == 4096
    with pytest.raises(SpatialTokensError, match=re.escape("grid_size (27, 27) cannot be cropped")):
        SPProjectorConfig.from_preset("llava-sp-cropping", grid_size=27)


@pytest.mark.parametrize(
    ("name", "proposal"), [("llava-sp-croping", " (did you mean 'llava-sp-cropping'?)"), ("", ""), (None, ""), (["a"], "")]
)
def test_unknown_presets(name, proposal):
    with pytest.raises(SpatialTokensError, match=re.escape(f"unknown preset {name!r}{proposal}; known: {', '.join(PRESETS)}")):
        SPProjectorConfig.from_preset(name)


@pytest.mark.parametrize("grid_size", [(513, 512), (2**18, 2), 2**31 - 1])
def test_grids_larger_than_any_encoder_gives(grid_size):
    refused("patches; at most 262,144 are possible", grid_size=grid_size, variant="pooling", kernel_sizes=(1,))


def test_the_file_says_which_version_wrote_it():
    config = SPProjectorConfig(**GOOD)
    assert json.loads(config.to_json()) == {"library": f"spatial-tokens {__version__}", **json.loads(json.dumps(config.to_dict()))}
    assert SPProjectorConfig.from_json(json.dumps(GOOD)) == config, "files of 0.1 say nothing"
    for version in ("99.0.0", "99", "0.0.1", "99.1.dev2+local"):
        assert SPProjectorConfig.from_json(json.dumps({"library": f"spatial-tokens {version}", **GOOD})) == config


@pytest.mark.parametrize("version", ["99", "99.0.1", f"{__version__}.1", "99.1.dev2+local"])
@pytest.mark.parametrize("changes", [{"rotation": 3}, {"variant": "spiral"}, {"spatial_hidden_size": None}])
def test_a_file_of_a_newer_version_is_named_as_such(version, changes):
    with pytest.raises(SpatialTokensError, match="|".join([*changes, *map(str, changes.values())])) as caught:
        SPProjectorConfig.from_json(json.dumps({"library": f"spatial-tokens {version}", **GOOD, **changes}))
    start = f"written by spatial-tokens {version}, newer than this spatial-tokens {__version__}; upgrade the library: "
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("library", [f"spatial-tokens {__version__}", "spatial-tokens 0.0.9"])
def test_a_mistake_in_a_file_of_this_version_is_not_the_versions(library):
    with pytest.raises(SpatialTokensError, match=r"^unknown field 'rotation'"):
        SPProjectorConfig.from_json(json.dumps({"library": library, **GOOD, "rotation": 3}))


@pytest.mark.parametrize(
    "library", [3, None, [], {}, "", "transformers 5.0", "spatial-tokens", "spatial-tokens ٣", "spatial-tokens " + "9" * 99]
)
def test_what_no_version_writes_is_no_version(library):
    with pytest.raises(SpatialTokensError, match=r"^unknown field 'library'"):
        SPProjectorConfig.from_json(json.dumps({"library": library, **GOOD}))
