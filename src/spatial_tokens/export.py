"""A projector as a program for other runtimes: torch.export, ONNX, AOTInductor. None of them needs this library where it runs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatial_tokens.checks import as_path
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown
from spatial_tokens.grid import KernelSize, Size, as_size
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.files import atomic_write, check_writable
from spatial_tokens.storage.int8 import require_plain
from spatial_tokens.storage.staging import sync

LARGEST_MESSAGE = 2**31 - 2**20  # of a protobuf file; what does not fit goes into a file next to it
ONNX_DTYPES = (torch.float32, torch.float16)  # ONNX Runtime has no bfloat16 MatMul and no float64 Erf
EXAMPLE = 2  # images: a batch of one would be taken for a constant


class _Program(nn.Module):
    """What is exported: patches to tokens, and to the attention where there is an integrator."""

    def __init__(self, projector: SPProjector, grid_size: Size | None) -> None:
        super().__init__()
        self.projector, self.grid_size = projector, grid_size

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid_argument = () if self.grid_size is None else (self.grid_size,)
        if self.projector.integrator is None:
            return (self.projector(patches, *grid_argument),)
        tokens, attention = self.projector(patches, *grid_argument, return_attention=True)
        return tokens, attention


def export_program(
    projector: SPProjector, *, grid_size: KernelSize | None = None, strict: bool = False
) -> torch.export.ExportedProgram:
    """A projector as torch.export's program, of torch's own operators alone.

    It takes patch features `(B, N, C)` of any number of images, and gives a tuple: tokens `(B, K + N, D)` (`(B, K, D)` without a
    patch head), and the attention `(B, K, P)` if there is an integrator. `torch.export.save` writes it, `torch.export.load` reads
    it where this library is not installed.

    Args:
        projector: Any whose parts torch.export can trace.
        grid_size: For factorized kernels: the patch grid that the program reads; the config's own when left out.
        strict: torch.export's `strict`.

    Raises:
        SpatialTokensError: If it is no projector, its parameters have no values or are quantized, dense kernels are given another
            grid, or torch cannot export one of its parts.

    Examples:
        >>> from spatial_tokens import SPProjectorConfig
        >>> projector = SPProjector.from_config(SPProjectorConfig(
        ...     vision_hidden_size=8, text_hidden_size=16, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=4,
        ...     detail_kernel_size=4,
        ... ))
        >>> tokens, attention = export_program(projector).module()(torch.randn(3, 64, 8))
        >>> tokens.shape, attention.shape
        (torch.Size([3, 66, 16]), torch.Size([3, 2, 9]))
    """
    program, patches = _program(projector, grid_size)
    with _evaluated(program), _refused("export this projector"):
        return torch.export.export(program, (patches,), dynamic_shapes=_any_batch(), strict=strict)


def export_pt2(projector: SPProjector, path: str | PathLike[str], *, grid_size: KernelSize | None = None) -> None:
    """Writes `export_program`'s program, which `torch.export.load` reads.

    Raises:
        SpatialTokensError: As `export_program`; or if the file cannot be written.
    """
    program = export_program(projector, grid_size=grid_size)
    with atomic_write(path) as file, open(file, "wb") as stream:
        torch.export.save(program, stream)


def export_onnx(projector: SPProjector, path: str | PathLike[str], *, grid_size: KernelSize | None = None) -> None:
    """Writes an ONNX model: input `patches`, outputs `tokens` and, where there is an integrator, `attention`.

    The number of images is free. Weights of more than 2 GB are in a file beside it, `NAME.onnx.ID.data`, with a new ID for each
    export; `data_files` finds it. An export that replaces a model removes that model's file of weights.

    Args:
        projector: In float32 or float16.
        path: The `.onnx` file.
        grid_size: As `export_program` takes it.

    Raises:
        MissingExtraError: If onnx or onnxscript is not installed.
        SpatialTokensError: As `export_program`; or if the projector is in another dtype, or the file cannot be written.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx") from error
    target = as_path(path)
    program, patches = _program(projector, grid_size)
    weights = projector.state_dict()
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.dtype not in ONNX_DTYPES:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise SpatialTokensError(
                f"{name} is in {dtype}, which ONNX Runtime cannot run; cast first: projector.to(torch.float16) (--dtype float16)"
            )
    check_writable(target)
    names = ["tokens"] if projector.integrator is None else ["tokens", "attention"]
    with _evaluated(program), _refused("export this projector to ONNX"):
        made: Any = torch.onnx.export(
            program, (patches,), dynamo=True, dynamic_shapes=_any_batch(), input_names=["patches"], output_names=names,
            verbose=False,
        )  # fmt: skip
    old = data_files(target)
    with atomic_write(target) as file:
        if sum(each.nbytes for each in weights.values()) < LARGEST_MESSAGE:
            made.save(file)
        else:
            # A new name, so that the model that is there stays whole until the new one takes its place.
            data = f"{target.name}.{secrets.token_hex(4)}.data"
            onnx_ir.save(made.model, file, external_data=data)
            sync(file.parent / data)
            (file.parent / data).replace(target.with_name(data))
    for each in old:
        each.unlink(missing_ok=True)


