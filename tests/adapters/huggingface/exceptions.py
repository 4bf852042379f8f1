"""What a family cannot do, cell by cell, and why; `test_families` sees to it that it really cannot."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a cell fails.

    Args:
        why: For the reader of the table.
        vanilla: Whether the model fails without spatial tokens just the same.
        since: The first version of transformers in which it fails.
        before: The first later one in which it does not.
    """

    why: str
    vanilla: bool = True
    since: str = "5.0"
    before: str = "99"


@dataclass(frozen=True)
class Fault:
    """A fault, in these versions of transformers."""

    why: str
    since: str = "5.0"
    before: str = "99"


ALWAYS_AN_IMAGE = Reason("the model cannot be called without an image")

EXCEPTIONS: dict[tuple[str, str], Reason] = {
    ("blip_2", "text alone"): ALWAYS_AN_IMAGE,
    ("instructblip", "text alone"): ALWAYS_AN_IMAGE,
    ("llama4", "beams"): Reason("the model does not repeat its images for beams", since="5.18"),
    ("exaone4_5", "beams"): Reason("before transformers 5.18 the model does not repeat its images for beams", before="5.18"),
    ("minimax_m3_vl", "batch"): Reason(
        "before transformers 5.18 the vision tower lets the patches of one picture see those of another",
        vanilla=False,
        before="5.18",
    ),
    ("minimax_m3_vl", "image mode"): Reason(
        "before transformers 5.18 the model does not give its image tokens picture by picture", vanilla=False, before="5.18"
    ),
}

# What no cell is about.
NOTES: dict[str, str] = {
    "llama4": "transformers 5.24 itself cannot run it: its forward pass reads `image_outputs` of an output that has none",
    "step3p7": "tiles: pictures with `pixel_values_local` are refused",
}

# Faults of ours, not mended yet; `since` and `before` are the versions of transformers that show them.
FAULTS: dict[tuple[str, str], Fault] = {}
