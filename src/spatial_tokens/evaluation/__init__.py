"""Models with spatial tokens in lmms-eval, the field's harness for benchmarks; see docs/evaluate.md."""

from typing import Any


def lmms_eval_models() -> Any:
    """The entry point of group `lmms_eval.models`, which lmms-eval calls; the classes are imported where a run needs one."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = "spatial_tokens.evaluation.lmms_eval"
    return ModelManifest("spatial_tokens", f"{classes}.SpatialTokensOnStrings", f"{classes}.SpatialTokens")
