"""What is run: how the encoder and the language model are trained, and which designs from which seeds on how much data."""

from dataclasses import dataclass, replace

from benchmarks.spatial_vqa import designs
from benchmarks.spatial_vqa.designs import Design
from benchmarks.spatial_vqa.encoder import Pretraining
from benchmarks.spatial_vqa.training import Schedule


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        design: A design's name.
        seed: Of new weights and of the order of scenes.
        schedule: For how long, on how many scenes.
        scale: Of the projector's learning rates.
        rolled: With features that tell wrong places: rolled ones.
    """

    design: str
    seed: int
    schedule: Schedule
    scale: float = 1.0
    rolled: bool = False

    @property
    def name(self) -> str:
        """A file's name."""
        words = "".join(each if each.isalnum() else "-" for each in self.design)
        steps = "+".join(map(str, self.schedule.steps))
        return f"{words}_{self.schedule.scenes}_{steps}_{self.scale:g}{'_rolled' * self.rolled}_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What the encoder and the language model are given, the scenes that are asked about, and the runs, the most telling first."""

    name: str
    vision: Pretraining
    language: Pretraining
    held_out: dict[str, int]
    jobs: tuple[Job, ...]

    @property
    def scenes(self) -> dict[str, int]:
        """Of each split."""
        return {"train": max(job.schedule.scenes for job in self.jobs), **self.held_out}


def _jobs(
    chosen: tuple[Design, ...], seeds: range, schedule: Schedule, *, scale: float | None = None, rolled: bool = False
) -> tuple[Job, ...]:
    return tuple(Job(each.name, seed, schedule, scale or each.scale, rolled) for seed in seeds for each in chosen)


VISION = Pretraining(examples=10_000, steps=1000, batch_size=48, learning_rate=3e-3)
LANGUAGE = Pretraining(examples=20_000, steps=1600, batch_size=32, learning_rate=4e-3)
LONG, FEW, QUICK = Schedule(5000, (250, 400)), Schedule(1000, (250, 400)), Schedule(4000, (200, 300), curve=3)
LONGER = Schedule(5000, (250, 2400), curve=8)
THREE = (designs.MLP, designs.CROPPING, designs.POOLING)
CONTROLS = (designs.DEEP, designs.LEARNED)
REST = (*designs.DETAIL, *designs.TOKENS)
OTHER_RATE = tuple(job for each in designs.MAIN for job in _jobs((each,), range(3), LONG, scale=0.25 if each.scale == 1 else 1.0))

PLANS = {
    "quick": Plan(
        name="quick", held_out={"validation": 200, "test": 400, "hard": 400},
        vision=replace(VISION, examples=6000, steps=800), language=replace(LANGUAGE, examples=12_000, steps=1100),
        jobs=_jobs((designs.MLP, designs.LEARNED, designs.CROPPING, designs.POOLING), range(1), QUICK),
    ),
    "full": Plan(
        name="full", vision=VISION, language=LANGUAGE, held_out={"validation": 200, "test": 600, "hard": 600},
        jobs=(
            *_jobs((*designs.MAIN, designs.BLIND), range(1), LONG),
            *_jobs(designs.MAIN, range(1, 3), LONG),
            *_jobs(THREE, range(3), LONGER, rolled=True),
            *OTHER_RATE,
            *_jobs(CONTROLS, range(3), LONGER, rolled=True),
            *_jobs(THREE, range(3), LONGER),
            *_jobs(REST, range(3), LONG),
            *_jobs(designs.TRANSFORMERS, range(3), LONG),
            *_jobs(THREE, range(3), FEW),
            *_jobs(designs.WITHOUT_A_PYRAMID, range(3), LONGER, rolled=True),
            *_jobs(THREE, range(3, 5), LONGER, rolled=True),
            *_jobs(designs.MAIN, range(3, 5), LONG),
            *_jobs((designs.MLP, designs.LEARNED, designs.POOLING), range(3, 4), LONGER),  # the last two learned little in LONG
        ),
    ),
}  # fmt: skip
