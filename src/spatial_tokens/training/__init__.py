"""Training: the paper's recipe, data in LLaVA's format, checkpoints that are completely or not at all."""

from spatial_tokens.training.recipe import (
    ALIGNMENT,
    INSTRUCTION_TUNING,
    STAGES,
    LoRA,
    Parts,
    Stage,
    freeze,
    parameter_groups,
    schedule,
)

__all__ = ["ALIGNMENT", "INSTRUCTION_TUNING", "STAGES", "LoRA", "Parts", "Stage", "freeze", "parameter_groups", "schedule"]
