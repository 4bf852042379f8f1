"""The card of a repository on the Hugging Face Hub: what it holds, how it is loaded, what it was trained on, whose method it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, shown
from spatial_tokens.versions import WRITER

PAPER = "https://arxiv.org/abs/2507.00505"
TAGS = ("spatial-tokens", "llava-sp", "vision-language-model", "arxiv:2507.00505")

_TEXT = """---
{metadata}
---

# {title}

{summary}

| | |
|---|---|
{rows}

## How to load it

```bash
pip install 'spatial-tokens[hf]'
```

```python
{code}
```

## Training data

{data}

## The method

LLaVA-SP ([paper]({paper}), [the authors' code](https://github.com/CnFaker/LLaVA-SP)):

```bibtex
@inproceedings{{lou2025llavasp,
  title = {{LLaVA-SP: Enhancing Visual Representation with Visual Spatial Tokens for MLLMs}},
  author = {{Lou, Haoran and Fan, Chunxiao and Liu, Ziyang and Wu, Yuexin and Wang, Xinliang}},
  booktitle = {{ICCV}},
  year = {{2025}},
}}
```
"""


def render_model_card(
    repo_id: str,
    config: SPProjectorConfig,
    *,
    summary: str,
    code: str,
    facts: Mapping[str, str],
    datasets: Sequence[str],
    **metadata: Any,
) -> str:
    """The text of a card.

    Args:
        repo_id: The repository, whose name is the title.
        config: Of the projector that it holds.
        summary: What it is, in a sentence or two.
        code: Python that loads it.
        facts: Rows of the table, beside the projector's.
        datasets: What it was trained on, by names on the Hub; empty if that is not known.
        **metadata: Fields of huggingface_hub's `ModelCardData`.

    Raises:
        SpatialTokensError: If datasets is not a list of names.
    """
    try:
        from huggingface_hub import ModelCardData
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    names = list(datasets)
    if isinstance(datasets, str) or not all(isinstance(name, str) for name in names):
        raise SpatialTokensError(f"datasets must be a list of names, such as ['user/data'], got {shown(datasets)}")
    data = ModelCardData(library_name="spatial-tokens", tags=list(TAGS), datasets=names or None, **metadata)
    kind = "dense" if config.rank is None else f"factorized, rank {config.rank}"
    rows = {
        **facts,
        "spatial tokens": f"{config.num_spatial_tokens} for an image, {config.variant}",
        "kernels": f"{_listed(config.kernel_sizes)} ({kind})",
        "patch grid": _by(config.grid_size),
        "parameters of the projector": f"{config.num_parameters:,}",
        "written by": WRITER,
    }
    return _TEXT.format(
        metadata=data.to_yaml().strip(),
        title=repo_id.rpartition("/")[2],
        summary=summary,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        code=code.strip(),
        data="\n".join(f"- [{name}](https://huggingface.co/datasets/{name})" for name in names) or "Not stated.",
        paper=PAPER,
    )


def _listed(sizes: Sequence[int | tuple[int, int]]) -> str:
    return ", ".join(str(size) if isinstance(size, int) else _by(size) for size in sizes)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
