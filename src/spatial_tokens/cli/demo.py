"""`spatial-tokens demo`: the stages as a table, the PNGs, and where to go next."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from spatial_tokens.cli.output import print_json, print_table, print_wrapped, require_paths, shape_text
from spatial_tokens.demo import Stage, run_demo
from spatial_tokens.demo_model import run_model_demo


def run(arguments: Namespace) -> None:
    """`spatial-tokens demo`: the stages as a table, the PNGs, and where to go next."""
    if arguments.model is not None:
        _run_model_demo(arguments)
        return
    require_paths(arguments, "output")
    report = run_demo(
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
    rows = [(s.stage, _shape(s), f"{s.parameters:,}", f"{s.milliseconds:.1f}") for s in report.stages]
    print_table(f"{arguments.preset} on {arguments.image or 'its own picture'}", ("stage", "shape", "parameters", "ms"), rows)
    for note in report.notes:
        print_wrapped(f"note: {note}")
    for picture in report.pictures:
        print(f"wrote {picture}")
    print_wrapped("next: spatial-tokens info; spatial-tokens demo YOUR.jpg --full-size; README.md for ten lines of Python")


def _shape(stage: Stage) -> str:
    """A picture's size as viewers show it, width first; else a tensor's shape."""
    return f"{stage.shape[1]} x {stage.shape[0]} pixels" if stage.stage == "picture" else shape_text(stage.shape)


def _run_model_demo(arguments: Namespace) -> None:
    report = run_model_demo(arguments.model, arguments.image, prompt=arguments.prompt, preset=arguments.preset, seed=arguments.seed)
    if arguments.json:
        print_json(asdict(report))
        return
    columns = ("spatial tokens", "sequence", "image tokens", "spatial", "tokens/s")
    rows = [
        (r.model, str(r.sequence), str(r.image_tokens), str(r.spatial_tokens), f"{r.tokens_per_second:.1f}") for r in report.runs
    ]
    print_table(f"{report.name}: {arguments.prompt}", columns, rows)
    print_wrapped(f"spatial tokens at positions {', '.join(map(str, report.positions))}, from {report.parameters:,} parameters")
    change = f"{report.logits_change:.1%}"
    print_wrapped(f"they change the next token's logits by {change} of their norm (the weights are random: train them)")
