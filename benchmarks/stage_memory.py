"""What a GPU must hold in the paper's two stages (table 11), with dense and with factorized kernels: computed, not measured.

Under ZeRO stage 2 in bfloat16 (Rajbhandari et al., 2020, section 5.2) each GPU has all weights, 2 bytes each, and its share of what
belongs to those that train: gradients of 2 bytes, and 12 bytes of AdamW (a float32 copy, the two moments). Activations, buffers
and fragments come on top.
"""

from dataclasses import dataclass, replace

from spatial_tokens import SPProjectorConfig
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING
from spatial_tokens.training.recipe import Stage

WIDTH, FEEDFORWARD, LAYERS, VOCABULARY = 4096, 11008, 32, 32000  # Vicuna-7B
VISION_WIDTH, VISION_LAYERS, PATCH, POSITIONS = 1024, 24, 14, 577  # CLIP ViT-L/14 at 336 pixels
LLAVA_MLP = (VISION_WIDTH + 1) * WIDTH + (WIDTH + 1) * WIDTH

DENSE = SPProjectorConfig.from_preset("llava-sp-cropping")
PROJECTORS = {
    "LLaVA-1.5's MLP": LLAVA_MLP,
    "dense": DENSE.num_parameters,
    "factorized": replace(DENSE, rank=128).num_parameters,
}


@dataclass(frozen=True)
class Memory:
    """Bytes that one GPU holds, and the parameters that train."""

    trained: int
    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer


def memory(stage: Stage, projector: int, gpus: int) -> Memory:
    """Of one of `gpus`, for a projector of so many parameters."""
    trained = projector + (lora(stage.lora.rank) if stage.lora is not None else 0)
    return Memory(trained, 2 * (language_model() + encoder() + trained), 2 * trained / gpus, 12 * trained / gpus)


def language_model() -> int:
    layer = 4 * WIDTH**2 + 3 * WIDTH * FEEDFORWARD + 2 * WIDTH
    return LAYERS * layer + WIDTH + 2 * VOCABULARY * WIDTH


def encoder() -> int:
    c = VISION_WIDTH
    layer = 4 * (c * c + c) + 2 * 4 * c * c + 5 * c + 2 * 2 * c
    return VISION_LAYERS * layer + 3 * PATCH**2 * c + c + POSITIONS * c + 2 * 2 * c


def lora(rank: int) -> int:
    """On every linear layer of the language model: `rank` times inputs and outputs."""
    return LAYERS * rank * (4 * 2 * WIDTH + 3 * (WIDTH + FEEDFORWARD))


def lines(gpus: int = 8) -> list[tuple[str, ...]]:
    """A row for each stage and projector, in GiB."""
    found = []
    for number, stage in enumerate((ALIGNMENT, INSTRUCTION_TUNING), start=1):
        for name, projector in PROJECTORS.items():
            one, alone = memory(stage, projector, gpus), memory(stage, projector, 1)
            figures = (one.weights, one.gradients, one.optimizer, one.total, alone.total)
            found.append((f"{number}", name, f"{one.trained / 1e6:.1f} M", *(f"{figure / 2**30:.2f}" for figure in figures)))
    return found


COLUMNS = ["stage", "kernels", "trained", "weights", "gradients", "AdamW", "all three", "on one GPU, nothing shared"]