def data_files(path: str | PathLike[str]) -> list[Path]:
    """The files of weights that `export_onnx` wrote beside a model: one if it is larger than 2 GB, else none."""
    target = as_path(path)
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    return [each for each in target.parent.iterdir() if pattern.fullmatch(each.name)]


def compile_package(projector: SPProjector, path: str | PathLike[str], *, grid_size: KernelSize | None = None) -> None:
    """Writes an AOTInductor package of compiled code for this kind of machine; `torch._inductor.aoti_load_package` runs it.

    It needs a C++ compiler, and takes a minute.

    Args:
        projector: On the device, and in the dtype, that the package is for.
        path: A file of the suffix `.pt2`.
        grid_size: As `export_program` takes it.

    Raises:
        SpatialTokensError: As `export_program`; or if it cannot be compiled or written.
    """
    target = as_path(path)
    if target.suffix != ".pt2":
        raise SpatialTokensError(f"a package's name ends in .pt2, got {shown(str(target))}")
    program = export_program(projector, grid_size=grid_size)
    with atomic_write(target) as file, _refused("compile this projector"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def _program(projector: SPProjector, grid_size: KernelSize | None) -> tuple[nn.Module, torch.Tensor]:
    """What is exported, and patches to trace it with."""
    if not isinstance(projector, SPProjector):
        raise SpatialTokensError(f"projector must be an SPProjector, got a {type(projector).__name__}")
    weight = next(projector.parameters())
    if weight.is_meta:
        raise SpatialTokensError("the projector is on the meta device, without values; load or initialize it first")
    require_plain(projector.state_dict(), "cannot export this projector")
    own, channels = (getattr(projector.extractor, name, None) for name in ("grid_size", "vision_hidden_size"))
    grid = own if grid_size is None else as_size(grid_size, "grid_size")
    if grid is None or channels is None:
        raise SpatialTokensError(f"a {type(projector.extractor).__name__} names no grid_size and vision_hidden_size; give it both")
    patches = torch.zeros(EXAMPLE, grid[0] * grid[1], channels, dtype=weight.dtype, device=weight.device)
    return _Program(projector, None if grid == own else grid), patches


def _any_batch() -> dict[str, dict[int, Any]]:
    return {"patches": {0: torch.export.Dim("batch", min=1)}}


@contextmanager
def _evaluated(program: nn.Module) -> Iterator[None]:
    """The modules in evaluation mode, and in their own again."""
    training = [module for module in program.modules() if module.training]
    program.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Torch's tracers and compilers raise what they like: as one of ours."""
    try:
        yield
    except (SpatialTokensError, OSError):
        raise
    except Exception as error:
        cause: BaseException | None = error  # ONNX's exporter wraps what tracing raised
        while cause is not None:
            if isinstance(cause, SpatialTokensError):
                raise cause from error
            cause = cause.__cause__
        raise SpatialTokensError(f"torch cannot {what}: {reason(error)}") from error
