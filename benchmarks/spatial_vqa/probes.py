"""What the frozen encoder's patches tell by themselves: linear readers of a patch's place, and of the thing that it is in."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from benchmarks.spatial_vqa.layout import GRID, cover
from benchmarks.spatial_vqa.splits import Example
from spatial_tokens.demo.scenes import COLORS, RADII, SHAPES

NOTHING = -1
RIDGE = 10.0


def read_patches(
    train: tuple[torch.Tensor, Sequence[Example]], asked: tuple[torch.Tensor, Sequence[Example]]
) -> dict[str, list[float]]:
    """How often linear readers are right, and how often it is to say what was commonest.

    Args:
        train: Features `(B, 1 + N, C)` and their scenes, which the readers learn from (ridge regression to one of several).
        asked: Those that they are asked about.
    """
    learned, wanted = labels_of(train[1]), labels_of(asked[1])
    found = {}
    for name, (choices, where) in learned.items():
        inside, outside = where != NOTHING, wanted[name][1] != NOTHING
        seen, target = train[0][:, 1:][inside].double(), functional.one_hot(where[inside], choices).double()
        new, truth = asked[0][:, 1:][outside].double(), wanted[name][1][outside]
        center, spread = seen.mean(0), seen.std(0) + 1e-6
        seen, new = (functional.pad((each - center) / spread, (0, 1), value=1.0) for each in (seen, new))
        weight = torch.linalg.solve(seen.T @ seen + RIDGE * torch.eye(seen.shape[1], dtype=torch.float64), seen.T @ target)
        commonest = target.sum(0).argmax()
        found[name] = [(said == truth).double().mean().item() for said in ((new @ weight).argmax(1), commonest)]
    return found


def labels_of(examples: Sequence[Example]) -> dict[str, tuple[int, torch.Tensor]]:
    """Of each patch `(B, N)`, and how many there are: its column and row, and color, shape and size where a thing is."""
    place = torch.arange(GRID)
    labels = {
        "column": (GRID, place.repeat(GRID).expand(len(examples), -1)),
        "row": (GRID, place.repeat_interleave(GRID).expand(len(examples), -1)),
    }
    kinds = {"color": list(COLORS), "shape": list(SHAPES), "size": list(RADII)}
    for name, choices in kinds.items():
        where = torch.full((len(examples), GRID, GRID), NOTHING)
        for number, example in enumerate(examples):
            for thing in example.scene.things:
                for column, row in cover(thing):
                    where[number, row, column] = choices.index(getattr(thing, name))
        labels[name] = len(choices), where.flatten(1)
    return labels
