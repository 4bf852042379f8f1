"""The paper's two stages (table 11): what trains, how fast, on what schedule. For any optimizer and any training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, cos, inf, isfinite, pi
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.grid import check_positive
from spatial_tokens.storage.int8 import quantized_parameter


def _require_ranges(**ranges: tuple[Any, float, float]) -> None:
    for name, (value, least, most) in ranges.items():
        if not _is_finite(value) or not least <= value <= most:
            expected = f"from {least} to {most}" if most < inf else f"that is finite and at least {least}"
            raise SpatialTokensError(f"{name} must be a number {expected}, got {shown(value)}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The language model's adapters.

    Args:
        rank: Their rank.
        alpha: Their scale is `alpha / rank`.
        dropout: Of their input; LLaVA's, as the paper names none.
        learning_rate: Theirs.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        _require_ranges(alpha=(self.alpha, 0, inf), dropout=(self.dropout, 0, 1), learning_rate=(self.learning_rate, 0, inf))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: AdamW, a cosine schedule with a linear warm-up.

    Args:
        name: Its name.
        global_batch_size: Samples a step, over all processes and accumulated passes.
        projector_learning_rate: The projector's.
        kernel_learning_rate: Its kernels' (`Parts.kernels`), which read more channels than its other layers; None: the projector's.
        lora: The language model's adapters; None: it is frozen.
        warmup_ratio: Share of the steps on which the learning rate rises to its full value.
        weight_decay: Of matrices; biases and norms never decay.
        num_epochs: Passes over the data.

    Raises:
        SpatialTokensError: If a number is out of range.
    """

    name: str
    global_batch_size: int
    projector_learning_rate: float
    lora: LoRA | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    num_epochs: float = 1
    kernel_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_positive(global_batch_size=self.global_batch_size)
        _require_ranges(
            projector_learning_rate=(self.projector_learning_rate, 0, inf),
            warmup_ratio=(self.warmup_ratio, 0, 1),
            weight_decay=(self.weight_decay, 0, inf),
            num_epochs=(self.num_epochs, 0, inf),
        )
        if self.kernel_learning_rate is not None:
            _require_ranges(kernel_learning_rate=(self.kernel_learning_rate, 0, inf))
        if self.num_epochs == 0:
            raise SpatialTokensError("num_epochs must be greater than 0, got 0")
        if self.lora is not None and not isinstance(self.lora, LoRA):
            raise SpatialTokensError(f"lora must be a LoRA or None, got {shown(self.lora)}")


ALIGNMENT = Stage(name="alignment", global_batch_size=256, projector_learning_rate=1e-3)
INSTRUCTION_TUNING = Stage(name="instruction_tuning", global_batch_size=128, projector_learning_rate=2e-5, lora=LoRA())
STAGES = {stage.name: stage for stage in (ALIGNMENT, INSTRUCTION_TUNING)}


@dataclass(frozen=True)
class Parts:
    """The modules of a model that train; all else is frozen.

    Args:
        projector: The projector's: spatial tokens, and the MLP of the patches where it trains too, as in the paper.
        lora: The language model's adapters.
        kernels: Modules of the projector that read windows of patches: a stage may give them a learning rate of their own.
    """

    projector: Sequence[nn.Module]
    lora: Sequence[nn.Module] = ()
    kernels: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        for name, modules in (("projector", self.projector), ("lora", self.lora), ("kernels", self.kernels)):
            if not isinstance(modules, Sequence) or not all(isinstance(module, nn.Module) for module in modules):
                raise SpatialTokensError(f"{name} must be a list of modules, got {shown(modules)}")


