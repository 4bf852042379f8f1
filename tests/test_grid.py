import re
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from spatial_tokens import SpatialTokensError
from spatial_tokens.grid import (
    Window,
    as_kernel_size,
    as_size,
    check_fits,
    check_kernel_sizes,
    check_positive,
    crop_sizes,
    crop_window,
    is_positive_int,
    pool_bins,
    strided_grid_size,
    strided_windows,
)
from tests.strategies import sides, sizes, within

NOT_SIZES = [0, -1, True, 2.0, "4", None, (), (4,), (4, 4, 4), (4, 0), (4, True), (4, 2.0), [4, "4"], {4, 5}, ((4, 4), 4)]
fitting = sizes.flatmap(lambda grid: st.tuples(st.just(grid), within(grid)))


def patches(window, grid):
    """The numbers of a window's patches, row by row."""
    return torch.arange(grid[0] * grid[1]).reshape(grid)[window.top : window.bottom, window.left : window.right].flatten()


def margins(window, grid):
    return window.top, grid[0] - window.bottom, window.left, grid[1] - window.right


@given(sizes)
def test_a_size_is_an_integer_or_a_pair(size):
    assert as_size(size, "it") == as_size(list(size), "it") == size
    assert as_size(size[0], "it") == as_size((size[0], size[0]), "it") == (size[0], size[0])
    assert as_size(as_kernel_size(size, "it"), "it") == size
    assert isinstance(as_kernel_size(size, "it"), int) == (size[0] == size[1])


@pytest.mark.parametrize("value", NOT_SIZES)
@pytest.mark.parametrize("read", [as_size, as_kernel_size])
def test_what_is_no_size_is_refused(read, value):
    expected = f"stride must be a positive integer or a (height, width) pair of them, got {value!r}"
    with pytest.raises(SpatialTokensError, match=re.escape(expected)):
        read(value, "stride")


@pytest.mark.parametrize(
    ("value", "positive"), [(1, True), (24, True), (0, False), (-3, False), (True, False), (1.0, False), ("1", False)]
)
def test_positive_integers(value, positive):
    assert is_positive_int(value) is positive
    if positive:
        check_positive(width=value)
    else:
        with pytest.raises(SpatialTokensError, match=re.escape(f"width must be a positive integer, got {value!r}")):
            check_positive(height=1, width=value)


@given(sizes, st.integers(1, 4))
def test_crop_sizes_are_met_by_cropping_inward(grid, stride):
    expected, left = [], torch.empty(grid)
    while left.numel():
        expected.insert(0, tuple(left.shape))
        left = left[stride:-stride, stride:-stride]
    given_sizes = crop_sizes(grid, stride)
    assert [as_size(size, "it") for size in given_sizes] == expected
    assert check_kernel_sizes(grid, given_sizes, "cropping") == given_sizes


@pytest.mark.parametrize(
    ("grid", "stride", "expected"),
    [
        (24, 12, (24,)),
        (24, 4, (8, 16, 24)),
        (24, 2, (4, 8, 12, 16, 20, 24)),
        (24, 1, tuple(range(2, 25, 2))),
        ((12, 8), 3, ((6, 2), (12, 8))),
    ],
)
def test_crop_sizes_of_the_paper(grid, stride, expected):
    assert crop_sizes(grid, stride) == expected


@pytest.mark.parametrize("stride", [0, -2, 1.0, True, (2, 2), None])
def test_crop_sizes_refuse_a_stride(stride):
    with pytest.raises(SpatialTokensError, match=re.escape(f"stride must be a positive integer, got {stride!r}")):
        crop_sizes(24, stride)


@given(fitting)
def test_crop_window_is_the_only_one_with_equal_margins(fitted):
    grid, (height, width) = fitted
    every = (Window(*corner, height, width) for corner in product(range(grid[0] - height + 1), range(grid[1] - width + 1)))
    centered = [w for w in every if margins(w, grid)[0] == margins(w, grid)[1] and margins(w, grid)[2] == margins(w, grid)[3]]
    if centered:
        assert [crop_window(grid, (height, width))] == centered
    else:
        with pytest.raises(SpatialTokensError, match="is odd; use kernel sizes"):
            crop_window(grid, (height, width))


@pytest.mark.parametrize(
    ("grid", "kernel", "message"),
    [
        (27, 4, "grid_size (27, 27) cannot be cropped to a centered 4 x 4 window: 27 - 4 is odd; use kernel sizes 3, 7, 11, ..."),
        (5, 2, "grid_size (5, 5) cannot be cropped to a centered 2 x 2 window: 5 - 2 is odd; use kernel sizes 1, 5"),
        (
            (8, 13),
            (4, 6),
            "grid_size (8, 13) cannot be cropped to a centered 4 x 6 window: 13 - 6 is odd; use kernel sizes (4, 9), (8, 13)",
        ),
    ],
)
def test_crop_window_proposes_sizes_that_work(grid, kernel, message):
    with pytest.raises(SpatialTokensError) as caught:
        crop_window(grid, kernel)
    assert str(caught.value) == message


@given(fitting)
def test_pool_bins_are_those_that_adaptive_pooling_averages(fitted):
    grid, kernel = fitted
    one_hot = torch.eye(grid[0] * grid[1]).reshape(-1, 1, *grid)
    share = functional.adaptive_avg_pool2d(one_hot, kernel).flatten(1)  # (patch, bin): the patch's weight in the bin
    bins = pool_bins(grid, kernel)
    assert len(bins) == share.shape[1]
    for weights, window in zip(share.T, bins, strict=True):
        assert torch.equal(weights.nonzero().flatten(), patches(window, grid))
        torch.testing.assert_close(weights.max().item(), 1 / (window.height * window.width))


