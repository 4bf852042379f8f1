"""What a measurement of usage found of each sample, and the report of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spatial_tokens.diagnostics.intervals import bootstrap, ratios
from spatial_tokens.diagnostics.usage_report import Change, LayerAttention, UsageReport
from spatial_tokens.errors import SpatialTokensError


@dataclass
class Samples:
    """The `b` samples of a batch that have a picture and labels.

    Args:
        names: Of each one's pictures; the same for the same pictures.
        losses: By whose tokens they were given, `(b,)` each.
        right: Likewise, 1 where all labels are predicted.
        attention: To spatial tokens and to patches, `(b, layers, 2)`; None where the model gives none.
        places: Of spatial tokens and of patches, in the batch.
    """

    names: list[Any]
    losses: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor]
    attention: torch.Tensor | None
    places: tuple[int, int]


def report_of(batches: Sequence[Samples]) -> UsageReport:
    """What all samples tell.

    Raises:
        SpatialTokensError: If there are none.
    """
    names = [name for each in batches for name in each.names]
    if not names:
        raise SpatialTokensError("no sample has both a picture and labels: there is nothing to measure")
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    index = torch.tensor([order[name] for name in names])

    def estimates(*values: torch.Tensor) -> Any:
        """Means over samples of values `(samples,)`; a picture's samples are drawn together."""
        columns = torch.stack([column for each in values for column in (each, torch.ones_like(each))], dim=1).double()
        return bootstrap(torch.zeros(len(order), columns.shape[1], dtype=torch.float64).index_add_(0, index, columns), ratios)

    conditions = batches[0].losses
    losses, right = (
        {name: torch.cat([found[name] for found in each]) for name in conditions}
        for each in ([one.losses for one in batches], [one.right for one in batches])
    )
    loss, rightly = estimates(losses["own"], right["own"])
    changes = {
        name: Change(*estimates(losses[name] - losses["own"], right["own"] - right[name])) for name in losses if name != "own"
    }
    attentions = [each.attention for each in batches if each.attention is not None]
    attention = None
    if len(attentions) == len(batches):
        found = torch.cat(attentions).double()
        attention = [LayerAttention(*estimates(*layer.unbind(1))) for layer in found.unbind(1)]
    spatial, patches = (sum(each.places[i] for each in batches) for i in range(2))
    return UsageReport(
        samples=len(names),
        pictures=len(order),
        loss=loss,
        right=rightly,
        another=changes["another"],
        mean=changes["mean"],
        patches=changes.get("patches"),
        attention=attention,
        places=spatial / (spatial + patches),
    )
