"""The pieces of work, each in a process of its own: what one writes is whole or not there, and is not made twice."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import cache, partial
from multiprocessing import parent_process
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.spatial_vqa import attention, compressed, encoder, language_model, probes, training
from benchmarks.spatial_vqa.checkpoint import Checkpoint
from benchmarks.spatial_vqa.designs import DESIGNS
from benchmarks.spatial_vqa.language_model import LanguageModel, Pretrained
from benchmarks.spatial_vqa.model import build_llava
from benchmarks.spatial_vqa.optimization import Pretraining
from benchmarks.spatial_vqa.plans import Compression, Job, Plan
from benchmarks.spatial_vqa.splits import example, examples, pictures
from benchmarks.spatial_vqa.training import Material
from spatial_tokens.storage.files import make_directory, read_shapes, read_tensors, write_tensors, write_text

PRETRAINING_SEED = 1  # the encoder and the language model learn from scenes that are in no split of the comparison, whose seed is 0
ENCODER, LANGUAGE_MODEL = "encoder.safetensors", "language_model.safetensors"

Report = Callable[[str, int, int], None]  # of a task: its name, the steps done, and of how many
_report: Report = lambda name, done, total: None  # noqa: E731


def begin(queue: Any) -> None:
    """Makes a process ready: small products are fastest on one thread each, side by side. It ends with the one that began it."""
    global _report
    torch.set_num_threads(1)
    _report = lambda *report: queue.put(report)  # noqa: E731
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def make_features(plan: Plan, work: Path, device: str = "cpu") -> None:
    """Trains the encoder; what it then sees in every picture of the comparison."""
    _pretrain(work / ENCODER, "encoder", "train", encoder.train_encoder, plan.vision, device)
    for rolled in sorted({job.rolled for job in plan.runs}):
        usual = {split: range(count) for split, count in plan.scenes.items()}
        _look(work, features_file(work, rolled), usual, rolled, device)
    for rolled in sorted({job.rolled for job in plan.runs if plan.takes_more(job)}):
        more = range(plan.scenes["train"], max(job.schedule.scenes for job in plan.runs))
        _look(work, more_features_file(work, rolled), {"train": more}, rolled, device)


def make_language_model(plan: Plan, work: Path, device: str = "cpu") -> None:
    """Trains the language model, unless the plan has one that others have trained."""
    if isinstance(plan.language, Pretraining):
        _pretrain(work / LANGUAGE_MODEL, "language model", "told", language_model.train_language_model, plan.language, device)


def _pretrain(path: Path, name: str, split: str, train: Callable[..., torch.nn.Module], plan: Pretraining, device: str) -> None:
    if path.exists() and path.with_suffix(".json").exists():
        return
    right: list[float] = []
    started = time.perf_counter()

    def progress(share: float) -> None:
        right.append(share)
        _report(name, len(right), plan.steps)

    trained = train(examples(split, plan.examples, PRETRAINING_SEED), plan, 0, progress, device)
    facts = {"seconds": time.perf_counter() - started, "right": sum(right[-20:]) / 20}
    write_text(path.with_suffix(".json"), json.dumps(facts))
    write_tensors(path, {key: each.detach().contiguous() for key, each in trained.named_parameters()}, {})


def _look(work: Path, path: Path, scenes: dict[str, range], rolled: bool, device: str) -> None:
    wanted = {split: len(indices) for split, indices in scenes.items()}
    if path.exists() and {split: shape[0] for split, shape in read_shapes(path).items()} == wanted:
        return
    vit = load_encoder(work).to(device)
    random = Random(PRETRAINING_SEED)
    total, done, tensors = sum(map(len, scenes.values())), 0, {}
    for split, indices in scenes.items():
        found, pieces = [example(split, index) for index in indices], []
        for start in range(0, len(found), 100):
            pixels = encoder.as_pixels(torch.from_numpy(pictures(found[start : start + 100])))
            seen = encoder.rolled_features_of(vit, pixels, random) if rolled else encoder.features_of(vit, pixels)
            pieces.append(seen.to("cpu", torch.bfloat16))
            done += len(pixels)
            _report(path.stem.replace("_", " "), done, total)
        tensors[split] = torch.cat(pieces)
    write_tensors(path, tensors, {})


def features_file(work: Path, rolled: bool) -> Path:
    """Where they are kept."""
    return work / ("rolled_features.safetensors" if rolled else "features.safetensors")


def more_features_file(work: Path, rolled: bool) -> Path:
    """Where those of training scenes beyond the plan's usual ones are kept."""
    return work / f"more_{features_file(work, rolled).name}"


