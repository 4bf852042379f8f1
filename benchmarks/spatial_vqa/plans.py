"""What is run: of which encoder and language model, and which designs from which seeds on how much data."""

from dataclasses import dataclass, replace

from benchmarks.spatial_vqa import designs
from benchmarks.spatial_vqa.designs import Design
from benchmarks.spatial_vqa.encoder import Pretraining
from benchmarks.spatial_vqa.language_model import Pretrained
from benchmarks.spatial_vqa.smollm2 import SmolLM2
from benchmarks.spatial_vqa.training import BATCH, COMMON, STAGES, KernelRate, Schedule
from spatial_tokens.grid import SpatialBasis
from spatial_tokens.training import Stage


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        design: A design's name.
        seed: Of new weights and of the order of scenes.
        schedule: For how long, on how many scenes.
        scale: Of the projector's learning rates.
        rolled: With features that tell wrong places: rolled ones.
        kernel_rate: Of its kernels, over the projector's.
    """

    design: str
    seed: int
    schedule: Schedule
    scale: float = 1.0
    rolled: bool = False
    kernel_rate: KernelRate = COMMON

    @property
    def name(self) -> str:
        """A file's name."""
        words = "".join(each if each.isalnum() else "-" for each in self.design)
        steps = "+".join(map(str, self.schedule.steps))
        rate, by_fan_in = self.kernel_rate.scale, self.kernel_rate.by_fan_in
        kernels = "" if self.kernel_rate == COMMON else f"_kernels{rate:g}{'-by-fan-in' * by_fan_in}"
        return f"{words}_{self.schedule.scenes}_{steps}_{self.scale:g}{kernels}{'_rolled' * self.rolled}_{self.seed}"


@dataclass(frozen=True)
class Compression:
    """What a run has trained, with dense kernels that are compressed; asked at once, and after a brief tuning.

    Args:
        of: The run.
        frequencies: Cosines of each side of a kernel's window.
        rank: Channels that kernels see.
        spatial_basis: What the maps on the window are.
        tuning: Steps, of the brief tuning.
    """

    of: Job
    frequencies: int
    rank: int
    spatial_basis: SpatialBasis = "cosine"
    tuning: int = 200

    @property
    def name(self) -> str:
        """A file's name."""
        basis = "" if self.spatial_basis == "cosine" else f"-{self.spatial_basis}"
        return f"{self.of.name}_compressed-{self.frequencies}x{self.frequencies}-{self.rank}{basis}"


