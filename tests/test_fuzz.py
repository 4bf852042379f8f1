"""Any fields at all either make a config whose projector runs, or are refused with SpatialTokensError."""

import json
import signal
from contextlib import contextmanager
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from tests.strategies import fields

NAMES = list(SPProjectorConfig.__dataclass_fields__)
ORDINARY = 100  # a config of sizes up to this must be taken if it is valid; a larger one may be refused for its size
GROWING = ["vision_hidden_size", "text_hidden_size", "spatial_hidden_size", "grid_size", "detail_stride"]
LARGE = [1000, 2**16, 2**31, 2**40, 2**62, 10**30]
numbers = st.integers(-2, 12) | st.sampled_from([24, 27, 100, *LARGE, -(10**30)])
atoms = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3) | st.binary(max_size=3) | st.complex_numbers()
words = st.sampled_from(["cropping", "pooling", "mlp", "linear", "Cropping", "conv", "None", "4"])
wild = st.recursive(
    atoms | words,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.frozensets(atoms, max_size=2)
    ),
    max_leaves=6,
)
near = numbers | st.tuples(numbers, numbers) | st.lists(st.integers(1, 12) | st.tuples(numbers, numbers), max_size=4) | words


@st.composite
def any_fields(draw):
    values = draw(fields())
    changed = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    grown = draw(st.just({}) | st.dictionaries(st.sampled_from(GROWING), st.sampled_from(LARGE), min_size=1, max_size=2))
    return {**values, **{name: draw(near | wild) for name in changed}, **grown}


def is_count(value):
    return type(value) is int and value > 0


def read_size(value):
    """The pair that a size stands for, or None."""
    pair = [value, value] if is_count(value) else value
    return tuple(pair) if type(pair) in (list, tuple) and len(pair) == 2 and all(map(is_count, pair)) else None


def is_valid(f):
    """What DESIGN and the config's documentation ask, said anew."""
    grid, kernels = read_size(f["grid_size"]), f["kernel_sizes"]
    if not grid or type(kernels) not in (list, tuple) or not kernels:
        return False
    windows = [read_size(kernel) for kernel in kernels]
    if not all(windows) or any(h > grid[0] or w > grid[1] for h, w in windows):
        return False
    if any(after == before or after[0] < before[0] or after[1] < before[1] for before, after in pairwise(windows)):
        return False
    if f["variant"] == "cropping":
        centered = all((grid[0] - h) % 2 == (grid[1] - w) % 2 == 0 for h, w in windows)
    else:
        centered = f["variant"] == "pooling"
    if f["detail_kernel_size"] is None:
        detail = f["detail_stride"] is None
    else:
        kernel = read_size(f["detail_kernel_size"])
        detail = kernel and kernel[0] <= grid[0] and kernel[1] <= grid[1]
        stride = (1, 1) if f["detail_stride"] is None else read_size(f["detail_stride"])
        detail = detail and stride and stride[0] <= grid[0] and stride[1] <= grid[1]
    heads = [("mlp", True), ("linear", True), ("linear", False)]
    head = type(f["spatial_head_bias"]) is bool and (f["spatial_head"], f["spatial_head_bias"]) in heads
    widths = (f[name] for name in ("vision_hidden_size", "text_hidden_size", "spatial_hidden_size"))
    patch_head = f["patch_head"] is None or (type(f["patch_head"]) is str and f["patch_head"] == "mlp")
    return bool(centered and detail and head and patch_head and all(map(is_count, widths)) and has_valid_factors(f, windows))


def has_valid_factors(f, windows):
    rank, basis = f.get("rank"), f.get("spatial_basis", "cosine")
    if type(basis) is not str or basis not in ("cosine", "learned"):
        return False
    given = f.get("frequencies")
    if rank is None:
        return given is None and basis == "cosine"
    given = [min(3, *window) for window in windows] if given is None else given
    numbers = given if type(given) in (list, tuple) else [given] * len(windows)
    if not is_count(rank) or rank > f["vision_hidden_size"] or len(numbers) != len(windows) or not all(map(is_count, numbers)):
        return False
    return all(number <= min(size) for number, size in zip(numbers, windows, strict=True))


def largest(value):
    if isinstance(value, (list, tuple)):
        return max(map(largest, value), default=0)
    return value if type(value) is int else 0


@contextmanager
def time_limit(seconds):
    """Fails what hangs."""

    def fail(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def made(make):
    """The config, or None if it is refused as it must be."""
    try:
        with time_limit(3):
            return make()
    except SpatialTokensError:
        return None


def check_runs(config, batch):
    work = sum(cost.parameters + cost.multiply_adds for cost in config.costs())
    device = "cpu" if work * (batch + 1) < 10**7 else "meta"
    projector = SPProjector.from_config(config, device=device)
    patches = torch.ones(batch, config.num_patches, config.vision_hidden_size, device=device)
    asked = config.detail_kernel_size is not None
    tokens, attention = projector(patches, return_attention=True) if asked else (projector(patches), None)
    of_patches = config.num_patches if config.patch_head else 0
    assert tokens.shape == (batch, config.num_spatial_tokens + of_patches, config.text_hidden_size)
    if asked:
        rows, columns = config.detail_grid_size
        assert attention.shape == (batch, config.num_spatial_tokens, rows * columns)
    assert projector.config == config


@given(any_fields(), st.sampled_from([0, 1, 3]))
@settings(max_examples=400)
def test_any_fields_are_run_or_refused(values, batch):
    config = made(lambda: SPProjectorConfig(**values))
    if not is_valid(values):
        assert config is None
    elif all(largest(value) <= ORDINARY for value in values.values()):
        assert config is not None
    if config is not None:
        check_runs(config, batch)


@given(any_fields())
@settings(max_examples=200)
def test_json_is_taken_or_refused_alike(values):
    try:
        text = json.dumps(values)
    except (TypeError, ValueError):
        return
    assert made(lambda: SPProjectorConfig.from_json(text)) == made(lambda: SPProjectorConfig(**values))


@given(
    any_fields(), st.lists(st.sampled_from(NAMES), max_size=3), st.dictionaries(st.sampled_from(["grid", ""]) | st.integers(), wild)
)
@settings(max_examples=200)
def test_any_dict_is_taken_or_refused(values, left_out, unknown):
    given_fields = {name: value for name, value in values.items() if name not in left_out} | unknown
    config = made(lambda: SPProjectorConfig.from_dict(given_fields))
    if unknown or {"vision_hidden_size", "text_hidden_size", "grid_size"} & set(left_out):
        assert config is None
    else:
        assert config == made(lambda: SPProjectorConfig(**given_fields))