@given(fitting, sizes)
def test_strided_windows_are_those_that_unfold_and_conv2d_visit(fitted, stride):
    grid, kernel = fitted
    numbers = torch.arange(float(grid[0] * grid[1])).reshape(1, 1, *grid)
    expected = functional.unfold(numbers, kernel, stride=stride)[0].T  # (window, patch)
    assert torch.equal(torch.stack([patches(w, grid) for w in strided_windows(grid, kernel, stride)]), expected.long())
    visited = functional.conv2d(numbers, torch.ones(1, 1, *kernel), stride=stride).shape[2:]
    assert strided_grid_size(grid, kernel, stride) == tuple(visited)


@pytest.mark.parametrize(("kernel", "rows"), [(4, 11), (8, 9), (12, 7), (16, 5)])
def test_detail_maps_of_table_6(kernel, rows):
    assert strided_grid_size(24, kernel, 2) == (rows, rows)


@pytest.mark.parametrize("stride", [0, -1, (2, 0), 1.5, None])
@pytest.mark.parametrize("visit", [strided_grid_size, strided_windows])
def test_strides_that_are_none_are_refused(visit, stride):
    with pytest.raises(SpatialTokensError, match=r"stride must be a positive integer or a \(height, width\) pair"):
        visit(24, 4, stride)


@pytest.mark.parametrize("kernel", [(9, 4), (4, 13), 13])
@pytest.mark.parametrize(
    "ask",
    [
        crop_window,
        pool_bins,
        lambda grid, kernel: strided_grid_size(grid, kernel, 1),
        lambda grid, kernel: strided_windows(grid, kernel, 1),
        lambda grid, kernel: check_fits(grid, as_size(kernel, "it"), "kernel size"),
        lambda grid, kernel: check_kernel_sizes(grid, [kernel], "cropping"),
        lambda grid, kernel: check_kernel_sizes(grid, [kernel], "pooling"),
    ],
)
def test_a_kernel_larger_than_the_grid_is_refused(ask, kernel):
    height, width = as_size(kernel, "it")
    expected = f"kernel size {height} x {width} is larger than grid_size (8, 12); use at most 8 x 12"
    with pytest.raises(SpatialTokensError, match=re.escape(expected)):
        ask((8, 12), kernel)


@pytest.mark.parametrize("ask", [crop_window, pool_bins, lambda grid, kernel: strided_windows(grid, kernel, 1)])
@pytest.mark.parametrize(("grid", "kernel", "name"), [(0, 4, "grid_size"), ((8, "8"), 4, "grid_size"), (8, -4, "kernel_size")])
def test_grids_and_kernels_that_are_none_are_refused(ask, grid, kernel, name):
    with pytest.raises(SpatialTokensError, match=f"{name} must be a positive integer"):
        ask(grid, kernel)


@given(st.lists(sizes, min_size=1, max_size=4))
def test_kernel_sizes_must_increase(kernels):
    grows = all(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(kernels))
    if grows:
        assert [as_size(k, "it") for k in check_kernel_sizes(9, kernels, "pooling")] == kernels
    else:
        with pytest.raises(SpatialTokensError, match=r"kernel_sizes must increase, got .*; sort them and drop repeated ones"):
            check_kernel_sizes(9, kernels, "pooling")


@pytest.mark.parametrize(
    ("kernels", "variant", "message"),
    [
        ((), "cropping", "kernel_sizes must be a non-empty tuple such as (4, 8, 12), got ()"),
        (4, "cropping", "kernel_sizes must be a non-empty tuple such as (4, 8, 12), got 4"),
        ("48", "cropping", "kernel_sizes must be a non-empty tuple such as (4, 8, 12), got '48'"),
        ((4, 0), "cropping", "each of kernel_sizes must be a positive integer or a (height, width) pair of them, got 0"),
        ((4, 8), "cropped", "variant must be 'cropping' or 'pooling', got 'cropped'"),
        ((4, 7), "cropping", "cannot be cropped to a centered 7 x 7 window: 24 - 7 is odd"),
    ],
)
def test_kernel_sizes_that_are_none_are_refused(kernels, variant, message):
    with pytest.raises(SpatialTokensError, match=re.escape(message)):
        check_kernel_sizes(24, kernels, variant)


def test_kernel_sizes_of_any_parity_can_be_pooled():
    assert check_kernel_sizes(24, [3, (4, 4), [4, 7]], "pooling") == (3, 4, (4, 7))


@given(sides, sides, sides, sides)
def test_a_window_ends_after_its_last_patch(top, left, height, width):
    window = Window(top, left, height, width)
    rows, columns = range(window.top, window.bottom), range(window.left, window.right)
    assert (len(rows), len(columns)) == (height, width)


def test_integers_that_are_too_large_are_told_the_limit():
    with pytest.raises(SpatialTokensError, match="rank must be a positive integer of at most 2147483647, got 2147483648"):
        check_positive(rank=2**31)
    with pytest.raises(SpatialTokensError, match=r"grid_size must be a positive integer of at most 2147483647 or a \("):
        as_size((2**31, 1), "grid_size")
