"""Makes the small model that the package ships, from pretraining to the files, and measures it.

python benchmarks/spatial_vqa/demo_model.py     an hour of one core; minutes where run.py has left the run that it starts from

It starts from a run of Spatial VQA: cropping, rolled features, the long tuning. That is made small, and tuned briefly:

- The dense kernels are compressed to factorized ones.
- The patches' MLP is brought to LLaVA's width by learning its outputs, so that transformers' own LLaVA can hold it.
- In the tuning a third of each batch has no spatial tokens, so that the model answers in both ways. Answers end with </s>, and
  beside the questions there are records: after a thing's name its size, column and row.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # in place of this folder

import torch

from benchmarks.spatial_vqa import demo_files, tasks
from benchmarks.spatial_vqa.compressed import restore
from benchmarks.spatial_vqa.designs import CROPPING
from benchmarks.spatial_vqa.language_model import inputs_of, next_word_loss, tally
from benchmarks.spatial_vqa.plans import LONGER, PLANS, Job, Plan
from benchmarks.spatial_vqa.splits import Example, examples
from benchmarks.spatial_vqa.training import STAGES, prefix_of
from benchmarks.spatial_vqa.words import END, IGNORED, Rows, Segment, encode, pack, questions_of
from spatial_tokens.adapters.huggingface.ready import TRAINED
from spatial_tokens.compression import compress
from spatial_tokens.demo.questions import KINDS, record
from spatial_tokens.storage.files import make_directory, read_tensors
from spatial_tokens.training import Parts, freeze, parameter_groups, schedule

SEED = 2
JOB = Job(CROPPING.name, SEED, LONGER, rolled=True)
FACTORS = {"frequencies": (2, 4, 5, 5, 5, 5), "rank": 64}  # half a million parameters of three million
SCENES = {"train": 2000, "validation": 60, "test": 600}
DISTILLATION = 1000  # steps of 2048 patches
TUNING = replace(STAGES[1], projector_learning_rate=7.5e-4, lora=replace(STAGES[1].lora, learning_rate=1e-3))
STEPS = 100
WITHOUT = 10  # of a batch's 32 pictures
SPATIAL_TOKENS = 6


def main(arguments: list[str]) -> None:
    """Makes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("spatial-vqa-work"), help="the work folder of run.py [spatial-vqa-work]")
    parser.add_argument("--output", type=Path, default=TRAINED, help="the folder to write [the package's]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan, work = PLANS["factorized"], make_directory(options.work / "full")
    tasks.make_language_model(plan, work)
    tasks.make_features(plan, work)
    if not tasks.model_file(work, JOB).exists():
        make_directory(work / "runs")
        tasks.run_job(JOB, plan, work)
    started = time.process_time()
    model, facts = train(plan, work)
    facts |= {"run": JOB.name, "seed": SEED, "steps": STEPS, "seconds": round(time.process_time() - started)}
    demo_files.write(options.output, model, facts)
    demo_files.measure(options.output, examples("test", SCENES["test"]), count_right)


def train(plan: Plan, work: Path) -> tuple[Any, dict[str, Any]]:
    """The model after all that, LoRA not yet merged; and what was lost on the way."""
    torch.manual_seed(SEED)
    features = {
        split: each[: SCENES[split]]
        for split, each in read_tensors(tasks.features_file(work, rolled=True)).items()
        if split != "hard"
    }
    scenes = {split: examples(split, SCENES[split]) for split in ("train", "validation")}
    asked = [questions_of(each.questions) for each in scenes["validation"]]

    def report(what: str) -> None:
        for name, spatial in (("without", False), ("with", True)):
            print(f"{what}, {name}: {_shares(count_right(model, features['validation'], asked, spatial))}", flush=True)

    model, parts = restore(CROPPING, lambda: tasks.make_llava(plan, work), read_tensors(tasks.model_file(work, JOB)))
    model.spatial_tokens, found = compress(model.spatial_tokens, features["train"][:, 1:].float(), **FACTORS)
    mlp = model.model.multi_modal_projector
    narrow, missed = distilled(mlp, features["train"][:, 1:])
    mlp.linear_1, mlp.linear_2 = narrow.linear_1, narrow.linear_2  # the module itself has the hooks of the spatial tokens
    facts = {"unexplained": found.unexplained, "mlp_unexplained": missed, "kernel_parameters": found.parameters}
    report(f"small ({facts})")
    parts = Parts([mlp, model.spatial_tokens], lora=parts.lora)
    freeze(model, parts)
    optimizer = torch.optim.AdamW(parameter_groups(parts, TUNING))
    rates = schedule(optimizer, TUNING, STEPS)
    for step in range(1, STEPS + 1):
        model.train()
        chosen = torch.randint(SCENES["train"], (TUNING.global_batch_size,)).tolist()
        rows = hide_spatial_tokens(
            pack([prefix_of(model)] * len(chosen), [_segments_of(scenes["train"][i]) for i in chosen]), WITHOUT
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs_of(rows), pixel_values=features["train"][chosen].float()).logits.float()
        loss = next_word_loss(logits, rows.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 10 == 0:
            right = (logits.argmax(-1) == rows.labels)[rows.labels != IGNORED].float().mean()
            print(f"{step} of {STEPS}: loss {loss:.3f}, right {right:.0%}, {time.process_time():.0f} s", flush=True)
    report("tuned")
    return model.eval(), facts


def distilled(mlp: Any, features: torch.Tensor) -> tuple[Any, float]:
    """An MLP of LLaVA's width that approximates a wider one on features `(B, N, C)`; and the share of variance it misses."""
    narrow = type(mlp)(demo_files.llava_config())
    optimizer = torch.optim.AdamW(narrow.parameters(), 3e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=DISTILLATION)
    patches = features.flatten(0, 1)
    for _ in range(DISTILLATION):
        batch = patches[torch.randint(len(patches), (2048,))].float()
        with torch.no_grad():
            wanted = mlp(batch)
        missed = (narrow(batch) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        optimizer.zero_grad()
        missed.backward()
        optimizer.step()
        rates.step()
    return narrow, missed.item()


def hide_spatial_tokens(rows: Rows, count: int) -> Rows:
    """Rows of which the first `count` are as if they had no spatial tokens: nothing sees them, and nothing counts them."""
    positions, mask = rows.positions.clone(), rows.mask.clone()
    spatial = slice(1, 1 + SPATIAL_TOKENS)  # after the token that every row starts with
    positions[:count, spatial.stop :] -= SPATIAL_TOKENS
    mask[:count, :, :, spatial] = False
    mask |= torch.eye(mask.shape[-1], dtype=torch.bool)
    return replace(rows, positions=positions.clamp(min=0), mask=mask)


@torch.inference_mode()
def count_right(
    model: Any, pictures_or_features: torch.Tensor, asked: Sequence[list[Segment]], spatial: bool, batch_size: int = 50
) -> dict[str, list[int]]:
    """How many questions of each kind are answered rightly, of how many, with or without spatial tokens."""
    model.eval()
    counts = {kind: [0, 0] for kind in KINDS}
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        rows = hide_spatial_tokens(pack([prefix_of(model)] * len(batch), batch), 0 if spatial else len(batch))
        logits = model(**inputs_of(rows), pixel_values=pictures_or_features[start : start + batch_size].float()).logits
        for kind, (right, of) in tally(logits, rows.labels, batch).items():
            counts[kind][0] += right
            counts[kind][1] += of
    return counts


def _segments_of(example: Example) -> list[Segment]:
    """Questions whose answers end, so that `generate` does; and records, which end too."""
    questions = [replace(each, ids=[*each.ids, *encode(END)], learned=each.learned + 1) for each in questions_of(example.questions)]
    return [*questions, *(Segment(encode(f"{each.name} {record(each)} {END}"), 4) for each in example.scene.things)]


def _shares(counts: dict[str, list[int]]) -> str:
    return ", ".join(f"{kind} {right / of:.0%}" for kind, (right, of) in counts.items())


if __name__ == "__main__":
    main(sys.argv[1:])
