"""What each command does: the library called, and what it gave printed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spatial_tokens.bench.options import Options
from spatial_tokens.bench.suites import SUITES
from spatial_tokens.checkpoint import from_llava_sp, to_llava_sp
from spatial_tokens.checks import as_path
from spatial_tokens.config import PartCost, SPProjectorConfig
from spatial_tokens.errors import MissingExtraError, SpatialTokensError
from spatial_tokens.modules import SPProjector
from spatial_tokens.presets import PRESETS
from spatial_tokens.storage.files import read_text, write_tensors
from spatial_tokens.storage.pretrained import CONFIG_NAME, WEIGHTS_NAME
from spatial_tokens.storage.staging import is_staging

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")


def run_demo(arguments: argparse.Namespace) -> None:
    """`spatial-tokens demo`: the stages as a table, the PNGs, and where to go next."""
    if arguments.model is not None:
        _run_model_demo(arguments)
        return
    from spatial_tokens import demo

    _require_paths(arguments, "output")
    report = demo.run_demo(
        arguments.image,
        arguments.output,
        preset=arguments.preset,
        encoder_name=arguments.encoder,
        full_size=arguments.full_size,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
    )
    if arguments.json:
        print_json(asdict(report))
        return
    rows = [(s.stage, _shape(s.shape), f"{s.parameters:,}", f"{s.milliseconds:.1f}") for s in report.stages]
    _print_table(f"{arguments.preset} on {arguments.image or 'its own picture'}", ("stage", "shape", "parameters", "ms"), rows)
    for note in report.notes:
        print(f"note: {note}")
    for picture in report.pictures:
        print(f"wrote {picture}")
    print("next: spatial-tokens info; spatial-tokens demo YOUR.jpg --full-size; README.md for ten lines of Python")


def _run_model_demo(arguments: argparse.Namespace) -> None:
    from spatial_tokens.demo_model import run_model_demo

    report = run_model_demo(arguments.model, arguments.image, prompt=arguments.prompt, preset=arguments.preset, seed=arguments.seed)
    if arguments.json:
        print_json(asdict(report))
        return
    columns = ("spatial tokens", "sequence", "image tokens", "spatial", "tokens/s")
    rows = [
        (r.model, str(r.sequence), str(r.image_tokens), str(r.spatial_tokens), f"{r.tokens_per_second:.1f}") for r in report.runs
    ]
    _print_table(f"{report.name}: {arguments.prompt}", columns, rows)
    print(f"the spatial tokens are at {', '.join(map(str, report.positions))}; {report.parameters:,} parameters make them")
    print(f"they move the next token's logits by {report.logits_change:.1%} of their norm (the weights are random: train them)")


def run_info(arguments: argparse.Namespace) -> None:
    """`spatial-tokens info`: a config's fields and costs, or the list of presets."""
    if arguments.config is None:
        _print_presets(arguments)
        return
    config = _read_config(arguments.config)
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
    _print_table(title, ("part", "parameters", "MiB", "multiply-adds"), rows)
    for name, value in config.to_dict().items():
        print(f"{name} = {value}")
    print(f"tokens = {config.num_spatial_tokens} spatial + {config.num_patches} patch = {config.num_tokens}")


def run_bench(arguments: argparse.Namespace) -> None:
    """`spatial-tokens bench`: the suites' tables, and their files."""
    from spatial_tokens.bench.command import run
    from spatial_tokens.bench.machine import as_device

    _require_paths(arguments, "json", "plots")
    chosen: dict[str, Any] = {"device": as_device(arguments.device)}
    if arguments.dtype is not None:
        chosen["dtypes"] = (arguments.dtype,)
    if arguments.batch is not None:
        chosen["batches"] = (arguments.batch,)
    suites = list(SUITES) if arguments.suite is None else [arguments.suite]
    given = {name: getattr(arguments, name) for name in ("suite", "device", "dtype", "batch")}
    options = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    run(Options(**chosen), suites, f"spatial-tokens bench {options}".strip(), arguments.json, arguments.plots)


def run_compare(arguments: argparse.Namespace) -> None:
    """`spatial-tokens bench compare`: two reports side by side."""
    from spatial_tokens.bench.command import compare

    given = [f"--{name}" for name in ("suite", "device", "dtype", "batch", "json", "plots") if getattr(arguments, name) is not None]
    if given:
        raise SpatialTokensError(f"compare takes two reports and nothing else, got {', '.join(given)}")
    compare(arguments.before, arguments.after)


def run_convert(arguments: argparse.Namespace) -> None:
    """`spatial-tokens convert`: the direction follows from what IN is."""
    source, target = as_path(arguments.input, "IN"), as_path(arguments.output, "OUT")
    if os.path.exists(target) and not arguments.overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise SpatialTokensError(f"{target} is already there; choose another OUT or give --overwrite")
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise SpatialTokensError(f"IN and OUT are both {target}; choose another OUT")
    config = None if arguments.config is None else _read_config(arguments.config)
    _require_paths(arguments, "base", "vision")
    if arguments.base is not None:
        _convert_whole(arguments, config)
        return
    if arguments.vision is not None:
        raise SpatialTokensError("--vision goes with --base, which makes a whole model of a released folder")
    if is_own_format(source):
        if target.suffix not in WEIGHT_SUFFIXES:
            raise SpatialTokensError(
                f"{source} becomes one file of the released names; OUT must end in {' or '.join(WEIGHT_SUFFIXES)}"
            )
        projector = SPProjector.from_pretrained(source)
        write_tensors(target, to_llava_sp(projector, prefix=arguments.prefix), {"library": "spatial-tokens"})
    else:
        if target.suffix in WEIGHT_SUFFIXES:
            raise SpatialTokensError(
                f"{source} becomes a directory of {CONFIG_NAME} and {WEIGHTS_NAME}; OUT must not be a file's name"
            )
        require_own_files(target)
        projector = from_llava_sp(source, config=config)
        projector.save_pretrained(target)
    _print_converted(arguments, projector.config)


