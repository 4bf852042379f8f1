"""Writes `docs/families.md`, which families take spatial tokens: `python -m tests.adapters.huggingface.table`."""

from __future__ import annotations

from pathlib import Path

from spatial_tokens.adapters.huggingface.families import FAMILIES, GENERAL, REFUSED
from spatial_tokens.adapters.huggingface.layouts import OF_ANY_SIZE
from spatial_tokens.serving.families import COMPARED, REFUSED_IN_VLLM
from tests.adapters.huggingface.exceptions import EXCEPTIONS, FAULTS, NOTES
from tests.adapters.huggingface.tiny import MODELS

PAGE = Path(__file__).parents[3] / "docs" / "families.md"

NO_FEATURES = "it has no `get_image_features()` to take patches from"

# Families that are refused without being known by name, and why.
CANNOT: dict[str, str] = {
    "apertus1p5": "no projector is found: images become tokens of a codebook",
    "blip": f"{NO_FEATURES}: its text decoder looks at the image by cross-attention",
    "evolla": f"{NO_FEATURES}: it reads proteins, not images",
    "granite_docling": "no projector is found: it is in the vision model, behind a router of densities",
    "inkling_mm_model": "no projector is found: its vision tower projects patches itself",
    "instructblipvideo": f"{NO_FEATURES}: it takes videos alone",
    "mistral4": f"{NO_FEATURES}: it is a language model",
    "nemotron_h_omni": "its config has no `image_token_id`: images have no place in its sequence",
    "pi0": f"{NO_FEATURES}: it is a robot's policy around a model of another family",
    "pix2struct": f"{NO_FEATURES}: its decoder looks at the image by cross-attention",
    "pp_formulanet": f"{NO_FEATURES}: its decoder looks at the image by cross-attention",
    "t5gemma2": f"{NO_FEATURES}: its encoder takes images by itself",
    "udop": f"{NO_FEATURES}: its encoder takes images by itself",
    "vision-encoder-decoder": f"{NO_FEATURES}: its decoder looks at the image by cross-attention",
}

# Families that no tiny model stands for in the tests.
NOT_TRIED: dict[str, str] = {
    "diffusion_gemma": "no tiny model yet: it writes blocks by diffusion, and the tests' loops are of one token after another",
    "granite4_vision": "no tiny model yet: it has a projector for each of several layers, none of them in `TAPS`",
    "hy_v4_vl": "no tiny model yet: new in transformers 5.24, its projector is in its vision tower and not in `TAPS`",
    "inkling2_loop": "no tiny model yet: new in transformers 5.24",
    "hunyuan_vl": "no tiny model yet: its projector is in its vision tower, with separators of lines, and not in `TAPS`",
    "molmo2": "no tiny model yet: its projector gathers patches by lists of indices",
    "unlimited_ocr": "no tiny model yet: its tower goes over the whole and over tiles in two calls",
}

INTRODUCTION = """# Families

Which families of transformers' image-text-to-text models take spatial tokens. The table is written by
`python -m tests.adapters.huggingface.table` from the lists that the tests go by; the tests hold every family that works to every
cell, on a tiny model with random weights, in transformers 5.17, 5.23 and 5.24:

placement (the language model's own rows are those of the untouched model, bit for bit, and spatial tokens are in their places) ·
raster order (each cell of a map is the pixels at its place) · gradients reach every parameter · text alone · a batch with 2, 1 and
no images of different sizes equals its rows · `generate` with a cache equals a loop without · beams equal those of single rows ·
the reserved token is never generated · save and load · detach · deep copy · gradient checkpointing.

- **`mode="image"`**: spatial tokens can ride among the model's image tokens, too.
- **`unit="tile"`**: images are cut into tiles, and each can have spatial tokens of its own.
- **any size**: images have patch grids of their own: factorized kernels read them as they are, dense ones need `resize="pool"` or
  `"interpolate"`.
- **vLLM**: "yes" where [vLLM's answers](serving.md) have been compared with those of `generate`; "no" where vLLM computes the
  family otherwise, with or without spatial tokens, and refuses it with them; else it serves it with a warning.
"""


def families() -> list[str]:
    """All families of the table."""
    return sorted({tiny.family for tiny in MODELS.values()} | REFUSED.keys() | CANNOT.keys() | NOT_TRIED.keys())


def row(kind: str) -> str:
    """A family's line."""
    names = [name for name, tiny in MODELS.items() if tiny.family == kind]
    if not names:
        state = "not tried" if kind in NOT_TRIED else "cannot"
        return f"| {kind} | {state} | | | | | {NOT_TRIED.get(kind) or CANNOT.get(kind) or REFUSED[kind]} |"
    known = {**EXCEPTIONS, **FAULTS}
    less = [f"{cell}: {reason.why}" for (name, cell), reason in known.items() if name in names]
    less += [NOTES[kind]] if kind in NOTES else []
    family = FAMILIES.get(kind, GENERAL)
    marks = (family.image_mode, family.tiles is not None, family.layout in OF_ANY_SIZE)
    cells = " | ".join("yes" if mark else "" for mark in marks)
    return f"| {kind} | {'partly' if less else 'works'} | {cells} | {in_vllm(kind)} | {'; '.join(less)} |"


def in_vllm(kind: str) -> str:
    """Whether vLLM serves it."""
    return "yes" if kind in COMPARED else "no" if kind in REFUSED_IN_VLLM else ""


def page() -> str:
    """The whole page."""
    head = (
        '| family | state | `mode="image"` | `unit="tile"` | any size | vLLM | why not, or not all |\n|---|---|---|---|---|---|---|'
    )
    return "\n".join([INTRODUCTION, head, *map(row, families()), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
