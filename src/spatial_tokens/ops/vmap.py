"""How torch's vmap batches our operators over a further dimension.

Batched gradients (`is_grads_batched`, `jacobian(vectorize=True)`) come from torch's first vmap, which has a dispatch key of its own
and does not know the rules of `torch.func.vmap`; here it is made to ask them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Operator = Callable[..., Any]


def register(operator: Any, *, images_first: bool) -> None:
    """Gives an operator its rules.

    Args:
        operator: What `torch.library.custom_op` made.
        images_first: Whether its first tensor and its result hold independent images along the first dimension: then one call
            does for all of a dimension over which only that tensor is batched. Otherwise there is one call for each element.
    """
    operator.register_vmap(_rule(operator, images_first))
    torch.library.impl(operator._qualname, "Batched", _by_torch_func(operator))


def _rule(operator: Operator, images_first: bool) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        first, *others = arguments
        if images_first and all(dim is None for dim in tree_leaves(in_dims[1:])):
            moved = first.movedim(in_dims[0], 0)
            return operator(moved.flatten(0, 1), *others).unflatten(0, moved.shape[:2]), 0
        results = [operator(*_element(arguments, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return [torch.stack(each) for each in zip(*results, strict=True)], [0] * len(results[0])

    return rule


def _element(value: Any, dims: Any, i: int) -> Any:
    if isinstance(dims, (tuple, list)):
        return [_element(each, dim, i) for each, dim in zip(value, dims, strict=True)]
    return value if dims is None else value.select(dims, i)


def _by_torch_func(operator: Operator) -> Operator:
    def of_first_vmap(*arguments: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        unwrapped = tree_map(lambda x: torch._remove_batch_dim(x, level, 1, 0) if _is_tensor(x) else x, list(arguments))
        size = max(x.shape[0] for x in tree_leaves(unwrapped) if _is_tensor(x))  # those that are not batched have 1
        in_dims = tree_map(lambda x: 0 if _is_tensor(x) and x.shape[0] == size else None, unwrapped)
        given = tree_map(lambda x, dim, whole: whole if dim is None else x, unwrapped, in_dims, list(arguments))
        return tree_map(lambda x: torch._add_batch_dim(x, 0, level), torch.vmap(operator, tuple(in_dims))(*given))

    return of_first_vmap


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
