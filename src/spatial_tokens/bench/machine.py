"""What the figures were taken on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spatial_tokens
from spatial_tokens.errors import SpatialTokensError, reason

PACKAGES = ("torch", "triton", "transformers", "timm")


def as_device(name: str | None) -> torch.device:
    """The device to measure on: the one named, else CUDA where there is one, else the CPU.

    Raises:
        SpatialTokensError: If torch has no such device, or it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise SpatialTokensError(f"the benchmarks run on cpu and cuda, got {name!r}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpatialTokensError(f"cannot use the device {name!r}: {reason(error)}") from error
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the versions, the commit (of a checkout) and the date."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    else:
        hardware = {"device": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        **hardware,
        "python": platform.python_version(),
        "versions": {
            "spatial-tokens": spatial_tokens.__version__,
            **{package: found for package in PACKAGES if (found := _version(package))},
        },
        **({"commit": commit} if (commit := commit_of(Path(spatial_tokens.__file__))) else {}),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def commit_of(file: Path) -> str | None:
    """The commit of a file's repository, "+" behind it where tracked files have changed; None if git does not track the file."""

    def git(*words: str) -> str:
        told = subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, text=True, check=True, timeout=10)
        return told.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, where the system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = _proc("/proc/meminfo")
    return int(facts["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in facts else None


class PeakMemory:
    """Bytes allocated at most while in the block, above what there was before; None where the system does not say.

    On CUDA torch counts. On a CPU under Linux the kernel does, the libraries' own buffers included.
    """

    num_bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        _give_back_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:
            self._before = -1
        else:
            self._before = _kilobytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.num_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before >= 0:
            self.num_bytes = max(0, _kilobytes("VmHWM") - self._before) * 1024


def _give_back_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return  # not the GNU C library


def _kilobytes(name: str) -> int:
    return int(_proc("/proc/self/status")[name].split()[0])


def _proc(path: str) -> dict[str, str]:
    file = Path(path)
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu_name() -> str:
    model = _proc("/proc/cpuinfo").get("model name", platform.processor())
    return f"{model}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
