"""Valid configs for hypothesis, small enough to run."""

from hypothesis import strategies as st

from spatial_tokens import SPProjectorConfig

sides = st.integers(1, 9)
sizes = st.tuples(sides, sides)


def within(grid):
    """Kernels that fit a grid."""
    return st.tuples(*(st.integers(1, side) for side in grid))


def centered_in(grid):
    """Kernels that fit a grid and can be cropped from its center."""
    return st.tuples(*(st.integers(0, (side - 1) // 2).map(lambda margin, side=side: side - 2 * margin) for side in grid))


@st.composite
def fields(draw):
    """The fields of a valid config, in canonical form."""
    grid = draw(sizes)
    variant = draw(st.sampled_from(["cropping", "pooling"]))
    drawn = draw(st.lists((centered_in if variant == "cropping" else within)(grid), min_size=1, max_size=5, unique=True))
    kernels = [min(drawn)]
    for kernel in sorted(drawn):
        if kernel != kernels[-1] and kernel[1] >= kernels[-1][1]:
            kernels.append(kernel)
    detail = draw(st.none() | within(grid))
    head = draw(st.sampled_from(["mlp", "linear"]))
    channels = draw(sides)
    factors = {
        "rank": draw(st.integers(1, channels)),
        "frequencies": draw(st.integers(1, min(3, *map(min, kernels)))),
        "spatial_basis": draw(st.sampled_from(["cosine", "learned"])),
    }
    return {
        "vision_hidden_size": channels,
        "text_hidden_size": draw(sides),
        "grid_size": grid,
        "variant": variant,
        "kernel_sizes": tuple(map(square, kernels)),
        "spatial_hidden_size": draw(sides),
        "detail_kernel_size": square(detail),
        "detail_stride": None if detail is None else square(draw(within(grid))),
        "spatial_head": head,
        "spatial_head_bias": head == "mlp" or draw(st.booleans()),
        "patch_head": draw(st.sampled_from(["mlp", None])),
        **(factors if draw(st.booleans()) else {}),
    }


def square(size):
    """The canonical form of a size: an integer where it is square."""
    return size[0] if size and size[0] == size[1] else size


configs = fields().map(lambda values: SPProjectorConfig(**values))
