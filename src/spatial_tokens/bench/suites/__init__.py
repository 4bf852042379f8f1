"""The suites, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spatial_tokens.bench.contest import Contest
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.suites import factorized, kernels, limits, llm, projectors, scaling

SUITES: dict[str, Callable[[Options], Iterator[Contest]]] = {
    "limits": limits.contests,
    "kernels": kernels.contests,
    "factorized": factorized.contests,
    "projectors": projectors.contests,
    "llm": llm.contests,
    "scaling": scaling.contests,
}
