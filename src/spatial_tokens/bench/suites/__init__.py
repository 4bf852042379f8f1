"""The suites, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spatial_tokens.bench.comparison import Comparison
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.suites import factorized, kernels, limits, llm, projectors, scaling

SUITES: dict[str, Callable[[Options], Iterator[Comparison]]] = {
    "limits": limits.comparisons,
    "kernels": kernels.comparisons,
    "factorized": factorized.comparisons,
    "projectors": projectors.comparisons,
    "llm": llm.comparisons,
    "scaling": scaling.comparisons,
}
