"""One comparison: implementations of the same thing, to be checked against each other and timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Setting = Mapping[str, "str | int"]


def label(setting: Setting) -> str:
    """A setting in a few words."""
    words = {"forward + backward": "fwd + bwd"}
    plain = ("pass", "dtype", "size")
    return ", ".join(words.get(str(v), str(v)) if name in plain else f"{name} {v}" for name, v in setting.items())


@dataclass(frozen=True)
class Candidate:
    """An implementation, built and ready.

    Args:
        run: The work that is timed.
        result: What it gave, as tensors that can be compared with the reference's; `run`'s own result when left out.
        num_compared: How many of the result's tensors the reference gives too, from the first; None for all.
        values: Further values for its row, such as parameters.
        finish: Figures that follow from its median time in seconds: tokens per second, say.
        work: The fewest bytes that it must move and the operations that it must do, where they are not the comparison's.
        in_cache: Whether it runs once, untimed, before each timed run, so that it finds in the caches what they can hold.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Sequence[torch.Tensor]] = lambda outcome: [outcome]
    num_compared: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    finish: Callable[[float], Mapping[str, float]] = lambda seconds: {}
    work: tuple[int, int] | None = None
    in_cache: bool = False


@dataclass(frozen=True)
class Comparison:
    """Implementations of one thing.

    Args:
        suite: Its suite.
        subject: What is done.
        setting: With what: batch, dtype, pass.
        candidates: Each implementation's name, and the function that builds it.
        reference: The candidate whose result the others must give; None where they compute different things.
        tolerance: How far, relative to the reference's norm.
        baseline: The candidate whose time is divided by the others' in `ratio`.
        num_bytes: The fewest bytes that must be moved.
        num_flops: The operations that must be done, two for a multiply-add.
        weights: Gives what is read side by side with the candidates, to know the bandwidth at the time; called once all are built.
        memory: Bytes that building and running needs, about; more than is free is not tried.
    """

    suite: str
    subject: str
    setting: Setting
    candidates: Mapping[str, Callable[[], Candidate]]
    reference: str | None = None
    tolerance: float = 1e-4
    baseline: str | None = None
    num_bytes: int = 0
    num_flops: int = 0
    weights: Callable[[], Sequence[torch.Tensor]] = tuple
    memory: int = 0


@dataclass(frozen=True)
class Row:
    """What was found of one candidate: its figures, or why there are none."""

    suite: str
    subject: str
    implementation: str
    setting: Setting
    values: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same row in another report."""
        return self.suite, self.subject, self.implementation, tuple(sorted(self.setting.items()))
