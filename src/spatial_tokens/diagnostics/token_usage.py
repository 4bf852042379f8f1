"""`usage`: does a trained model use its spatial tokens?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spatial_tokens.adapters.huggingface.api import attachment_of, unwrapped
from spatial_tokens.adapters.huggingface.hooks import Attachment
from spatial_tokens.adapters.huggingface.placeholders import IGNORED
from spatial_tokens.diagnostics.exchange import Others, Picture, picture_names, replaced_tokens
from spatial_tokens.diagnostics.processes import Processes
from spatial_tokens.diagnostics.usage_report import UsageReport
from spatial_tokens.diagnostics.usage_samples import Samples, report_of
from spatial_tokens.errors import SpatialTokensError

Batch = Mapping[str, Any]
Progress = Callable[[str, int], None]


def usage(
    model: Any,
    batches: Iterable[Batch],
    *,
    gather: bool = False,
    progress: Progress = lambda stage, batches: None,
) -> UsageReport:
    """Measures a model's loss and answers with each picture's own spatial tokens, with another picture's, and with none.

    A model that does as well with another picture's does not use them. "None" is the mean of all pictures' spatial tokens, which
    removes only what differs between pictures. If the model's own projector gives the same number of tokens for every picture, its
    patch tokens are exchanged as well, for comparison. If the model's attention is "eager", the attention of the text to the
    spatial tokens is measured layer by layer.

    Batches are read twice, first for the mean. The model is evaluated without dropout and gradients, and is left as it was,
    as is the random state.

    Args:
        model: A model that `attach` gave spatial tokens.
        batches: What the model is called with, `labels` included: a list or a DataLoader.
        gather: Whether each of torch.distributed's processes has batches of its own, which are measured together. All of them must
            call it then, and all get the same report. A sample that accelerate repeats, to fill a batch up, counts once.
        progress: Told what batches are read for, and how many have been.

    Raises:
        SpatialTokensError: If the model has no spatial tokens, there are no batches, they can be read only once, or one has no
            labels or no images; with `gather`, if that is so in another process.

    Example:
        report = usage(model, DataLoader(dataset, batch_size=8, collate_fn=collator))
        print(report)
    """
    attachment = attachment_of(model)
    require_batches(batches)
    training = [module for module in unwrapped(model).modules() if module.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            return _measured(_Measurement(model, attachment, Processes(gather)), batches, progress)
        finally:
            for module in training:
                module.training = True


def require_batches(batches: Any) -> None:
    """Raises SpatialTokensError unless a value is batches that can be read twice."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise SpatialTokensError(f"batches must be a list of batches or a DataLoader, got a {type(batches).__name__}")
    if iter(batches) is batches:
        raise SpatialTokensError(f"batches are read twice, which a {type(batches).__name__} cannot be; give a list or a DataLoader")


def _measured(measured: _Measurement, batches: Iterable[Batch], progress: Progress) -> UsageReport:
    gather = measured.processes.gather

    def averaged() -> _Average:
        for number, batch in enumerate(batches):
            measured.average(batch, number, batches)
            progress("mean spatial tokens", number + 1)
        return measured.averaged()

    def compared() -> list[Samples]:
        found = []
        for number, batch in enumerate(batches):
            found.append(measured.compare(batch, number, batches))
            progress("usage", number + 1)
        return found

    averages = gather(averaged)
    measured.take(averages)
    if any(each.lacks_others for each in averages):
        measured.borrow(gather(measured.lent))
    rounds = zip_longest(*gather(compared))
    return report_of([each for batches in rounds for each in batches if each is not None])


@dataclass
class _Average:
    """What a process found of its pictures.

    Args:
        sum: Of their spatial tokens, `(tokens, D)`.
        pictures: How many there are.
        exchange_patches: Whether patch tokens can be exchanged.
        lacks_others: Whether one of them may find no other here.
    """

    sum: torch.Tensor | float
    pictures: int
    exchange_patches: bool
    lacks_others: bool


