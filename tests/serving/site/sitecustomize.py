"""Lets a torchvision that is built for CUDA be imported beside a torch that is not, as a package index may have no other.

Its kernels then cannot be loaded, and it wants their operators to be there; what prepares pictures uses none of them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

torchvision = find_spec("torchvision")
try:
    torch.ops.load_library(Path(torchvision.origin).with_name("_C.so"))
except OSError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
