"""What is run: how the encoder and the language model are trained, and which designs from which seeds on how much data."""

from dataclasses import dataclass

from benchmarks.spatial_vqa import designs
from benchmarks.spatial_vqa.designs import Design
from benchmarks.spatial_vqa.encoder import Pretraining
from benchmarks.spatial_vqa.training import Schedule


@dataclass(frozen=True)
class Job:
    """A run: a design, from a seed, on so many scenes, for so long; `scale` is of the learning rates."""

    design: str
    seed: int
    schedule: Schedule
    scale: float = 1.0

    @property
    def name(self) -> str:
        """A file's name."""
        words = "".join(each if each.isalnum() else "-" for each in self.design)
        return f"{words}_{self.schedule.scenes}_{self.scale:g}_{self.seed}"


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


def _jobs(chosen: tuple[Design, ...], seeds: int, schedule: Schedule, scale: float = 1.0) -> tuple[Job, ...]:
    return tuple(Job(design.name, seed, schedule, scale) for seed in range(seeds) for design in chosen)


FIRST = (*designs.MAIN, designs.BLIND)
REST = tuple(each for each in designs.DESIGNS.values() if each not in FIRST)
