"""One run: a design is trained in the paper's two stages, on the same pictures in the same order, and asked about others.

A run that was stopped resumes from its last checkpoint, and ends as if it had not been stopped.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.spatial_vqa.checkpoint import Checkpoint
from benchmarks.spatial_vqa.designs import VISION, Design, install
from benchmarks.spatial_vqa.language_model import inputs_of, next_word_loss, tally
from benchmarks.spatial_vqa.layout import GRID
from benchmarks.spatial_vqa.splits import Example
from benchmarks.spatial_vqa.words import OWN, Segment, Tokens, list_of, pack, questions_of
from spatial_tokens.demo.questions import KINDS
from spatial_tokens.diagnostics import another_pictures
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING, LoRA, Parts, Stage, freeze, parameter_groups, schedule

BATCH = 32
LORA = LoRA(rank=16, alpha=32, dropout=0.0, learning_rate=2e-3)
STAGES = (
    replace(ALIGNMENT, global_batch_size=BATCH, projector_learning_rate=3e-3),
    replace(INSTRUCTION_TUNING, global_batch_size=BATCH, projector_learning_rate=1.5e-3, lora=LORA),
)


@dataclass(frozen=True)
class Material:
    """Scenes as they are trained on: the frozen encoder's features `(scenes, 1 + N, C)`, captions and questions."""

    features: torch.Tensor
    captions: list[list[Segment]]
    questions: list[list[Segment]]

    @classmethod
    def of(cls, features: torch.Tensor, examples: Sequence[Example], tokens: Tokens = OWN) -> "Material":
        """The material of some examples, for a language model that reads text so."""
        captions = [[list_of(each, tokens)] for each in examples]
        return cls(features, captions, [questions_of(each.questions, tokens) for each in examples])


@dataclass(frozen=True)
class Schedule:
    """How long the two stages last, in steps, on how many of the training scenes; and when validation is asked."""

    scenes: int
    steps: tuple[int, int]
    curve: int = 4


@dataclass(frozen=True)
class KernelRate:
    """How fast kernels learn.

    Args:
        scale: Over the rate of the projector's other layers.
        by_fan_in: Whether each matrix's is scaled down by what it reads, over the width of a patch: as Adam needs it where widths
            differ (Tensor Programs V).
    """

    scale: float = 1.0
    by_fan_in: bool = False

    def groups(self, parts: Parts, stage: Stage) -> list[dict[str, Any]]:
        """What an optimizer takes."""
        if self == COMMON:
            return parameter_groups(parts, stage)
        groups = parameter_groups(parts, replace(stage, kernel_learning_rate=self.scale * stage.projector_learning_rate))
        if not self.by_fan_in:
            return groups
        return [
            {**group, "params": [each], "lr": group["lr"] * (VISION / each[0].numel() if group["name"] == "kernels" else 1)}
            for group in groups for each in group["params"]
        ]  # fmt: skip


COMMON = KernelRate()