@dataclass(frozen=True)
class Plan:
    """What the encoder and the language model are given, the scenes that are asked about, and the runs, the most telling first.

    Args:
        name: Its name.
        vision: How the encoder is trained.
        language: How the language model is; or one that others have trained.
        held_out: Scenes of each split that is not trained on.
        jobs: The runs. A model is compressed after all that stand before it are done.
        folder: Where it works: another plan's, that has the same encoder, language model and scenes; its own unless given.
        batch_size: Pictures a step of the runs.
    """

    name: str
    vision: Pretraining
    language: Pretraining | Pretrained
    held_out: dict[str, int]
    jobs: tuple[Job | Compression, ...]
    folder: str | None = None
    batch_size: int = BATCH

    @property
    def runs(self) -> tuple[Job, ...]:
        """Those that train a design."""
        return tuple(job for job in self.jobs if isinstance(job, Job))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of a run."""
        return tuple(replace(stage, global_batch_size=self.batch_size) for stage in STAGES)

    @property
    def kept(self) -> set[Job]:
        """The runs whose models are kept, to be compressed."""
        return {job.of for job in self.jobs if isinstance(job, Compression)}

    @property
    def scenes(self) -> dict[str, int]:
        """Of each split; to train on, those of the first run."""
        return {"train": self.runs[0].schedule.scenes, **self.held_out}

    def takes_more(self, job: Job) -> bool:
        """Whether a run is trained on more scenes than the first one."""
        return job.schedule.scenes > self.scenes["train"]


def _jobs(
    chosen: tuple[Design, ...],
    seeds: range,
    schedule: Schedule,
    *,
    scale: float | None = None,
    rolled: bool = False,
    rates: tuple[KernelRate, ...] = (COMMON,),
) -> tuple[Job, ...]:
    return tuple(
        Job(each.name, seed, schedule, scale or each.scale, rolled, rate) for seed in seeds for rate in rates for each in chosen
    )


VISION = Pretraining(examples=10_000, steps=1000, batch_size=48, learning_rate=3e-3)
LANGUAGE = Pretraining(examples=20_000, steps=1600, batch_size=32, learning_rate=4e-3)
LONG, FEW, QUICK = Schedule(5000, (250, 400)), Schedule(1000, (250, 400)), Schedule(4000, (200, 300), curve=3)
LONGER = Schedule(5000, (250, 2400), curve=8)
TRIAL = Schedule(200, (20, 40), curve=2)
MLP_AND_DENSE = (designs.MLP, designs.CROPPING, designs.POOLING)
CONTROLS = (designs.DEEP, designs.LEARNED)
DETAIL_AND_TOKENS = (*designs.DETAIL, *designs.TOKENS)
MEDIUM = Schedule(5000, (250, 800))
MORE_SCENES = replace(LONGER, scenes=20_000)
DENSE = (designs.CROPPING, designs.POOLING)
ALTERNATIVES = (designs.FACTORIZED_POOLING, designs.BINS, designs.PLACES)
LOWEST_RATES = (KernelRate(0.1), KernelRate(0.01))  # 3e-4, 3e-5; every design's rates are the same ones
LOW_RATES = (*LOWEST_RATES, KernelRate(0.03))
HIGHER_RATE = (KernelRate(30),)  # a core reads 144 numbers at most, a dense kernel thousands
MORE_RATES = (KernelRate(by_fan_in=True), KernelRate(0.3), KernelRate(0.003))
OTHER_RATE = tuple(job for each in designs.MAIN for job in _jobs((each,), range(3), LONG, scale=0.25 if each.scale == 1 else 1.0))


def _compressions(seeds: range, schedule: Schedule) -> tuple[Compression, ...]:
    """Dense kernels at a 30th, a 29th, a 57th, a 114th and a 224th of their size."""
    runs = _jobs((designs.CROPPING,), seeds, schedule, rolled=True)
    return tuple(Compression(job, *factors) for job in runs for factors in ((4, 18), (3, 32), (3, 16), (3, 8), (2, 8)))


PLANS = {
    "trial": Plan(
        name="trial", held_out={"validation": 16, "test": 32, "hard": 32},
        vision=replace(VISION, examples=1000, steps=100), language=replace(LANGUAGE, examples=1000, steps=100),
        jobs=_jobs((designs.MLP, designs.CROPPING), range(1), TRIAL),
    ),
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
            *_jobs(MLP_AND_DENSE, range(3), LONGER, rolled=True),
            *OTHER_RATE,
            *_jobs(CONTROLS, range(3), LONGER, rolled=True),
            *_jobs(MLP_AND_DENSE, range(3), LONGER),
            *_jobs(DETAIL_AND_TOKENS, range(3), LONG),
            *_jobs(designs.TRANSFORMERS, range(3), LONG),
            *_jobs(MLP_AND_DENSE, range(3), FEW),
            *_jobs(designs.WITHOUT_A_PYRAMID, range(3), LONGER, rolled=True),
            *_jobs(MLP_AND_DENSE, range(3, 5), LONGER, rolled=True),
            *_jobs(designs.MAIN, range(3, 5), LONG),
            *_jobs((designs.MLP, designs.LEARNED, designs.POOLING), range(3, 4), LONGER),  # the last two learned little in LONG
        ),
    ),
    "factorized": Plan(
        name="factorized", folder="full", vision=VISION, language=LANGUAGE,
        held_out={"validation": 200, "test": 600, "hard": 600},
        jobs=(
            *_jobs((designs.FACTORIZED, designs.WIDER, designs.PLACES), range(3), LONGER, rolled=True),  # `full` has the dense ones
            *_jobs((designs.FACTORIZED, designs.CROPPING, designs.MLP), range(3), MORE_SCENES, rolled=True),
            *_jobs((designs.CROPPING,), range(3), LONGER, rolled=True),  # once more, as their models are compressed
            *_compressions(range(3), LONGER),
            *_compressions(range(3), MORE_SCENES),
            *_jobs((designs.CROPPING, designs.FACTORIZED, designs.PLACES, designs.MLP), range(3), MEDIUM, rolled=True),
            *_jobs((designs.CROPPING, designs.FACTORIZED), range(3), MEDIUM, rolled=True, rates=LOW_RATES),
            *_jobs((designs.BINS, designs.FACTORIZED_POOLING), range(3), LONGER, rolled=True),
            *_jobs(designs.SIZES, range(3), LONGER, rolled=True),
            *_jobs((designs.FACTORIZED, *ALTERNATIVES), range(3), LONG),
            *_jobs((*DENSE, designs.FACTORIZED), range(3), LONG, rates=LOW_RATES),
            *_jobs((designs.POOLING, designs.FACTORIZED_POOLING, designs.BINS), range(3), MEDIUM, rolled=True),
            *_jobs((designs.CROPPING, designs.FACTORIZED), range(3), LONGER, rolled=True, rates=LOWEST_RATES),
            *_jobs((designs.POOLING, *ALTERNATIVES), range(3), MEDIUM, rolled=True, rates=LOW_RATES),
            *_jobs((*DENSE, designs.FACTORIZED, *ALTERNATIVES), range(3), MEDIUM, rolled=True, rates=MORE_RATES),
            *_jobs((*DENSE, designs.FACTORIZED, *ALTERNATIVES), range(3), LONGER, rolled=True, rates=HIGHER_RATE),
            *_jobs((designs.POOLING, *ALTERNATIVES), range(3), LONGER, rolled=True, rates=LOWEST_RATES),
            *_jobs(ALTERNATIVES, range(3), LONG, rates=LOW_RATES),
            *_jobs((designs.DETAIL[0], designs.FACTORIZED_DETAIL), range(3), LONGER, rolled=True),
        ),
    ),
}  # fmt: skip


def with_smollm2(plan: Plan) -> Plan:
    """A plan's runs with SmolLM2, a pretrained language model of 135 M parameters; in a folder of their own.

    Batches are half as large. A step of 16 pictures takes a core about 18 seconds, by what a step of 4 took.
    """
    name, folder = (each and f"{each}-smollm2" for each in (plan.name, plan.folder))
    return replace(plan, name=name, folder=folder, language=SmolLM2(), batch_size=16)
