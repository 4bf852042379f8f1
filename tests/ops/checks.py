"""What tests of `window_linear` share on every backend: the float64 reference, geometries, how near each dtype must come."""

import os
from typing import NamedTuple

import torch
from torch.nn import functional as F

from spatial_tokens.grid import Window
from spatial_tokens.ops.window_linear import window_linear
from tests.tolerances import FLOAT32, assert_close, rounding


class Geometry(NamedTuple):
    grid: tuple[int, int]
    windows: list[Window]
    step: tuple[int, int] = (1, 1)
    count: tuple[int, int] = (1, 1)

    def tensors(self, batch, channels, hidden, dtype=torch.float32, device="cpu"):
        """A patch map, weights that keep its scale, and the tokens' gradient."""
        tokens = len(self.windows) * self.count[0] * self.count[1]
        shapes = [(hidden, window.height * window.width * channels) for window in self.windows]
        weights = [torch.randn(shape, device=device) / shape[1] ** 0.5 for shape in shapes]
        tensors = [torch.randn(batch, *self.grid, channels, device=device), *weights, torch.randn(batch, tokens, hidden)]
        patch_map, *weights, grad = [tensor.to(device, dtype) for tensor in tensors]
        return patch_map, weights, grad

    def run(self, patch_map, weights, backend):
        return window_linear(patch_map, weights, self.windows, step=self.step, count=self.count, backend=backend)

    def reference(self, patch_map, weights):
        """A convolution over each window, cut out of the map with the channels first."""
        feature_map, tokens = patch_map.permute(0, 3, 1, 2), []
        for weight, (top, left, height, width) in zip(weights, self.windows, strict=True):
            kernel = weight.reshape(len(weight), height, width, -1).permute(0, 3, 1, 2)
            for y in range(top, top + self.count[0] * self.step[0], self.step[0]):
                for x in range(left, left + self.count[1] * self.step[1], self.step[1]):
                    tokens.append(F.conv2d(feature_map[:, :, y : y + height, x : x + width], kernel).flatten(1))
        return torch.stack(tokens, dim=1)


GEOMETRIES = {
    "crops": Geometry((8, 6), [Window(3, 2, 2, 2), Window(2, 1, 4, 4), Window(0, 0, 8, 6)]),
    "poolings": Geometry((1, 53), [Window(0, 0, 1, 4), Window(0, 4, 1, 12), Window(0, 16, 1, 37)]),
    "detail": Geometry((9, 8), [Window(0, 0, 4, 4)], (2, 2), (3, 3)),
    "overlapping": Geometry((9, 11), [Window(1, 2, 3, 4), Window(0, 0, 5, 2), Window(2, 1, 1, 7)], (2, 3), (3, 2)),
    "apart": Geometry((8, 9), [Window(0, 1, 2, 1)], (3, 4), (3, 2)),
    "long rows": Geometry((2, 64), [Window(0, 0, 2, 64), Window(1, 8, 1, 48)]),
}


def evaluate(function, patch_map, weights, grad):
    """Tokens, the patch map's gradient, the weights' gradients."""
    patch_map, *weights = [tensor.detach().requires_grad_() for tensor in (patch_map, *weights)]
    tokens = function(patch_map, weights)
    return [tokens.detach(), *torch.autograd.grad(tokens, [patch_map, *weights], grad)]


def assert_equals_reference(geometry, backend, patch_map, weights, grad):
    """Within the rounding of the dtype of a reference in float64 on the same numbers."""
    given = evaluate(lambda x, w: geometry.run(x, w, backend), patch_map, weights, grad)
    exact = evaluate(geometry.reference, *doubles(patch_map, weights, grad))
    for ours, theirs, tolerance in zip(given, exact, tolerances(geometry, patch_map.dtype, backend), strict=True):
        assert ours.dtype == patch_map.dtype
        assert_close(ours.cpu(), theirs, tolerance)


def kernel_rounding(dtype):
    """What a Triton kernel's result may be off by: it stores once, and its interpreter cuts bfloat16 off where a GPU rounds."""
    cuts = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return FLOAT32 if dtype == torch.float32 else rounding(dtype, 2 if cuts else 1) + FLOAT32


def doubles(patch_map, weights, grad):
    return patch_map.detach().cpu().double(), [weight.detach().cpu().double() for weight in weights], grad.cpu().double()


def tolerances(geometry, dtype, backend):
    """For the tokens, the patch map's gradient and each weight's: sums are in float32; 16 bits round what is stored."""
    if dtype == torch.float32:
        return [FLOAT32] * (2 + len(geometry.windows))
    rows = max(window.height for window in geometry.windows)
    terms = len(geometry.windows) * geometry.count[0] * geometry.count[1]  # windows that a patch can lie in
    if backend == "triton":
        return [kernel_rounding(dtype)] * (2 + len(geometry.windows))
    # A product of one row of windows is stored before it is added.
    tokens, to_map = 1 if backend == "naive" or geometry.count == (1, 1) else rows + 1, terms + 1
    return [rounding(dtype, number) + FLOAT32 for number in (tokens, to_map, *[1] * len(geometry.windows))]
