"""A projector's programs beside the projector itself: torch.compile, AOTInductor, ONNX Runtime, and kernels in 8 bits.

    python benchmarks/export.py             # about ten minutes on two cores, and 6 GiB; needs a C++ compiler

Widths are half the paper's (230 million parameters), so that a package is compiled in a minute. The programs take turns, one run
each in a round; each must give the projector's tokens before it is timed.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from spatial_tokens import SPProjector, SPProjectorConfig
from spatial_tokens.bench.comparison import Candidate, Comparison, label
from spatial_tokens.bench.machine import describe
from spatial_tokens.bench.report import Report
from spatial_tokens.bench.runner import run_comparison
from spatial_tokens.compression import quantize_int8
from spatial_tokens.export import compile_package, export_onnx

PRESETS = {"dense": "llava-sp-cropping", "factorized": "factorized-cropping"}
WIDTHS = {"vision_hidden_size": 512, "text_hidden_size": 2048, "spatial_hidden_size": 256}
BATCHES = (1, 8)
EAGER = "eager"
RESULTS = Path(__file__).parent / "results" / "cpu" / "export.json"
COARSE = 0.02  # of the tokens' norm: what rounding kernels to 8 bits changes


def make(kernels: str, dtype: torch.dtype) -> SPProjector:
    torch.manual_seed(0)
    return (
        SPProjector.from_config(SPProjectorConfig.from_preset(PRESETS[kernels], **WIDTHS), dtype=dtype).eval().requires_grad_(False)
    )


def features(projector: SPProjector, batch: int) -> torch.Tensor:
    dtype = next(projector.parameters()).dtype
    patches = torch.randn(batch, 576, WIDTHS["vision_hidden_size"], generator=torch.Generator().manual_seed(1))
    return patches.to(dtype)


def candidate(run, patches: torch.Tensor) -> Candidate:
    def tokens():
        made = run(patches)
        return made[0] if isinstance(made, (tuple, list)) else made

    return Candidate(tokens)


def onnx_runtime(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda patches: torch.from_numpy(session.run(["tokens"], {"patches": patches.numpy()})[0])


def programs(kernels: str, folder: Path) -> list[Comparison]:
    """Programs of a float32 projector; all are made before the first is timed."""
    projector = make(kernels, torch.float32)
    compile_package(projector, folder / "p.pt2")
    export_onnx(projector, folder / "p.onnx")
    runs = {
        EAGER: projector,
        "torch.compile": torch.compile(projector, dynamic=True),
        "AOTInductor": torch._inductor.aoti_load_package(str(folder / "p.pt2")),
        "ONNX Runtime": onnx_runtime(folder / "p.onnx"),
    }
    return [
        comparison("program", {"kernels": kernels, "dtype": "float32", "batch": batch}, projector, runs, batch) for batch in BATCHES
    ]


def int8(dtype: torch.dtype) -> list[Comparison]:
    """Dense kernels, and the same in 8 bits."""
    projector = make("dense", dtype)
    small = quantize_int8(projector)
    runs = {EAGER: projector.extractor, "int8": small.extractor, "int8, compiled": torch.compile(small.extractor, dynamic=True)}
    name = str(dtype).removeprefix("torch.")
    return [
        comparison("extractor", {"kernels": "dense", "dtype": name, "batch": batch}, projector, runs, batch, COARSE)
        for batch in BATCHES
    ]


def comparison(subject: str, setting: dict, projector: SPProjector, runs: dict, batch: int, tolerance: float = 1e-4) -> Comparison:
    patches = features(projector, batch)
    candidates = {name: partial(candidate, run, patches) for name, run in runs.items()}
    return Comparison("export", subject, setting, candidates, reference=EAGER, tolerance=tolerance, baseline=EAGER)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of timing for each comparison")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    makers = [
        *(partial(programs, kernels) for kernels in PRESETS),
        *(partial(int8, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ]
    for maker in makers:
        with tempfile.TemporaryDirectory() as folder:
            made = maker(Path(folder)) if maker.func is programs else maker()
            for each in made:
                for row in run_comparison(each, torch.device("cpu"), None, given.seconds):
                    rows.append(row)
                    figures = {name: round(value, 3) for name, value in row.values.items()}
                    print(row.subject, label(row.setting), row.implementation, row.failure or figures, flush=True)
    Report(f"python benchmarks/export.py {' '.join(sys.argv[1:])}".strip(), describe(torch.device("cpu")), rows).write(given.json)


if __name__ == "__main__":
    main()
