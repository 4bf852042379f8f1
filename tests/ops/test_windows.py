import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens.grid import Window, strided_grid_size
from spatial_tokens.ops.windows import crop, pool, unfold

sides = st.integers(1, 9)


@st.composite
def maps(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(draw(st.integers(0, 2)), draw(sides), draw(sides), draw(st.integers(1, 3)), dtype=torch.float64)


def sizes(draw, patch_map, parity=1):
    return tuple(draw(st.sampled_from(range(side, 0, -parity))) for side in patch_map.shape[1:3])


@given(data=st.data(), patch_map=maps())
def test_crop_is_a_view_with_equal_margins(data, patch_map):
    h, w = size = sizes(data.draw, patch_map, parity=2)
    window = crop(patch_map, size)
    top, left = (patch_map.shape[1] - h) // 2, (patch_map.shape[2] - w) // 2
    assert torch.equal(window, patch_map[:, top : top + h, left : left + w])
    assert window.untyped_storage().data_ptr() == patch_map.untyped_storage().data_ptr()


@given(data=st.data(), patch_map=maps())
def test_pool_averages_the_bins(data, patch_map):
    height, width = patch_map.shape[1:3]
    h, w = size = sizes(data.draw, patch_map)
    pooled = pool(patch_map, size)
    assert pooled.shape == (patch_map.shape[0], h, w, patch_map.shape[3])
    for i in range(h):
        for j in range(w):
            rows, columns = range(i * height // h, -(-(i + 1) * height // h)), range(j * width // w, -(-(j + 1) * width // w))
            expected = sum(patch_map[:, r, c] for r in rows for c in columns) / (len(rows) * len(columns))
            torch.testing.assert_close(pooled[:, i, j], expected)


@given(data=st.data(), patch_map=maps(), stride=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_unfold_lays_each_window_in_row_column_channel_order(data, patch_map, stride):
    h, w = size = sizes(data.draw, patch_map)
    corners = [
        (top, left)
        for top in range(0, patch_map.shape[1] - h + 1, stride[0])
        for left in range(0, patch_map.shape[2] - w + 1, stride[1])
    ]
    count = strided_grid_size(tuple(patch_map.shape[1:3]), size, stride)
    windows = unfold(patch_map, Window(0, 0, *size), stride, count)
    assert windows.shape[1] == len(corners)
    for position, (top, left) in enumerate(corners):
        assert torch.equal(windows[:, position], patch_map[:, top : top + h, left : left + w].flatten(1))
