"""`spatial-tokens compress`: what is asked for, how far it is, and the directory that is written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spatial_tokens.adapters.timm import TimmPatchEncoder
from spatial_tokens.adapters.transformers import TransformersPatchEncoder
from spatial_tokens.checkpoint import from_llava_sp
from spatial_tokens.checks import as_path
from spatial_tokens.cli.convert import is_own_format, require_own_files
from spatial_tokens.cli.output import print_json
from spatial_tokens.cli.progress import Progress
from spatial_tokens.compression import CompressionReport, compress, quantize_int8
from spatial_tokens.compression.encoded import EncodedPictures, pictures_in
from spatial_tokens.compression.plot import plot_report
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.modules import SPProjector
from spatial_tokens.storage.directories import new_directory
from spatial_tokens.storage.files import write_text
from spatial_tokens.visualize import save

REPORT_NAME, PLOT_NAME = "compression.json", "compression.png"
LAYER, LIMIT = -2, 1000
IMAGE_OPTIONS = ("encoder", "layer", "limit")
FACTOR_OPTIONS = ("rank", "parameters", "error", "frequencies", "basis")


def run(arguments: argparse.Namespace) -> None:
    """`spatial-tokens compress`: a smaller projector, its report and its plot."""
    source, target = as_path(arguments.input, "IN"), as_path(arguments.output, "OUT")
    _check(arguments, target)
    projector = (SPProjector.from_pretrained if is_own_format(source) else from_llava_sp)(source, device=arguments.device)
    if arguments.int8:
        with new_directory(target, _require_own_files) as folder:
            small = quantize_int8(projector)
            small.save_pretrained(folder)
        _print_int8(arguments, projector, small)
        return
    with _features(arguments, projector) as features, new_directory(target, _require_own_files) as folder:
        with Progress() as progress:
            small, report = compress(
                projector,
                features,
                rank=arguments.rank,
                frequencies=arguments.frequencies,
                spatial_basis=arguments.basis or "cosine",
                parameters=arguments.parameters,
                error=arguments.error,
                progress=progress,
            )
        small.save_pretrained(folder)
        write_text(folder / REPORT_NAME, report.to_json())
        plotted = _plot(report, folder / PLOT_NAME)
    if arguments.json:
        print_json({"input": str(source), "output": str(target), **report.to_dict()})
        return
    print(report)
    print(f"wrote {target}: the projector, {REPORT_NAME}{f' and {PLOT_NAME}' if plotted else ''}")


def _check(arguments: argparse.Namespace, target: Path) -> None:
    if os.path.lexists(target):
        if not arguments.overwrite and not (target.is_dir() and not any(target.iterdir())):
            raise SpatialTokensError(f"{target} is already there; choose another OUT or give --overwrite")
        if os.path.exists(arguments.input) and os.path.samefile(arguments.input, target):
            raise SpatialTokensError(f"IN and OUT are both {target}; choose another OUT")
        _require_own_files(target)
    for name in ("images", "features"):
        if getattr(arguments, name) is not None:
            as_path(getattr(arguments, name), f"--{name}")
    for names, needed in ((IMAGE_OPTIONS, "images"), (FACTOR_OPTIONS, "images or --features")):
        given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
        if given and (arguments.int8 or (names is IMAGE_OPTIONS and arguments.images is None)):
            raise SpatialTokensError(f"{', '.join(given)} needs --{needed}")
    if arguments.images is not None and arguments.encoder is None:
        raise SpatialTokensError(
            "--images needs --encoder, the one whose features the projector reads: a timm model, or a vision model of transformers"
        )


def _require_own_files(target: Path) -> None:
    if not target.is_dir():
        raise SpatialTokensError(f"{target} is not overwritten: it is not a directory; choose another OUT")
    require_own_files(target, REPORT_NAME, PLOT_NAME)


@contextmanager
def _features(arguments: argparse.Namespace, projector: SPProjector) -> Iterator[Any]:
    """What `compress` reads."""
    if arguments.images is None:
        yield arguments.features
        return
    pictures = pictures_in(arguments.images, arguments.limit or LIMIT)
    encoder = _encoder(arguments.encoder, LAYER if arguments.layer is None else arguments.layer).to(arguments.device).eval()
    grid, channels = projector.config.grid_size, projector.config.vision_hidden_size
    if (encoder.grid_size, encoder.hidden_size) != (grid, channels):
        raise SpatialTokensError(
            f"{arguments.encoder} gives {encoder.hidden_size} channels on a grid of {encoder.grid_size}, the projector reads "
            f"{channels} on {grid}; give the encoder that it was trained with"
        )
    with EncodedPictures(pictures, encoder, encoder.transform(), arguments.device) as encoded:
        yield encoded


def _encoder(name: str, layer: int) -> TimmPatchEncoder | TransformersPatchEncoder:
    if os.path.isdir(name) or "/" in name:
        return TransformersPatchEncoder(name, layer)
    return TimmPatchEncoder(name, layer, pretrained=True)


def _plot(report: CompressionReport, path: Path) -> bool:
    try:
        save(plot_report(report), path)
    except Exception as error:  # matplotlib raises what it likes, and the weights are worth more than their plot
        print(f"no {path.name}: {reason(error)}", file=sys.stderr)
        return False
    return True


def _print_int8(arguments: argparse.Namespace, projector: SPProjector, small: SPProjector) -> None:
    sizes = [sum(_bytes(each) for each in part.parameters()) for part in (projector, small)]
    if arguments.json:
        names = ("input", "output", "bytes_before", "bytes")
        print_json(dict(zip(names, (arguments.input, arguments.output, *sizes), strict=True)))
        return
    print(f"wrote {arguments.output}: kernels of 8 bits, {sizes[0] / 2**20:,.1f} MiB to {sizes[1] / 2**20:,.1f} MiB")


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "qdata"):
        return _bytes(tensor.qdata) + _bytes(tensor.scale)
    return int(tensor.numel() * tensor.element_size())