class _Measurement:
    """One measurement of a model: what was found so far."""

    def __init__(self, model: Any, attachment: Attachment, processes: Processes) -> None:
        self.model, self.attachment, self.parts, self.processes = model, attachment, attachment.parts, processes
        self.device = next(self.parts.embeddings.parameters()).device
        self.sum: Any = 0.0  # of spatial tokens, over pictures
        self.pictures = 0
        self.another, self.other_patches = Others(), Others()
        self.exchange_patches = self.parts.family.tiles is None

    def average(self, batch: Batch, number: int, batches: Iterable[Batch]) -> None:
        """Adds a batch's spatial tokens to their mean."""
        with _kept_outputs(self.attachment.projector) as tokens, _kept_outputs(self.parts.projector) as patches:
            inputs = self._inputs(batch, number)[0]
            self._logits(inputs, number)
        if not patches or not tokens:
            raise SpatialTokensError(f"batch {number}, counted from 0, has no images; leave out batches of text alone")
        (found,) = tokens
        places = (inputs["input_ids"] == self.attachment.token_id).sum(1)
        own = len(found) * int(places[: self.processes.own(batches, len(places))].sum()) // int(places.sum())
        self.sum, self.pictures = self.sum + found[:own].double().sum(0), self.pictures + own
        names = self._pictures(inputs, len(found))
        self.another.keep(found, names)
        self.exchange_patches &= len(patches) == 1 and patches[0].ndim == 3 and len(patches[0]) == len(found)
        if self.exchange_patches:
            self.other_patches.keep(patches[0], names)

    def averaged(self) -> _Average:
        """What this process's pictures told."""
        found = self.sum.cpu() if isinstance(self.sum, torch.Tensor) else self.sum
        return _Average(found, self.pictures, self.exchange_patches, self.another.lacking)

    def take(self, found: list[_Average]) -> None:
        """Takes what all processes' pictures told.

        Raises:
            SpatialTokensError: If there are none.
        """
        self.pictures = sum(each.pictures for each in found)
        if not self.pictures:
            raise SpatialTokensError("there are no batches; give one at least, with images and labels")
        self.sum = sum(each.sum for each in found)
        self.exchange_patches = all(each.exchange_patches for each in found)

    def lent(self) -> tuple[list[Picture], list[Picture]]:
        """The last picture, for processes that have no other one: its spatial tokens and its patch tokens."""
        return self.another.lent(), self.other_patches.lent()

    def borrow(self, lent: list[tuple[list[Picture], list[Picture]]]) -> None:
        """Takes the last pictures of the processes before this one."""
        for spatial, patches in reversed(lent[self.processes.rank :] + lent[: self.processes.rank]):
            self.another.borrow(spatial)
            self.other_patches.borrow(patches)

    def compare(self, batch: Batch, number: int, batches: Iterable[Batch]) -> Samples:
        """A batch's losses and answers, with each kind of tokens."""
        inputs, labels = self._inputs(batch, number)
        ids, mean = inputs["input_ids"], self.sum / self.pictures
        own = self.processes.own(batches, len(ids))
        told = (labels != IGNORED).any(1) & (ids == self.attachment.token_id).any(1)
        told[own:] = False
        spatial, patches = self.attachment.projector, self.parts.projector
        with _kept_outputs(spatial) as tokens, self._attention(inputs) as attention:
            found = {"own": self._losses(inputs, labels, told, number)}
        pictures = self._pictures(inputs, len(tokens[0]))
        replacements: dict[str, tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = {
            "another": (spatial, partial(self.another, names=pictures)),
            "mean": (spatial, lambda each: mean.to(each).expand_as(each)),
        }
        if self.exchange_patches:
            replacements["patches"] = patches, partial(self.other_patches, names=pictures)
        for name, (part, replace) in replacements.items():
            with replaced_tokens(part, replace):
                found[name] = self._losses(inputs, labels, told, number)
        names = self._names(ids, pictures, number)
        return Samples(
            names=[each for each, kept in zip(names, told.tolist(), strict=True) if kept],
            losses={name: losses for name, (losses, _) in found.items()},
            right={name: right for name, (_, right) in found.items()},
            attention=torch.stack(attention, dim=1)[told].cpu() if attention else None,
            places=(int((ids[:own] == self.attachment.token_id).sum()), int((ids[:own] == self.parts.image_token_id).sum())),
        )

    def _inputs(self, batch: Batch, number: int) -> tuple[dict[str, Any], torch.Tensor]:
        """What the model is called with, where it computes, and what each place `(B, L)` of its logits is to predict."""
        if batch.get("labels") is None or batch.get("input_ids") is None:
            raise SpatialTokensError(f"batch {number}, counted from 0, has no labels and input_ids; it has {', '.join(batch)}")
        moved = {name: each.to(self.device) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
        labels = moved.pop("labels")
        labels = labels.masked_fill(labels == self.attachment.token_id, IGNORED)
        if not getattr(self.parts.model.config, "is_encoder_decoder", False):
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return moved, labels

    def _logits(self, inputs: dict[str, Any], number: int) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits
        if not bool(logits.isfinite().all()):
            raise SpatialTokensError(f"the model gives NaN or infinity for batch {number}, counted from 0")
        return logits

    def _losses(
        self, inputs: dict[str, Any], labels: torch.Tensor, told: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sample's mean loss over its labels, and whether all of them are predicted, `(b,)`."""
        logits = self._logits(inputs, number)
        if logits.shape[:2] != labels.shape:
            raise SpatialTokensError(f"labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}; pad them alike")
        mask = labels != IGNORED
        found, wanted = logits[mask].float(), labels[mask]
        missed = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        wrong = torch.zeros_like(mask)
        missed[mask] = functional.cross_entropy(found, wanted, reduction="none").double()
        wrong[mask] = found.argmax(-1) != wanted
        return (missed.sum(1) / mask.sum(1))[told].cpu(), (~wrong.any(1))[told].double().cpu()

    def _pictures(self, inputs: dict[str, Any], count: int) -> list[str] | None:
        """The batch's `picture_names`; None of pictures cut into tiles."""
        return picture_names(inputs, count) if self.parts.family.tiles is None else None

    def _names(self, ids: torch.Tensor, pictures: list[str] | None, number: int) -> list[Any]:
        """Of each sample, what names its pictures; where that is not known, every sample's own."""
        counts = ((ids == self.attachment.token_id).sum(1) // self.attachment.num_spatial_tokens).tolist()
        if pictures is None or sum(counts) != len(pictures):
            return [(self.processes.rank, number, row) for row in range(len(ids))]
        ends = list(accumulate(counts, initial=0))
        return [tuple(pictures[start:end]) for start, end in pairwise(ends)]

    @contextmanager
    def _attention(self, inputs: dict[str, Any]) -> Iterator[list[torch.Tensor]]:
        """Within the block, adds of each of the language model's layers what text behind spatial tokens pays, `(B, 2)`."""
        found: list[torch.Tensor] = []
        ids = inputs["input_ids"]
        spatial, patches = ids == self.attachment.token_id, ids == self.parts.image_token_id
        if self.attachment.mode != "own":  # spatial tokens are image tokens, and are not told from patches
            yield found
            return
        text = ~(spatial | patches) & (spatial.cumsum(1) > 0) & inputs.get("attention_mask", torch.ones_like(ids)).bool()

        def add(module: nn.Module, arguments: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.shape[0] == len(ids) and weights.shape[2:] == (ids.shape[1],) * 2:
                mean = weights.mean(1, dtype=torch.float32)  # over heads
                paid = torch.stack([(mean * keys[:, None]).sum(2) for keys in (spatial, patches)], dim=-1)
                found.append((paid * text[..., None]).sum(1) / text.sum(1, keepdim=True))

        layers = [each for each in self.parts.language_model.modules() if type(each).__name__.endswith("Attention")]
        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_hook(add).remove)
            yield found


@contextmanager
def _kept_outputs(part: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the block, what a part gives."""
    kept: list[torch.Tensor] = []
    handle = part.register_forward_hook(lambda module, arguments, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()
