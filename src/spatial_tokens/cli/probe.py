"""`spatial-tokens probe`: what an encoder tells of places, as a table, JSON and a plot."""

from __future__ import annotations

import sys
from argparse import Namespace

from spatial_tokens.bench.machine import as_device, describe
from spatial_tokens.cli.output import print_json, require_paths
from spatial_tokens.cli.progress import Progress
from spatial_tokens.diagnostics import plot_probe, probe
from spatial_tokens.diagnostics.place_probe import LIMIT
from spatial_tokens.errors import MissingExtraError
from spatial_tokens.storage.files import make_directory, write_text
from spatial_tokens.visualize import save

REPORT_NAME, PLOT_NAME = "probe.json", "probe.png"


def run(arguments: Namespace) -> None:
    """`spatial-tokens probe`: the table, and the report and its plot as files."""
    require_paths(arguments, "output", "images")
    device = as_device(arguments.device)
    with Progress() as progress:
        report = probe(
            arguments.encoder,
            arguments.images,
            image_size=arguments.image_size,
            layer=arguments.layer,
            limit=arguments.limit or LIMIT,
            random_weights=arguments.random_weights,
            seed=arguments.seed,
            device=device,
            progress=progress,
        )
    machine = describe(device)
    folder = make_directory(arguments.output)
    write_text(folder / REPORT_NAME, report.to_json(machine=machine))
    written = [folder / REPORT_NAME]
    try:
        save(plot_probe(report), folder / PLOT_NAME)
        written.append(folder / PLOT_NAME)
    except MissingExtraError as error:
        print(f"no {PLOT_NAME}: {error}", file=sys.stderr)
    if arguments.json:
        print_json({**report.to_dict(), "machine": machine})
        return
    print(report)
    for path in written:
        print(f"wrote {path}")
