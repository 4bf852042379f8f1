"""`spatial-tokens export`: a projector as a program for another runtime, of the kind that OUT's name says."""

from __future__ import annotations

import os
from argparse import Namespace

import torch

from spatial_tokens.checks import as_path
from spatial_tokens.cli.convert import is_own_format
from spatial_tokens.cli.output import print_json
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.export import compile_package, data_files, export_onnx, export_pt2
from spatial_tokens.modules import SPProjector


def run(arguments: Namespace) -> None:
    """`spatial-tokens export`: reads a projector, writes its program."""
    source, target = as_path(arguments.input, "IN"), as_path(arguments.output, "OUT")
    if target.suffix not in (".onnx", ".pt2") or (arguments.compile and target.suffix != ".pt2"):
        wanted = ".pt2 with --compile" if arguments.compile else ".onnx or .pt2"
        raise SpatialTokensError(f"OUT must end in {wanted}, got {target}")
    if os.path.lexists(target) and not arguments.overwrite:
        raise SpatialTokensError(f"{target} is already there; choose another OUT or give --overwrite")
    if not is_own_format(source):
        raise SpatialTokensError(f"{source} is no directory of this library's format; make one: spatial-tokens convert IN OUT")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    projector = SPProjector.from_pretrained(source, dtype=dtype)
    write = compile_package if arguments.compile else export_onnx if target.suffix == ".onnx" else export_pt2
    write(projector, target, grid_size=None if arguments.grid is None else tuple(arguments.grid))
    size = sum(map(os.path.getsize, (target, *data_files(target))))
    if arguments.json:
        print_json({"input": str(source), "output": str(target), "bytes": size})
        return
    print(f"wrote {target}, {size / 2**20:,.1f} MiB")
