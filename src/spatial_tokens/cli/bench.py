"""`spatial-tokens bench`: the suites' tables and their files, and two reports side by side."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from spatial_tokens.bench.command import compare, run
from spatial_tokens.bench.machine import as_device
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.suites import SUITES
from spatial_tokens.cli.output import require_paths
from spatial_tokens.errors import SpatialTokensError


def run_bench(arguments: Namespace) -> None:
    """`spatial-tokens bench`: the suites' tables, and their files."""
    require_paths(arguments, "json", "plots")
    chosen: dict[str, Any] = {"device": as_device(arguments.device)}
    if arguments.dtype is not None:
        chosen["dtypes"] = (arguments.dtype,)
    if arguments.batch is not None:
        chosen["batches"] = (arguments.batch,)
    suites = list(SUITES) if arguments.suite is None else [arguments.suite]
    given = {name: getattr(arguments, name) for name in ("suite", "device", "dtype", "batch")}
    options = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    run(Options(**chosen), suites, f"spatial-tokens bench {options}".strip(), arguments.json, arguments.plots)


def run_compare(arguments: Namespace) -> None:
    """`spatial-tokens bench compare`: two reports side by side."""
    given = [f"--{name}" for name in ("suite", "device", "dtype", "batch", "json", "plots") if getattr(arguments, name) is not None]
    if given:
        raise SpatialTokensError(f"compare takes two reports and nothing else, got {', '.join(given)}")
    compare(arguments.before, arguments.after)
