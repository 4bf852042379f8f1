"""Autocast for registered operators, which torch cannot know to be matrix products."""

import torch


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in autocast's dtype where it is enabled, as for `functional.linear`; float64 and meta tensors are left alone."""
    if not autocasts(*tensors):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) for tensor in tensors]


def autocasts(*tensors: torch.Tensor) -> bool:
    """Whether autocast brings these to one dtype."""
    device = tensors[0].device.type
    return device != "meta" and torch.is_autocast_enabled(device) and all(t.dtype != torch.float64 for t in tensors)
