"""The extractor against the authors' convolutions, at the paper's size, side by side in one run.

    python benchmarks/extractor.py --json benchmarks/results/cpu/extractor.json

Each repeat times both, on fresh random features: the six `Conv2d` as the authors wrote them (on permuted crops), and
`SpatialFeatureExtractor` with the same weights. The limit is the time to read the weights once, at this machine's read bandwidth,
measured by summing a tensor of their size.
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from spatial_tokens import SpatialFeatureExtractor, __version__
from spatial_tokens.grid import crop_window
from spatial_tokens.storage.files import make_directory, write_text

GRID, SIZES, CHANNELS, SPATIAL = (24, 24), (4, 8, 12, 16, 20, 24), 1024, 512


def authors(convolutions: nn.ModuleList, patches: torch.Tensor) -> torch.Tensor:
    patch_map = patches.unflatten(1, GRID).permute(0, 3, 1, 2)
    windows = [crop_window(GRID, k) for k in SIZES]
    crops = [patch_map[:, :, w.top : w.bottom, w.left : w.right] for w in windows]
    return torch.stack([conv(crop).flatten(1) for conv, crop in zip(convolutions, crops, strict=True)], dim=1)


def cpu_name() -> str:
    """The processor's model and instruction set, as the system and torch tell them."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def measure(batch: int, dtype: torch.dtype, repeats: int) -> dict:
    extractor = SpatialFeatureExtractor(CHANNELS, SPATIAL, grid_size=GRID, kernel_sizes=SIZES, dtype=dtype)
    convolutions = nn.ModuleList(nn.Conv2d(CHANNELS, SPATIAL, k, bias=False, dtype=dtype, device="meta") for k in SIZES)
    for conv, kernel, k in zip(convolutions, extractor.kernels, SIZES, strict=True):
        weight = kernel.weight.unflatten(1, (k, k, CHANNELS)).permute(0, 3, 1, 2).contiguous()
        conv.weight = nn.Parameter(weight)

    patches = torch.randn(batch, GRID[0] * GRID[1], CHANNELS, dtype=dtype)
    ours, theirs = extractor(patches).float(), authors(convolutions, patches).float()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error < (1e-4 if dtype == torch.float32 else 5e-2):
        raise SystemExit(f"the two do not agree (relative error {error:.2e}): nothing is timed")

    kernel = extractor.kernels[-1].weight
    bandwidth = kernel.numel() * kernel.element_size() / min(seconds(torch.sum, kernel) for _ in range(5))
    times = {"authors": [], "ours": []}
    for _ in range(repeats):
        patches = torch.randn(batch, GRID[0] * GRID[1], CHANNELS, dtype=dtype)
        times["ours"].append(seconds(extractor, patches))
        times["authors"].append(seconds(authors, convolutions, patches))
    weights = sum(k.weight.numel() * k.weight.element_size() for k in extractor.kernels)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "relative_error": error,
        "authors_ms": medians["authors"],
        "ours_ms": medians["ours"],
        "ratio": medians["authors"] / medians["ours"],
        "read_gb_per_s": bandwidth / 1e9,
        "limit_ms": 1000 * weights / bandwidth,
        "share_of_limit": 1000 * weights / bandwidth / medians["ours"],
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            rows.append(measure(batch, dtype, arguments.repeats))
            row = rows[-1]
            print(
                f"{row['dtype']:9} batch {batch}: authors {row['authors_ms']:8.1f} ms, ours {row['ours_ms']:7.1f} ms, "
                f"ratio {row['ratio']:5.1f}, {100 * row['share_of_limit']:.0f} % of the read limit",
                flush=True,
            )
    if arguments.json:
        machine = {
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "spatial_tokens": __version__,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        command = "python benchmarks/extractor.py --json FILE"
        make_directory(Path(arguments.json).parent)
        write_text(arguments.json, json.dumps({"command": command, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
