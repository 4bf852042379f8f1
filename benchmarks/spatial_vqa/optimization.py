"""How the encoder and the language model are trained from nothing: Muon for matrices, as it needs fewer steps, else AdamW."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Muon  # torch 2.9


@dataclass(frozen=True)
class Pretraining:
    """How long something is trained, and how fast."""

    examples: int
    steps: int
    batch_size: int
    learning_rate: float


class Optimization:
    """Steps on a one-cycle schedule.

    Args:
        matrices: Modules whose matrices Muon trains.
        everything: All that is trained.
        plan: How long, how fast.
    """

    def __init__(self, matrices: nn.Module, everything: nn.Module, plan: Pretraining) -> None:
        by_muon = {id(each): each for each in matrices.parameters() if each.ndim == 2}
        others = [each for each in everything.parameters() if id(each) not in by_muon]
        self.everything = everything
        self.optimizers = [
            Muon(by_muon.values(), lr=plan.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                each, plan.learning_rate, total_steps=plan.steps, pct_start=0.1, cycle_momentum=False
            )
            for each in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        """One step down a loss."""
        self.everything.zero_grad()
        loss.backward()
        for each in (*self.optimizers, *self.schedules):
            each.step()
