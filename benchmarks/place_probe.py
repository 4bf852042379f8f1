"""What timm's architectures tell of places before any training: `spatial-tokens probe` on each, one report and one picture.

Weights are random, and pictures generated, so it needs no network: it shows what an architecture itself brings, not what a trained
encoder tells. Run: `python benchmarks/place_probe.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from spatial_tokens.bench.machine import as_device, describe
from spatial_tokens.diagnostics import probe
from spatial_tokens.storage.files import write_text
from spatial_tokens.visualize import save

RESULTS = Path(__file__).parent / "results" / "cpu"
ENCODERS = {  # and how each could know of places
    "vit_tiny_patch16_224": "learned embedding",
    "eva02_tiny_patch14_224": "learned and rotary embeddings",
    "vit_small_patch16_rope_224": "rotary embedding",
    "levit_128s": "a bias for each offset, strided convolutions",
    "mixer_s32_224": "a weight for each place",
    "convnext_atto": "convolutions, zero padding",
    "resnet18": "convolutions, zero padding",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=48, help="pictures [48]")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    found: dict[str, Any] = {}
    for name in ENCODERS:
        started = time.perf_counter()
        report = probe(name, limit=options.limit, random_weights=True, device=options.device)
        found[name] = {**report.to_dict(), "seconds": round(time.perf_counter() - started, 1)}
        print(report, flush=True)
    command = f"python benchmarks/place_probe.py --limit {options.limit} --device {options.device}"
    results = {"command": command, "commit": commit, "machine": describe(as_device(options.device)), "encoders": found}
    write_text(RESULTS / "place_probe.json", json.dumps(results, indent=1, allow_nan=False))
    save(plot(results), RESULTS / "place_probe.png")


def plot(results: dict[str, Any]) -> Figure:
    """Each architecture's readings over its depth, the mean of column and row."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = (("r2", "R²"), ("right", "right twelfth, beyond chance"), ("order", "which of two is further"))
    for axes, (field, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, report in results["encoders"].items():
            layers = report["layers"]
            depth = [(i + 1) / len(layers) for i in range(len(layers))]
            axes.plot(depth, [_mean(each, field) for each in layers], "o-", markersize=3, label=f"{name}: {ENCODERS[name]}")
        axes.set(title=title, xlabel="depth")
        axes.grid(True, alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    pictures = next(iter(results["encoders"].values()))["tested"]
    figure.suptitle(f"What patches tell of their places, random weights, {pictures} generated pictures tested", fontsize=10)
    return figure


def _mean(layer: dict[str, Any], field: str) -> float:
    values = []
    for axis in (layer["column"], layer["row"]):
        value, chance = axis[field]["value"], axis["chance"]
        values.append((value - chance) / (1 - chance) if field == "right" else value)
    return sum(values) / 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
