"""The geometry of a patch grid, in integers: windows, bins, strides and counts.

A grid has `(height, width)` patches. A kernel size is an integer (a square) or a `(height, width)` pair. The paper's grids and
kernels are square (LLaVA-SP, section 3.2); rectangular ones follow the same rules side by side.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

from spatial_tokens.checks import check_choice
from spatial_tokens.errors import SpatialTokensError, shown

Size = tuple[int, int]
KernelSize = int | tuple[int, int]
Variant = Literal["cropping", "pooling"]
SpatialBasis = Literal["cosine", "learned"]

LARGEST = 2**31 - 1
RANK, FREQUENCIES = 128, 3  # of factorized kernels, by default


class Window(NamedTuple):
    """A rectangle of patches: rows `[top, bottom)` and columns `[left, right)`."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width


def as_size(value: Any, name: str) -> Size:
    """Reads an integer or a pair as `(height, width)`.

    Raises:
        SpatialTokensError: If it is anything but one or two positive integers.

    Examples:
        >>> as_size(24, "grid_size"), as_size([16, 24], "grid_size")
        ((24, 24), (16, 24))
    """
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_positive_int, pair)):
        wanted = _positive_integer(*pair) if isinstance(pair, (tuple, list)) else _positive_integer()
        raise SpatialTokensError(f"{name} must be {wanted} or a (height, width) pair of them, got {shown(value)}")
    return pair[0], pair[1]


def as_kernel_size(value: Any, name: str) -> KernelSize:
    """The canonical form of a kernel size: an integer where it is square, else a pair.

    Examples:
        >>> as_kernel_size((4, 4), "kernel_size"), as_kernel_size([4, 6], "kernel_size")
        (4, (4, 6))
    """
    height, width = as_size(value, name)
    return height if height == width else (height, width)


