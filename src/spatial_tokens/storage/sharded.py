"""Tensors that are sharded over processes, read and written whole: DTensors (FSDP2, tensor parallelism) and DeepSpeed's ZeRO-3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from spatial_tokens.storage.files import Tensors


def tensors_of(module: nn.Module) -> Tensors:
    """The state dict, with the parameters themselves where DeepSpeed has partitioned them (ZeRO-3): only these can be gathered."""
    found = module.state_dict(keep_vars=True)
    return {name: each if is_partitioned(each) else each.detach() for name, each in found.items()}


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 manages a parameter, which is empty where nothing has gathered it."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of a tensor: a DTensor, or a parameter that DeepSpeed has partitioned."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(tensor.ds_shape) if is_partitioned(tensor) else tuple(tensor.shape)  # type: ignore[attr-defined]


@contextmanager
def whole(tensor: torch.Tensor, *, write: bool = False) -> Iterator[torch.Tensor]:
    """The whole tensor, which is to be read, or written in place, inside the block; every process must enter it."""
    if is_partitioned(tensor):
        from deepspeed import zero

        with zero.GatheredParameters([tensor], modifier_rank=0 if write else None):
            yield tensor
    else:
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor of its own, in every process."""
    with whole(tensor) as each:
        return each.detach().clone()


def gathered(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as they are; where some are sharded over processes, all of them whole, to be written by the first.

    Then every process must call this: the first gets them on the CPU, one gathered after another, the others an empty dict.
    """
    if not any(map(is_sharded, tensors.values())):
        return dict(tensors)
    first, found = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors.items():
        with whole(tensor) as each:
            if first:
                found[name] = each.detach().to("cpu", copy=True)
    return found


def write(target: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a tensor, sharded or not, other values; every process must call this, with the same ones."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(values.to(target.device), target.device_mesh, target.placements))
            return
        with whole(target, write=True) as each:
            each.copy_(values)
        if hasattr(target, "_z3_optimizer"):  # its steps start from a copy of its own
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(target, target.ds_tensor)  # type: ignore[attr-defined]