def run(
    design: Design,
    seed: int,
    llava: Callable[[], Any],
    material: dict[str, Material],
    plan: Schedule,
    *,
    stages: Sequence[Stage] = STAGES,
    scale: float = 1.0,
    kernel_rate: KernelRate = COMMON,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[dict[str, Any], Any]:
    """Trains a design and asks it.

    Args:
        design: The design.
        seed: Of the weights that are new and of the order of the scenes; the same order for every design.
        llava: Makes the untrained model.
        material: Of each split.
        plan: How long.
        stages: In what batches and at what rates.
        scale: Of the projector's learning rates.
        kernel_rate: Of its kernels, over those.
        checkpoint: What it resumes from, if that is there, and keeps up to date.
        progress: Told each step and its loss.

    Returns:
        What was found (accuracies on test and hard, and on test with the patch tokens, or the spatial ones, of another picture),
        and the model.
    """
    torch.manual_seed(seed)
    model = llava()
    parts = install(design, model)
    prefix = prefix_of(model)
    found: dict[str, Any] = {
        f"{name}_parameters": sum(each.numel() for part in modules for each in part.parameters())
        for name, modules in (("projector", parts.projector), ("kernel", parts.kernels))
    }
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.read() or {"stage": 0, "losses": [], "curve": [], "seconds": 0.0}
    losses, curve, seconds, started = kept["losses"], kept["curve"], kept["seconds"], time.process_time()
    order = torch.Generator().manual_seed(seed)
    for number, (stage, steps) in enumerate(zip(stages, plan.steps, strict=True)):
        stage = replace(stage, projector_learning_rate=scale * stage.projector_learning_rate)
        if stage.lora is not None:
            parts = replace(parts, lora=add_lora(model, stage.lora))
        if number < kept["stage"]:
            continue
        training = Training(model, design, parts, stage, steps, material["train"], plan.scenes, order, kernel_rate)
        if number == kept["stage"] and "training" in kept:
            training.load_state_dict(kept.pop("training"))
        asked_at = {round(steps * (i + 1) / plan.curve) for i in range(plan.curve)} if stage.lora is not None else set()
        for step, loss in training:
            losses.append(loss)
            progress(len(losses), loss)
            if step in asked_at:
                seconds += time.process_time() - started
                curve.append({"step": step, "loss": loss, "validation": ask(model, design, prefix, material["validation"])})
                model.train()
                started = time.process_time()
            if checkpoint.is_due:
                spent = seconds + time.process_time() - started
                told = {"stage": number, "losses": losses, "curve": curve, "seconds": spent}
                checkpoint.write({**told, "training": training.state_dict()})
    found["seconds"], found["steps"], found["curve"] = seconds, list(plan.steps), curve
    found["batch_size"] = stages[0].global_batch_size
    found["losses"] = [tenths(losses[: plan.steps[0]]), tenths(losses[plan.steps[0] :])]
    for split in ("test", "hard"):
        found[split] = ask(model, design, prefix, material[split])
    found["strangers"] = {}
    for kind, part in zip(("patch", "spatial"), parts.projector, strict=False):  # the MLP alone has no spatial tokens
        with another_pictures(part):
            found["strangers"][kind] = ask(model, design, prefix, material["test"])
    return found, model


def tenths(losses: Sequence[float]) -> list[float]:
    """The mean of each tenth of a stage's losses; of fewer than ten, each."""
    parts = min(10, len(losses))
    bounds = [len(losses) * i // parts for i in range(parts + 1)] if parts else []
    return [round(mean(losses[i:j]), 4) for i, j in pairwise(bounds)]


class Training:
    """Trains a model's parts in one stage, on captions or, where that has a LoRA, on questions.

    Iterating takes the steps that are left, and gives each and its loss. What the rest depends on is in `state_dict`.
    """

    def __init__(
        self,
        model: Any,
        design: Design,
        parts: Parts,
        stage: Stage,
        steps: int,
        material: Material,
        scenes: int,
        order: torch.Generator,
        kernel_rate: KernelRate = COMMON,
    ) -> None:
        freeze(model, parts)
        self.model, self.design, self.material, self.order = model, design, material, order
        self.segments = material.captions if stage.lora is None else material.questions
        self.done, self.steps, self.scenes, self.batch_size = 0, steps, scenes, stage.global_batch_size
        self.optimizer = torch.optim.AdamW(kernel_rate.groups(parts, stage))
        self.rates = schedule(self.optimizer, stage, steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        prefix = prefix_of(self.model)
        self.model.train()
        while self.done < self.steps:
            chosen = torch.randint(self.scenes, (self.batch_size,), generator=self.order).tolist()
            loss = loss_of(self.model, self.design, prefix, self.material, self.segments, chosen)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.rates.step()
            self.done += 1
            yield self.done, loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the random state too, as later stages draw new weights."""
        return {
            "done": self.done, "weights": trained_tensors(self.model), "order": self.order.get_state(),
            "random": torch.get_rng_state(), "optimizer": self.optimizer.state_dict(), "rates": self.rates.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes it what another was, whose model, stage and scenes were the same."""
        self.done = state["done"]
        for name, each in trained_tensors(self.model).items():
            each.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What is trained of a model, by name."""
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def prefix_of(model: Any) -> list[int]:
    """A picture's places in the text: those of its spatial tokens, if it has any, and of its patches."""
    attachment = getattr(model, "_spatial_attachment", None)
    spatial = [] if attachment is None else [attachment.token_id] * attachment.num_spatial_tokens
    return [model.config.text_config.bos_token_id, *spatial, *[model.config.image_token_id] * (GRID * GRID)]


def add_lora(model: Any, lora: LoRA) -> list[nn.Module]:
    """Adapters of all linear layers of the language model; what trains in them."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(config, model.model.language_model)
    layers = [each for each in model.model.language_model.modules() if isinstance(each, LoraLayer)]
    return [part for layer in layers for part in (layer.lora_A, layer.lora_B)]


def logits_of(
    model: Any, design: Design, prefix: list[int], features: torch.Tensor, segments: Sequence[list[Segment]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(B, L, V)` and labels `(B, L)`, from the end of the prefix on: no label stands before it."""
    rows = pack([prefix] * len(segments), segments).to(model.device)
    pixels = features.to(model.device).float() * (not design.blind)
    labels = rows.labels[:, len(prefix) - 1 :]
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(**inputs_of(rows), pixel_values=pixels, logits_to_keep=labels.shape[1]).logits.float()
    return logits, labels


def loss_of(
    model: Any, design: Design, prefix: list[int], material: Material, segments: Sequence[list[Segment]], chosen: list[int]
) -> torch.Tensor:
    """The loss of some scenes."""
    return next_word_loss(*logits_of(model, design, prefix, material.features[chosen], [segments[i] for i in chosen]))


@torch.inference_mode()
def ask(model: Any, design: Design, prefix: list[int], material: Material, batch_size: int = 64) -> dict[str, list[int]]:
    """How many questions of each kind the model answers rightly, of how many."""
    model.eval()
    counts = {kind: [0, 0] for kind in KINDS}
    for start in range(0, len(material.questions), batch_size):
        segments = material.questions[start : start + batch_size]
        logits, labels = logits_of(model, design, prefix, material.features[start : start + batch_size], segments)
        for kind, (right, asked) in tally(logits, labels, segments).items():
            counts[kind][0] += right
            counts[kind][1] += asked
    return counts
