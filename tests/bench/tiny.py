"""The suites at a size that a test can wait for."""

import gc
from functools import partial

import torch

from spatial_tokens import SPProjectorConfig
from spatial_tokens.bench import baselines, measure
from spatial_tokens.bench.options import Options
from spatial_tokens.bench.suites import kernels, limits, llm, scaling

COLLECT = gc.collect  # which `shrink` puts aside
CPU = torch.device("cpu")
TINY = SPProjectorConfig(
    vision_hidden_size=16, text_hidden_size=24, grid_size=12, kernel_sizes=(4, 8, 12), spatial_hidden_size=16, detail_kernel_size=8
)
LLAVA = llm.Model("0.1B (7B does not fit)", 16, 32, 1, 2, prompt=3, answer=2, vocabulary=50, num_vision_layers=2)
MODELS = llm.MODELS
SMALL = {
    "DecoProjector": {"num_tokens": 4},
    "CAbstractor": {"num_tokens": 4, "hidden_size": 16, "num_blocks": 1},
    "PerceiverResampler": {"num_tokens": 3, "num_layers": 1, "num_heads": 2, "head_size": 4},
    "QFormer": {"num_tokens": 3, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "feedforward_size": 12},
}


def options(*dtypes, batches=(), config=TINY):
    return Options(CPU, dtypes or ("float32",), batches, config)


def shrink(monkeypatch, rounds=1):
    """Makes every suite small, and each comparison a round or a few; nothing is compiled."""
    monkeypatch.setattr(measure, "LEAST_ROUNDS", rounds)
    monkeypatch.setattr(measure, "MOST_ROUNDS", rounds)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # a fifth of a second each, with all that pytest keeps
    monkeypatch.setitem(kernels.TOLERANCE, "bfloat16", 4e-2)  # a gradient of 16 numbers is further off than one of 1024
    monkeypatch.setattr(limits, "NUM_BYTES", {"cpu": 2**16, "cuda": 2**16})
    monkeypatch.setattr(limits, "WIDTH", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(scaling, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(scaling, "GRIDS", (12, 16))
    monkeypatch.setattr(scaling, "CHANNELS", (8, 16))
    monkeypatch.setattr(scaling, "NUM_TOKENS", (1, 2, 3))
    monkeypatch.setattr(llm, "MODELS", (LLAVA,))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    for name, sizes in SMALL.items():
        monkeypatch.setattr(baselines, name, partial(getattr(baselines, name), **sizes))