def is_positive_int(value: Any) -> TypeGuard[int]:
    """Whether `value` is an integer from 1 to 2**31 - 1; a bool is not an integer here."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _positive_integer(*given: Any) -> str:
    too_large = any(isinstance(value, int) and value > LARGEST for value in given)
    return f"a positive integer of at most {LARGEST}" if too_large else "a positive integer"


def check_positive(**values: Any) -> None:
    """Raises SpatialTokensError, with its name, if a value is not a positive integer."""
    for name, value in values.items():
        if not is_positive_int(value):
            raise SpatialTokensError(f"{name} must be {_positive_integer(value)}, got {shown(value)}")


def crop_sizes(grid_size: KernelSize, stride: int) -> tuple[KernelSize, ...]:
    """The sizes met by cropping inward by `stride` on every side until nothing is left, smallest first (section 3.2).

    Raises:
        SpatialTokensError: If the grid or the stride is not positive.

    Examples:
        >>> crop_sizes((24, 24), 2)
        (4, 8, 12, 16, 20, 24)
        >>> crop_sizes((8, 12), 2)
        ((4, 8), (8, 12))
    """
    grid = as_size(grid_size, "grid_size")
    check_positive(stride=stride)
    return tuple(_cropped(grid, stride, steps) for steps in range(_most_crops(grid, stride), -1, -1))


def _most_crops(grid: Size, stride: int) -> int:
    return (min(grid) - 1) // (2 * stride)


def _cropped(grid: Size, stride: int, steps: int) -> KernelSize:
    return as_kernel_size((grid[0] - 2 * stride * steps, grid[1] - 2 * stride * steps), "kernel_size")


def crop_window(grid_size: KernelSize, kernel_size: KernelSize) -> Window:
    """The window of `kernel_size` patches at the center of the grid.

    Raises:
        SpatialTokensError: If the window is larger than the grid, or cannot be centered because a difference is odd.

    Examples:
        >>> crop_window((24, 24), 4)
        Window(top=10, left=10, height=4, width=4)
    """
    grid, kernel = as_size(grid_size, "grid_size"), as_size(kernel_size, "kernel_size")
    check_fits(grid, kernel, "kernel size")
    for length, k in zip(grid, kernel, strict=True):
        if (length - k) % 2:
            most = _most_crops(grid, 2)
            sizes = [str(_cropped(grid, 2, steps)) for steps in range(most, max(most - 3, -1), -1)]
            proposal = ", ".join(sizes) + (", ..." if most > 2 else "")
            raise SpatialTokensError(
                f"grid_size {grid} cannot be cropped to a centered {kernel[0]} x {kernel[1]} window: "
                f"{length} - {k} is odd; use kernel sizes {proposal}"
            )
    return Window((grid[0] - kernel[0]) // 2, (grid[1] - kernel[1]) // 2, *kernel)


def pool_bins(grid_size: KernelSize, kernel_size: KernelSize) -> tuple[Window, ...]:
    """The bins that adaptive pooling averages, row by row; they overlap where the sizes do not divide the grid.

    Bin `i` of `k` over a side of `n` patches is `[floor(i * n / k), ceil((i + 1) * n / k))`, as in `adaptive_avg_pool2d`.

    Raises:
        SpatialTokensError: If there are more bins than patches on a side.

    Examples:
        >>> pool_bins((3, 4), (2, 2))[:2]
        (Window(top=0, left=0, height=2, width=2), Window(top=0, left=2, height=2, width=2))
    """
    grid, kernel = as_size(grid_size, "grid_size"), as_size(kernel_size, "kernel_size")
    check_fits(grid, kernel, "kernel size")
    rows, columns = ([(i * n // k, -(-(i + 1) * n // k)) for i in range(k)] for n, k in zip(grid, kernel, strict=True))
    return tuple(Window(top, left, bottom - top, right - left) for top, bottom in rows for left, right in columns)


def pyramid_windows(sizes: Sequence[Size]) -> list[Window]:
    """The windows of several poolings that lie one after another in a map of one row.

    Examples:
        >>> pyramid_windows([(1, 2), (3, 4)])
        [Window(top=0, left=0, height=1, width=2), Window(top=0, left=2, height=1, width=12)]
    """
    ends = list(accumulate(height * width for height, width in sizes))
    return [Window(0, end - height * width, 1, height * width) for end, (height, width) in zip(ends, sizes, strict=True)]


def strided_grid_size(grid_size: KernelSize, kernel_size: KernelSize, stride: KernelSize) -> Size:
    """Rows and columns of windows that a kernel visits without padding, as a strided `Conv2d` does.

    Patches beyond the last complete window are not visited.

    Raises:
        SpatialTokensError: If the kernel is larger than the grid, or the stride is not positive.

    Examples:
        >>> strided_grid_size((24, 24), 16, 2)
        (5, 5)
    """
    grid, kernel = as_size(grid_size, "grid_size"), as_size(kernel_size, "kernel_size")
    step = as_size(stride, "stride")
    check_fits(grid, kernel, "kernel size")
    return (grid[0] - kernel[0]) // step[0] + 1, (grid[1] - kernel[1]) // step[1] + 1


def strided_windows(grid_size: KernelSize, kernel_size: KernelSize, stride: KernelSize) -> tuple[Window, ...]:
    """The windows that a strided kernel visits, left to right and top to bottom.

    Raises:
        SpatialTokensError: As `strided_grid_size`.

    Examples:
        >>> strided_windows((4, 4), (4, 2), 2)
        (Window(top=0, left=0, height=4, width=2), Window(top=0, left=2, height=4, width=2))
    """
    rows, columns = strided_grid_size(grid_size, kernel_size, stride)
    kernel, step = as_size(kernel_size, "kernel_size"), as_size(stride, "stride")
    return tuple(Window(i * step[0], j * step[1], *kernel) for i in range(rows) for j in range(columns))


def check_fits(grid: Size, kernel: Size, name: str) -> None:
    """Raises SpatialTokensError if a kernel is larger than the grid on a side."""
    if kernel[0] > grid[0] or kernel[1] > grid[1]:
        raise SpatialTokensError(
            f"{name} {kernel[0]} x {kernel[1]} is larger than grid_size {grid}; use at most {grid[0]} x {grid[1]}"
        )


def check_kernel_sizes(grid_size: KernelSize, kernel_sizes: Sequence[Any], variant: Variant) -> tuple[KernelSize, ...]:
    """The kernel sizes of a SpatialFeatureExtractor in canonical form, checked against its grid and variant.

    Raises:
        SpatialTokensError: If there is none, or one is not positive, not larger than the one before, larger than the grid, or
            (when cropping) cannot be centered.

    Examples:
        >>> check_kernel_sizes((24, 24), [4, (8, 8)], "cropping")
        (4, 8)
    """
    if not isinstance(kernel_sizes, (tuple, list)) or not kernel_sizes:
        raise SpatialTokensError(f"kernel_sizes must be a non-empty tuple such as (4, 8, 12), got {shown(kernel_sizes)}")
    check_choice("variant", variant, get_args(Variant))
    sizes = tuple(as_kernel_size(k, "each of kernel_sizes") for k in kernel_sizes)
    grid = as_size(grid_size, "grid_size")
    pairs = [as_size(k, "kernel size") for k in sizes]
    for pair in pairs:
        crop_window(grid, pair) if variant == "cropping" else check_fits(grid, pair, "kernel size")
    for before, after in pairwise(pairs):
        if before == after or before[0] > after[0] or before[1] > after[1]:
            raise SpatialTokensError(f"kernel_sizes must increase, got {sizes}; sort them and drop repeated ones")
    return sizes


def check_factors(
    vision_hidden_size: int,
    kernel_sizes: Sequence[KernelSize],
    rank: Any,
    frequencies: Any = None,
    spatial_basis: Any = "cosine",
) -> int | tuple[int, ...] | None:
    """The frequencies of factorized kernels in canonical form: an integer where all have the same number, else one for each.

    Without a rank kernels are dense, and have no frequencies; with one they have 3 each by default, or as many as their shorter
    side has patches.

    Raises:
        SpatialTokensError: If the rank is larger than the channels, frequencies are not one for each kernel or more than it has
            patches a side, or dense kernels are given frequencies or a basis.

    >>> check_factors(32, (4, 8), 16), check_factors(32, (2, 8), 16, (2, 3)), check_factors(32, (2, 8), None)
    (3, (2, 3), None)
    """
    check_choice("spatial_basis", spatial_basis, get_args(SpatialBasis))
    if rank is None:
        if frequencies is not None or spatial_basis != "cosine":
            given = f"frequencies {shown(frequencies)}" if frequencies is not None else f"spatial_basis {spatial_basis!r}"
            raise SpatialTokensError(f"{given} is for factorized kernels, but rank is None (dense kernels); give a rank too")
        return None
    check_positive(rank=rank)
    if rank > vision_hidden_size:
        raise SpatialTokensError(f"rank {rank} is larger than vision_hidden_size {vision_hidden_size}; use at most that")
    if frequencies is None:
        frequencies = tuple(min(FREQUENCIES, *as_size(size, "kernel size")) for size in kernel_sizes)
    numbers = tuple(frequencies) if isinstance(frequencies, (tuple, list)) else (frequencies,) * len(kernel_sizes)
    if len(numbers) != len(kernel_sizes) or not all(map(is_positive_int, numbers)):
        raise SpatialTokensError(
            f"frequencies must be a positive integer, or one for each of {len(kernel_sizes)} kernels, got {shown(frequencies)}"
        )
    for size, number in zip(kernel_sizes, numbers, strict=True):
        height, width = as_size(size, "kernel size")
        if number > min(height, width):
            fitting = tuple(min(most, *as_size(each, "kernel size")) for most, each in zip(numbers, kernel_sizes, strict=True))
            raise SpatialTokensError(
                f"{number} frequencies a side are more than a kernel of {height} x {width} patches has; use "
                f"frequencies={fitting if len(set(fitting)) > 1 else fitting[0]}"
            )
    return numbers[0] if len(set(numbers)) == 1 else numbers


def as_frequencies(frequencies: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each kernel.

    Examples:
        >>> as_frequencies(3, 2), as_frequencies((2, 3), 2)
        ((3, 3), (2, 3))
    """
    return (frequencies,) * count if isinstance(frequencies, int) else tuple(frequencies)