def load_encoder(work: Path) -> Any:
    """The trained encoder."""
    vit = encoder.build_encoder()
    vit.load_state_dict(read_tensors(work / ENCODER))
    return vit.eval().requires_grad_(False)


def load_language_model(language: Pretraining | Pretrained, work: Path) -> LanguageModel:
    """The language model: the one that was trained here, or one that others have trained."""
    if isinstance(language, Pretraining):
        return language_model.own(read_tensors(work / LANGUAGE_MODEL))
    return language.load()


@cache
def load_material(work: Path, rolled: bool, language: Pretraining | Pretrained, more: bool = False) -> dict[str, Material]:
    """Every split's, and if wanted the training scenes beyond the plan's usual ones."""
    tensors, tokens = read_tensors(features_file(work, rolled)), load_language_model(language, work).tokens
    if more:
        tensors["train"] = torch.cat([tensors["train"], read_tensors(more_features_file(work, rolled))["train"]])
    return {split: Material.of(features, examples(split, len(features)), tokens) for split, features in tensors.items()}


def make_llava(plan: Plan, work: Path, device: str = "cpu") -> Any:
    """A LLaVA whose MLP is new."""
    return build_llava(load_encoder(work), load_language_model(plan.language, work)).to(device)


def run_job(job: Job, plan: Plan, work: Path, device: str = "cpu") -> None:
    """A run; its results are written at its end, and before them its model, if the plan keeps it."""
    design, material = DESIGNS[job.design], load_material(work, job.rolled, plan.language, plan.takes_more(job))
    total, checkpoint = sum(job.schedule.steps), Checkpoint(work / "runs" / f"{job.name}.pt")
    found, model = training.run(
        design, job.seed, partial(make_llava, plan, work, device), material, job.schedule, stages=plan.stages, scale=job.scale,
        kernel_rate=job.kernel_rate, checkpoint=checkpoint, progress=lambda step, _: _report(job.name, step, total),
    )  # fmt: skip
    if getattr(getattr(model, "spatial_tokens", None), "integrator", None) is not None:
        found["attention"] = attention.measure_attention(model, material["test"].features)
    if job in plan.kept:
        make_directory(model_file(work, job).parent)
        write_tensors(model_file(work, job), training.trained_tensors(model), {})
    _write(job, work, {**asdict(job), **found})
    checkpoint.remove()


def run_compression(job: Compression, plan: Plan, work: Path, device: str = "cpu") -> None:
    """The compression of a run's model, which was kept."""
    steps, material = itertools.count(1), load_material(work, job.of.rolled, plan.language, plan.takes_more(job.of))
    found = compressed.run(
        job, partial(make_llava, plan, work, device), material, read_tensors(model_file(work, job.of)), plan.stages[1],
        progress=lambda: _report(job.name, next(steps), 2 * job.tuning),
    )  # fmt: skip
    _write(job, work, {**asdict(job), **found})


def model_file(work: Path, job: Job) -> Path:
    """Where what a run has trained is kept."""
    return work / "models" / f"{job.name}.safetensors"


def _write(job: Job | Compression, work: Path, found: dict[str, Any]) -> None:
    write_text(work / "runs" / f"{job.name}.json", json.dumps({**found, "date": date.today().isoformat()}))


def read_words(work: Path) -> dict[str, dict[str, list[int]]]:
    """What the language model answers rightly from texts that are laid out, without a picture: what there is to reach."""
    model = language_model.load(read_tensors(work / LANGUAGE_MODEL))
    return {split: language_model.ask(model, examples(split, 300)) for split in ("test", "hard")}


def read_patches(work: Path) -> dict[str, dict[str, list[float]]]:
    """What the encoder's patches tell, of features that know their places and of rolled ones, where there are any."""
    found = {}
    for name, rolled in (("features", False), ("rolled", True)):
        if features_file(work, rolled).exists():
            tensors = read_tensors(features_file(work, rolled))
            train, asked = (
                (tensors[split][:400], examples(split, min(400, len(tensors[split])))) for split in ("train", "validation")
            )
            found[name] = probes.read_patches(train, asked)
    return found
