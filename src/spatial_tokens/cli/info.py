"""`spatial-tokens info`: a config's fields and costs, or the list of presets. Needs no torch."""

from __future__ import annotations

from argparse import Namespace

from spatial_tokens.cli.configs import read_config
from spatial_tokens.cli.output import print_json, print_table, shape_text
from spatial_tokens.config import PartCost, SPProjectorConfig
from spatial_tokens.presets import PRESETS

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def run(arguments: Namespace) -> None:
    """`spatial-tokens info`: a config's fields and costs, or the list of presets."""
    if arguments.config is None:
        _print_presets(arguments)
        return
    config = read_config(arguments.config)
    costs = config.costs(bytes_per_parameter=BYTES[arguments.dtype])
    total = PartCost(
        "total",
        sum(cost.parameters for cost in costs),
        sum(cost.bytes for cost in costs),
        sum(cost.multiply_adds for cost in costs),
    )
    if arguments.json:
        tokens = {"spatial": config.num_spatial_tokens, "patch": config.num_patches, "all": config.num_tokens}
        parts = [cost._asdict() for cost in (*costs, total)]
        print_json({"config": config.to_dict(), "tokens": tokens, "dtype": arguments.dtype, "parts": parts})
        return
    rows = [
        (cost.part, f"{cost.parameters:,}", f"{cost.bytes / 2**20:,.1f}", f"{cost.multiply_adds / 1e9:,.3f} G")
        for cost in (*costs, total)
    ]
    title = f"{arguments.config}, in {arguments.dtype}, multiply-adds of one image"
    print_table(title, ("part", "parameters", "MiB", "multiply-adds"), rows)
    for name, value in config.to_dict().items():
        print(f"{name} = {value}")
    print(f"tokens = {config.num_spatial_tokens} spatial + {config.num_patches} patch = {config.num_tokens}")


def _print_presets(arguments: Namespace) -> None:
    configs = {name: SPProjectorConfig.from_preset(name) for name in PRESETS}
    if arguments.json:
        print_json({name: config.to_dict() for name, config in configs.items()})
        return
    rows = []
    for name, config in configs.items():
        integrator = "-" if config.detail_kernel_size is None else f"kernel {config.detail_kernel_size}"
        size = f"{BYTES[arguments.dtype] * config.num_parameters / 2**20:,.0f}"
        kernels = "dense" if config.rank is None else f"rank {config.rank}"
        grid, tokens = shape_text(config.grid_size), str(config.num_spatial_tokens)
        rows.append((name, config.variant, kernels, grid, tokens, integrator, size))
    print_table(f"presets, in {arguments.dtype}", ("preset", "variant", "kernels", "grid", "tokens", "detail", "MiB"), rows)
