"""Tensor parallelism: a projector's weights in parts, one a process, as DTensors."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.modules import FactorizedFeatureExtractor, LinearHead, MLPHead, SpatialFeatureExtractor, SPProjector
from spatial_tokens.modules.factorized_kernels import FactorizedKernels
from spatial_tokens.storage.int8 import require_plain

Sharding = Literal["output", "input"]


def parallelize_projector(projector: SPProjector, mesh: DeviceMesh, shard: Sharding = "output") -> SPProjector:
    """Shares a projector's weights out over the processes of a mesh: each computes with its part, none is ever gathered.

    Every process gives the same patch features and gets the same tokens; gradients are those of one process. The weights are the
    first process's. All parameters become DTensors, so that optimizers, `clip_grad_norm_`, `fully_shard` over another dimension
    of the mesh and `torch.distributed.checkpoint` take them together; `save_pretrained` gathers them.

    Args:
        projector: The projector, which is changed in place; on its device already.
        mesh: One dimension: `init_device_mesh("cuda", (8,))`, or `mesh["tp"]` of a larger one.
        shard: Which part of each kernel a process has: "output", some of the `S` channels, which are gathered; "input", some of
            the `k * k * C` inputs, whose products are summed over the processes.

    Returns:
        The projector.

    Raises:
        SpatialTokensError: If the mesh has several dimensions or more processes than there are channels or inputs, or
            `tensor_parallel_plan` has no plan.

    Examples:
        ```python
        mesh = init_device_mesh("cuda", (8,))
        projector = parallelize_projector(SPProjector.from_pretrained("projector", device="cuda"), mesh)
        ```
    """
    if mesh.ndim != 1:
        raise SpatialTokensError(f"the mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names}; give one of them: mesh['tp']")
    plan = tensor_parallel_plan(projector, shard)
    _require_enough(projector, shard, mesh.size())
    parallelize_module(projector, mesh, plan)
    return projector


def tensor_parallel_plan(projector: SPProjector, shard: Sharding = "output") -> dict[str, ParallelStyle]:
    """What `parallelize_projector` gives to `parallelize_module`: a style for each part, by its name in the projector.

    Dense kernels are sharded as asked, an MLP's layers by output and then by input. Factorized kernels and the attention of the
    DetailFeatureIntegrator, 4.4 M and 0.8 M weights at the paper's size, are whole in every process.

    Raises:
        SpatialTokensError: If a part is none that a config describes, or is wrapped or sharded already.
    """
    if shard not in get_args(Sharding):
        raise SpatialTokensError(f"shard must be 'output' or 'input', got {shown(shard)}")
    if any(type(parameter) is not nn.Parameter for parameter in projector.parameters()):
        raise SpatialTokensError("the projector's parameters are sharded or quantized already; give a plain one")
    plan: dict[str, ParallelStyle] = {}
    if isinstance(projector.extractor, FactorizedFeatureExtractor):
        plan |= _factors("extractor.kernels", projector.extractor.kernels)
    elif isinstance(projector.extractor, SpatialFeatureExtractor):
        made = Shard(-1) if shard == "output" else Partial()  # the kernels' tokens, gathered or summed once for all of them
        for i in range(projector.extractor.num_spatial_tokens):
            plan[f"extractor.kernels.{i}"] = _kernel(shard, made, use_local_output=False)
        plan["extractor"] = PrepareModuleOutput(output_layouts=made, desired_output_layouts=Replicate())
    else:
        raise _no_plan(projector.extractor)
    if projector.integrator is not None:
        kernel = projector.integrator.detail_kernel
        if isinstance(kernel, FactorizedKernels):
            plan |= _factors("integrator.detail_kernel", kernel)
        else:
            plan["integrator.detail_kernel"] = _kernel(shard, Replicate(), use_local_output=True)
        plan |= {f"integrator.{role}_projector": _Whole() for role in ("query", "key", "value")}
    for name, head in (("spatial_head", projector.spatial_head), ("patch_head", projector.patch_head)):
        if isinstance(head, MLPHead):
            plan |= {f"{name}.fc1": ColwiseParallel(use_local_output=False), f"{name}.fc2": RowwiseParallel()}
        elif isinstance(head, LinearHead):
            plan[f"{name}.fc"] = ColwiseParallel(output_layouts=Replicate())
        elif head is not None:
            raise _no_plan(head)
    require_plain(projector.exact_state_dict(), "there is no tensor-parallel plan")  # which raises if a part is wrapped
    return plan


def _factors(name: str, kernels: FactorizedKernels) -> dict[str, ParallelStyle]:
    if kernels.spatial_basis == "learned":
        raise SpatialTokensError("there is no tensor-parallel plan for learned maps; use spatial_basis='cosine'")
    return {f"{name}.{each}": _Whole() for each, part in kernels.named_modules() if isinstance(part, nn.Linear)}


class _Whole(ParallelStyle):
    """Every process has all of the module, as DTensors all the same: torch does not mix them with plain parameters."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, input_fn=_enter, output_fn=_leave)


def _enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)


def _leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.to_local()


def _kernel(shard: Sharding, output_layouts: Placement, *, use_local_output: bool) -> ParallelStyle:
    if shard == "output":
        return ColwiseParallel(output_layouts=output_layouts, use_local_output=use_local_output)
    return RowwiseParallel(input_layouts=Replicate(), output_layouts=output_layouts, use_local_output=use_local_output)


def _require_enough(projector: SPProjector, shard: Sharding, processes: int) -> None:
    """Raises SpatialTokensError if a sharded layer is narrower than the mesh: torch would not compute with parts of it."""
    counts: dict[str, int] = {}
    if projector.config.rank is None:
        kernels = [module for name, module in projector.named_modules() if "kernel" in name and isinstance(module, nn.Linear)]
        sides = [each.out_features if shard == "output" else each.in_features for each in kernels]
        counts[f"{shard} channels of a kernel"] = min(sides)
    counts["channels of a head"] = projector.config.text_hidden_size
    for what, count in counts.items():
        if count < processes:
            raise SpatialTokensError(f"{count} {what} cannot be shared out over {processes} processes; use a smaller mesh")


def _no_plan(part: nn.Module) -> SpatialTokensError:
    return SpatialTokensError(
        f"there is no tensor-parallel plan for a {type(part).__name__}; give torch's parallelize_module one of your own"
    )
