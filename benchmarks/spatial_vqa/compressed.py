"""A trained model whose dense kernels are compressed: what it answers at once, and after a brief tuning, beside the dense one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.spatial_vqa.designs import DESIGNS, Design, factors, install
from benchmarks.spatial_vqa.plans import Compression
from benchmarks.spatial_vqa.training import LORA, STAGES, Material, Training, add_lora, ask, prefix_of
from spatial_tokens import SpatialTokensError
from spatial_tokens.compression import compress
from spatial_tokens.training import Parts, Stage

PICTURES = 4000  # whose features weigh the kernels


@torch.no_grad()
def restore(design: Design, llava: Callable[[], Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Any, Parts]:
    """The model that a run has trained, and its parts.

    Raises:
        SpatialTokensError: If the tensors are of another model.
    """
    model = llava()
    parts = install(design, model)
    parts = replace(parts, lora=add_lora(model, LORA))
    trained = {id(each) for part in (*parts.projector, *parts.lora) for each in part.parameters()}
    own = {name: each for name, each in model.named_parameters() if id(each) in trained}
    if own.keys() != tensors.keys():
        raise SpatialTokensError("the tensors are not those that this design trains")
    for name, each in own.items():
        each.copy_(tensors[name])
    return model, parts


def run(
    compression: Compression,
    llava: Callable[[], Any],
    material: dict[str, Material],
    tensors: Mapping[str, torch.Tensor],
    stage: Stage = STAGES[1],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compresses a run's kernels and asks the model.

    Args:
        compression: Of what, to what.
        llava: Makes the untrained model.
        material: Of each split; as the run had.
        tensors: What the run has trained.
        stage: Its second stage, which the tuning is once more, at a tenth of the rates.
        progress: Told of each step of tuning.

    Returns:
        Accuracies on test and hard of the compressed model, of the same after tuning, and of the dense one after as much of it.
    """
    design, scenes = DESIGNS[compression.of.design], compression.of.schedule.scenes
    briefly = replace(
        stage,
        projector_learning_rate=stage.projector_learning_rate / 10,
        lora=replace(LORA, learning_rate=LORA.learning_rate / 10),
    )
    (dense, dense_parts), (small, parts) = (restore(design, llava, tensors) for _ in range(2))
    features = material["train"].features[:PICTURES, 1:].to(small.device).float()
    to = factors(compression.frequencies, compression.rank, compression.spatial_basis)
    small.spatial_tokens, report = compress(small.spatial_tokens, features, **to)
    parts = replace(parts, projector=[parts.projector[0], small.spatial_tokens], kernels=[])
    found = {
        "kernel_parameters": report.parameters, "dense_kernel_parameters": report.dense_parameters,
        "unexplained": report.unexplained, "compressed": _asked(small, design, material),
    }  # fmt: skip
    for name, model, its_parts in (("tuned", small, parts), ("dense_tuned", dense, dense_parts)):
        order = torch.Generator().manual_seed(compression.of.seed)
        for _ in Training(model, design, its_parts, briefly, compression.tuning, material["train"], scenes, order):
            progress()
        found[name] = _asked(model, design, material)
    return found


def _asked(model: Any, design: Design, material: dict[str, Material]) -> dict[str, dict[str, list[int]]]:
    return {split: ask(model, design, prefix_of(model), material[split]) for split in ("test", "hard")}
