"""Which implementation of an operator runs.

`naive` is the specification in plain torch, `gemm` the fast form in plain torch, `triton` the GPU kernels. The environment variable
`SPATIAL_TOKENS_BACKEND`, read when the library is imported, names one for the whole process; `using` for a block.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch
from torch.autograd import forward_ad

from spatial_tokens.errors import SpatialTokensError, shown

Backend = Literal["auto", "naive", "gemm", "triton"]

BACKENDS = get_args(Backend)


def _release(package: str) -> tuple[int, int] | None:
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


VARIABLE = "SPATIAL_TOKENS_BACKEND"
OVERRIDE = os.environ.get(VARIABLE, "auto")
TRITON = _release("triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def list_backends() -> tuple[str, ...]:
    """The names of the backends that this installation can run, for `using` and `SPATIAL_TOKENS_BACKEND`.

    Triton's is among them if Triton is installed and there is a GPU that its kernels run on, or its interpreter is on.

    Examples:
        >>> list_backends()[:3]
        ('auto', 'naive', 'gemm')
    """
    return tuple(name for name in BACKENDS if name != "triton" or _has_triton())


def resolve(backend: str, features: torch.Tensor) -> str:
    """The backend that runs for these features: the one that is named, else the environment's, else the fastest measured.

    Under torch.func's transforms and forward-mode differentiation it is `naive`; under torch.export too, so that programs hold
    torch's own operators alone, and run where this library is not installed.

    Raises:
        SpatialTokensError: If there is no such backend, or the named one cannot run here.
    """
    named, source = (backend, "backend") if backend != "auto" else (OVERRIDE, VARIABLE)
    if not isinstance(named, str) or named not in BACKENDS:
        raise SpatialTokensError(f"{source} must be one of {', '.join(BACKENDS)}, got {shown(named)}")
    if named == "auto":
        # CPU: `gemm` takes 0.56 to 1.2 of `naive`'s time, least in float32, and a fraction of its memory (benchmarks/results/).
        # GPU: nothing is measured yet, so nothing is preferred to plain torch; `triton` runs where it is asked for.
        named = "gemm"
    if torch.compiler.is_exporting():
        return "naive"
    if named == "triton":
        _require_triton(features, source)
    return "naive" if is_transformed() else named


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Names a backend for the operators called in the block, in every thread.

    Raises:
        SpatialTokensError: When one is called, as `resolve`.
    """
    global OVERRIDE
    before, OVERRIDE = OVERRIDE, backend
    try:
        yield
    finally:
        OVERRIDE = before


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: they need plain torch, and cannot look into an operator."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _require_triton(features: torch.Tensor, source: str) -> None:
    problem = None
    if TRITON is None:
        problem = "triton is not installed"
    elif TRITON < (3, 3):
        problem = f"its kernels need triton 3.3 or newer, got {TRITON[0]}.{TRITON[1]}"
    elif features.dtype not in TRITON_DTYPES:
        problem = f"its kernels take float32, bfloat16 and float16, got {features.dtype}"
    elif features.device.type != "cuda" and not (features.device.type == "cpu" and _interprets()):
        problem = f"the features are on {features.device}, its kernels run on CUDA (on a CPU only with TRITON_INTERPRET=1)"
    elif not torch.compiler.is_compiling() and features.is_cuda and torch.cuda.get_device_capability(features.device) < (8, 0):
        problem = "the GPU is older than compute capability 8.0"
    if problem:
        raise SpatialTokensError(f"{source}='triton' cannot run: {problem}; use 'auto' or 'gemm'")


def _has_triton() -> bool:
    if TRITON is None or TRITON < (3, 3):
        return False
    return _interprets() or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