def run_serve_export(arguments: argparse.Namespace) -> None:
    """`spatial-tokens serve-export`: one folder of a base and its adapter."""
    from spatial_tokens.serving import serve_export

    out = arguments.output
    changed = serve_export(arguments.base, arguments.adapter, out, link=arguments.link)
    if arguments.json:
        print_json({"base": arguments.base, "adapter": arguments.adapter, "output": out, "config": changed})
        return
    print(f"wrote {out}: {', '.join(changed['architectures'])}")
    print(f"next, where vLLM and this library are installed: vllm serve {out}")


def _convert_whole(arguments: argparse.Namespace, config: SPProjectorConfig | None) -> None:
    from spatial_tokens.checkpoint.released_folder import convert_released

    out = arguments.output
    converted = convert_released(arguments.input, arguments.base, out, vision=arguments.vision, config=config)
    _print_converted(arguments, converted)
    if arguments.json:
        return
    print("load it, with LlavaForConditionalGeneration and AutoProcessor of transformers, load_adapter of this library:")
    print(f'  model = LlavaForConditionalGeneration.from_pretrained("{out}", dtype="auto")')
    print(f'  processor = AutoProcessor.from_pretrained("{out}")')
    print(f'  model, processor = load_adapter(model, "{out}/spatial_tokens", processor)')
    print(f"train on: python examples/train.py CONFIG.yaml --model {out} --start_from {out}; see docs/training.md")


def _require_paths(arguments: argparse.Namespace, *names: str) -> None:
    """Refuses an empty string, which `Path` would take for the working directory."""
    for name in names:
        if getattr(arguments, name) is not None:
            as_path(getattr(arguments, name), f"--{name}")


def _print_converted(arguments: argparse.Namespace, config: SPProjectorConfig) -> None:
    source, target = Path(arguments.input), Path(arguments.output)
    if arguments.json:
        print_json({"input": str(source), "output": str(target), "config": config.to_dict()})
        return
    described = ", ".join(f"{name}={value}" for name, value in config.to_dict().items())
    print(f"wrote {target}: {described}")


def require_own_files(target: Path, *names: str) -> None:
    """Raises SpatialTokensError if a directory holds files that a command does not write, or the config of something else."""
    if not target.is_dir():
        return
    others = sorted(
        path.name for path in target.iterdir() if path.name not in (CONFIG_NAME, WEIGHTS_NAME, *names) and not is_staging(path.name)
    )
    if (target / CONFIG_NAME).exists() and not _is_own_config(target / CONFIG_NAME):
        others.append(CONFIG_NAME)
    if others:
        raise SpatialTokensError(
            f"{target} is not overwritten: it holds files that the command does not write, {', '.join(others[:20])}; "
            "move them away, or choose another OUT"
        )


def is_own_format(path: Path) -> bool:
    """Whether it is a directory that `save_pretrained` wrote."""
    return os.path.isfile(path / WEIGHTS_NAME) and _is_own_config(path / CONFIG_NAME)


def _is_own_config(path: Path) -> bool:
    return os.path.isfile(path) and "spatial_hidden_size" in read_text(path)


def _read_config(name: str) -> SPProjectorConfig:
    path = as_path(name, "the config")
    if os.path.isdir(path):  # which, unlike Path.is_dir(), takes any name
        path /= CONFIG_NAME
    elif path.suffix != ".json" and not os.path.isfile(path):
        return SPProjectorConfig.from_preset(name)
    try:
        return SPProjectorConfig.from_json(read_text(path))
    except SpatialTokensError as error:
        raise error if str(path) in str(error) else SpatialTokensError(f"{path} is no config of a projector: {error}") from error


def _print_presets(arguments: argparse.Namespace) -> None:
    configs = {name: SPProjectorConfig.from_preset(name) for name in PRESETS}
    if arguments.json:
        print_json({name: config.to_dict() for name, config in configs.items()})
        return
    rows = []
    for name, config in configs.items():
        integrator = "-" if config.detail_kernel_size is None else f"kernel {config.detail_kernel_size}"
        size = f"{BYTES[arguments.dtype] * config.num_parameters / 2**20:,.0f}"
        kernels = "dense" if config.rank is None else f"rank {config.rank}"
        rows.append((name, config.variant, kernels, _shape(config.grid_size), str(config.num_spatial_tokens), integrator, size))
    _print_table(f"presets, in {arguments.dtype}", ("preset", "variant", "kernels", "grid", "tokens", "detail", "MiB"), rows)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def print_json(value: Any) -> None:
    """A result for other programs."""
    print(json.dumps(value, indent=2))


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError as error:
        raise MissingExtraError("rich (for tables; --json works without)", "viz") from error
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