def freeze(model: nn.Module, parts: Parts) -> None:
    """Leaves a gradient to the parameters of the parts and to no other of the model.

    Raises:
        SpatialTokensError: If a parameter of the parts is quantized.
    """
    for part in (*parts.projector, *parts.lora):
        if (name := quantized_parameter(part)) is not None:
            raise SpatialTokensError(f"{name} of a {type(part).__name__} is quantized and cannot be trained; leave it unquantized")
    model.requires_grad_(False)
    for part in (*parts.projector, *parts.lora):
        part.requires_grad_(True)


def parameter_groups(parts: Parts, stage: Stage) -> list[dict[str, Any]]:
    """The groups that an optimizer takes, each with its name, learning rate and weight decay.

    Raises:
        SpatialTokensError: If a parameter is in two parts, a part has none that trains, or the stage has no use for one.

    Examples:
        >>> head = nn.Linear(4, 4)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in parameter_groups(Parts([head]), ALIGNMENT)]
        [('projector', 0.001, 2)]
    """
    kernels = {id(each) for each in _trained(parts.kernels)}
    if kernels - {id(each) for each in _trained(parts.projector)}:
        raise SpatialTokensError("a parameter of kernels is not the projector's; kernels are modules of it")
    own_rate = stage.kernel_learning_rate
    if own_rate is not None and not kernels:
        raise SpatialTokensError(f"the stage {stage.name!r} has a learning rate for kernels, but no kernel requires a gradient")
    rates = {"projector": stage.projector_learning_rate, "lora": stage.lora.learning_rate if stage.lora is not None else None}
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, rate in rates.items():
        modules = getattr(parts, name)
        parameters = list(_trained(modules))
        if modules and rate is None:
            raise SpatialTokensError(f"the stage {stage.name!r} has no learning rate for {name}; give it a LoRA, or leave them out")
        if rate is not None and not parameters:
            raise SpatialTokensError(f"the stage {stage.name!r} trains {name}, but no parameter of that part requires a gradient")
        if seen & {id(each) for each in parameters}:
            raise SpatialTokensError(f"a parameter of {name} is in another part too; each must be in one")
        seen |= {id(each) for each in parameters}
        if name == "projector" and own_rate is not None:
            groups += _groups("kernels", [each for each in parameters if id(each) in kernels], own_rate, stage.weight_decay)
            parameters = [each for each in parameters if id(each) not in kernels]
        if rate is not None:
            groups += _groups(name, parameters, rate, stage.weight_decay)
    return groups


def _groups(name: str, parameters: Sequence[nn.Parameter], rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Those of one rate: with weight decay matrices and vectors apart."""
    matrices = [each for each in parameters if each.ndim > 1]
    vectors = [each for each in parameters if each.ndim <= 1]
    split = [(parameters, 0.0)] if not weight_decay else [(matrices, weight_decay), (vectors, 0.0)]
    return [{"name": name, "params": each, "lr": rate, "weight_decay": decay} for each, decay in split if each]


def schedule(optimizer: Optimizer, stage: Stage, num_training_steps: int) -> LambdaLR:
    """The stage's learning rates over the steps: a linear warm-up, then half a cosine to zero; call `step()` after each.

    Raises:
        SpatialTokensError: If the number of steps is no positive integer.

    Examples:
        >>> from torch.optim import AdamW
        >>> optimizer = AdamW(parameter_groups(Parts([nn.Linear(4, 4)]), ALIGNMENT))
        >>> schedule(optimizer, ALIGNMENT, num_training_steps=100).get_last_lr()
        [0.0]
    """
    check_positive(num_training_steps=num_training_steps)
    return LambdaLR(optimizer, partial(_share_of_full_rate, ceil(stage.warmup_ratio * num_training_steps), num_training_steps))


def _share_of_full_rate(num_warmup_steps: int, num_training_steps: int, step: int) -> float:
    if step < num_warmup_steps:
        return step / num_warmup_steps
    return 0.5 * (1 + cos(pi * min(1.0, (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))))


def _trained(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    """Each parameter once."""
    found = {id(each): each for module in modules for each in module.parameters() if each.requires_grad}
    return found.values()
