"""`spatial-tokens demo`: the trained model's answers, or a projector's stages on a picture; the PNGs, and where to go next."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from spatial_tokens.cli.output import print_json, print_table, print_wrapped, require_paths, shape_text
from spatial_tokens.demo.hub_model import run_model_demo
from spatial_tokens.demo.scene_text import EXAMPLE
from spatial_tokens.demo.stages import Stage, run_demo
from spatial_tokens.demo.trained import Answer, run_scene_demo
from spatial_tokens.errors import SpatialTokensError

PRESET, PROMPT = "llava-sp-cropping", "What is in this picture?"  # without a choice of the user's
TRAINED_WITHOUT = 45  # % of the questions about position in the same setting; the mean of five seeds of the evidence's MLP
STAGE_OPTIONS = ("image", "preset", "encoder", "full_size", "pretrained")  # what asks for the stages of a projector


def run(arguments: Namespace) -> None:
    """`spatial-tokens demo`."""
    require_paths(arguments, "output")
    chosen = [name for name in (*STAGE_OPTIONS, "model") if getattr(arguments, name) not in (None, False)]
    if arguments.scene is not None and chosen:
        raise SpatialTokensError(f"--scene is for the trained model, which takes no {chosen[0].replace('_', '-')}; leave one out")
    if arguments.model is not None:
        _run_model_demo(arguments)
    elif chosen:
        _run_stages_demo(arguments)
    else:
        _run_scene_demo(arguments)


def _run_scene_demo(arguments: Namespace) -> None:
    report = run_scene_demo(arguments.scene, arguments.output, prompt=arguments.prompt, seed=arguments.seed)
    if arguments.json:
        print_json(asdict(report))
        return
    for note in report.notes:
        print_wrapped(f"note: {note}")
    rows = [(each.question, each.right or "?", *_with_verdicts(each)) for each in report.answers]
    print_table(f"a scene of {', '.join(report.things)}", ("question", "right", "without", "with spatial tokens"), rows)
    _print_stages("what runs", report.stages)
    without, having = (f"{each:.1f}" if each is not None else "no" for each in report.distances)
    print_wrapped(
        f"asked where each thing is, it is {without} patches off without, {having} with (in the mean; the picture has 12 x 12)"
    )
    print_wrapped(
        "setting: an encoder whose features give wrong places. Of 1,200 questions about position (which quadrant, which third) the "
        f"model answers {report.accuracy[1]:.0f}% correctly with spatial tokens and {report.accuracy[0]:.0f}% without. A "
        f"model trained without them reaches {TRAINED_WITHOUT}%, and guessing {report.chance:.0f}%. Where features give the right "
        "places, spatial tokens made no measurable difference (to measure yours: spatial-tokens probe)"
    )
    for picture in report.pictures:
        print(f"wrote {picture}")
    print_wrapped(f"next: spatial-tokens demo --scene {EXAMPLE}; spatial-tokens demo YOUR.jpg; spatial-tokens info")


def _with_verdicts(answer: Answer) -> list[str]:
    """What was said, and whether it is right."""
    said = (answer.without_spatial, answer.with_spatial)
    return [each if answer.right is None else f"{each} {'ok   ' if each == answer.right else 'wrong'}" for each in said]


def _print_stages(title: str, stages: list[Stage]) -> None:
    rows = [(s.stage, _shape(s), f"{s.parameters:,}", f"{s.milliseconds:.1f}") for s in stages]
    print_table(title, ("stage", "shape", "parameters", "ms"), rows)


def _shape(stage: Stage) -> str:
    """A picture's size as viewers show it, width first; else a tensor's shape."""
    return f"{stage.shape[1]} x {stage.shape[0]} pixels" if stage.stage == "picture" else shape_text(stage.shape)


def _run_stages_demo(arguments: Namespace) -> None:
    preset = PRESET if arguments.preset is None else arguments.preset
    report = run_demo(
        arguments.image,
        arguments.output,
        preset=preset,
        encoder_name=arguments.encoder,
        full_size=arguments.full_size,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
    )
    if arguments.json:
        print_json(asdict(report))
        return
    _print_stages(f"{preset} on {arguments.image or 'its own picture'}", report.stages)
    for note in report.notes:
        print_wrapped(f"note: {note}")
    for picture in report.pictures:
        print(f"wrote {picture}")
    print_wrapped("next: spatial-tokens info; spatial-tokens demo YOUR.jpg --full-size (needs about 6 GB of memory)")


def _run_model_demo(arguments: Namespace) -> None:
    prompt = PROMPT if arguments.prompt is None else arguments.prompt
    preset = PRESET if arguments.preset is None else arguments.preset
    report = run_model_demo(arguments.model, arguments.image, prompt=prompt, preset=preset, seed=arguments.seed)
    if arguments.json:
        print_json(asdict(report))
        return
    columns = ("spatial tokens", "sequence", "image tokens", "spatial", "tokens/s")
    rows = [
        (r.model, str(r.sequence), str(r.image_tokens), str(r.spatial_tokens), f"{r.tokens_per_second:.1f}") for r in report.runs
    ]
    print_table(f"{report.name}: {prompt}", columns, rows)
    print_wrapped(f"spatial tokens at positions {', '.join(map(str, report.positions))}, from {report.parameters:,} parameters")
    change = f"{report.logits_change:.1%}"
    print_wrapped(f"they change the next token's logits by {change} of their norm (the weights are random: train them)")
