"""The Triton kernels compile ahead of time, without a GPU, for those they are written for, and fit: registers and shared memory."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from spatial_tokens.grid import crop_window

triton = pytest.importorskip("triton")
ASSEMBLERS = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))  # by the version of PTX
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(not ASSEMBLERS, reason="this triton has no ptxas"),
    pytest.mark.skipif(VERSION < (3, 3), reason="before 3.3 triton compiles no kernel ahead of time that takes tuples"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="triton's interpreter compiles nothing"),
]

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = (4, 8, 12, 16, 20, 24)
CROPS = {"WINDOWS": tuple(tuple(crop_window(24, size)) for size in KERNELS), "STEP": (1, 1), "COUNT": (1, 1), "C": 1024, "S": 512}
DETAIL = {"WINDOWS": ((0, 0, 16, 16),), "STEP": (2, 2), "COUNT": (5, 5), "C": 1024, "S": 512}
SHAPES = {"crops": CROPS, "detail": DETAIL}
ALIGNED = {"stride_b", "stride_y", "stride_x", "size"}


class Built(NamedTuple):
    ptx: str
    shared: int
    capability: int

    def spilled(self, *options):
        """Bytes of registers that the assembler moves to memory."""
        options += (f"-arch=sm_{self.capability}{'a' if self.capability == 90 else ''}", "-o", os.devnull, "-")
        runs = (
            subprocess.run([str(ptxas), "-v", *options], input=self.ptx, capture_output=True, text=True) for ptxas in ASSEMBLERS
        )
        log = next(run.stderr for run in runs if run.returncode == 0)
        numbers = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert len(numbers) == 2, log
        return sum(map(int, numbers))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def build(kernel, pointers, constants, capability, num_warps=4, num_stages=3):
    """As a launch would: pointers and the multiples of the channels divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if isinstance(signature[name], tuple):
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(signature[name]))}
        elif name in pointers or name in ALIGNED:
            attributes[i,] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    return Built(compiled.asm["ptx"], compiled.metadata.shared, capability)


def build_window_linear(name, dtype, capability, shape, images, precision="ieee"):
    from spatial_tokens.ops.window_linear import triton as kernels

    pointer, positions = TYPES[dtype], shape["COUNT"][0] * shape["COUNT"][1]
    many = (pointer,) * len(shape["WINDOWS"])
    blocks = getattr(kernels, f"{name}_blocks")(images if name == "input_grad" else images * positions, dtype)
    pointers = {
        "tokens": {"patch_map": pointer, "weights": many, "sums": "*fp32"},
        "input_grad": {"grad": pointer, "weights": many, "map_grad": pointer},
        "weight_grad": {"grad": pointer, "patch_map": pointer, "weight_grads": many},
    }[name]
    options = {option: blocks.pop(option) for option in ("num_warps", "num_stages")}
    kernel = getattr(kernels, f"{name}_kernel")
    return build(kernel, pointers, {**shape, "PRECISION": precision, **blocks}, capability, **options)


def assert_fits(built):
    assert built.shared <= SHARED[built.capability]
    assert built.spilled() == 0


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
# Those of float32, and bfloat16 with 64 images on sm_80, spilled when this was written.
COVERING = [
    *[("tokens", bf16, capability, "crops", images, "ieee") for capability in (80, 90) for images in (1, 32, 64, 512)],
    *[("tokens", fp32, 80, shape, images, "ieee") for shape, images in (("crops", 32), ("crops", 64), ("detail", 8))],
    *[("tokens", fp32, 90, "crops", images, "ieee") for images in (1, 64, 512)],
    ("tokens", bf16, 80, "detail", 8, "ieee"),
    ("tokens", bf16, 90, "detail", 1, "ieee"),
    ("tokens", fp32, 80, "crops", 32, "tf32"),
    ("tokens", fp32, 90, "crops", 512, "tf32"),
    ("tokens", fp16, 80, "crops", 512, "ieee"),
    *[("input_grad", bf16, capability, "crops", images, "ieee") for capability in (80, 90) for images in (1, 512)],
    ("input_grad", bf16, 90, "detail", 32, "ieee"),
    ("input_grad", fp32, 80, "crops", 512, "ieee"),
    ("input_grad", fp32, 90, "detail", 128, "ieee"),
    ("input_grad", fp32, 80, "crops", 64, "tf32"),
    ("input_grad", fp16, 90, "detail", 1, "ieee"),
    *[("weight_grad", bf16, capability, "crops", images, "ieee") for capability in (80, 90) for images in (1, 512)],
    ("weight_grad", bf16, 80, "detail", 8, "ieee"),
    ("weight_grad", fp32, 80, "detail", 8, "ieee"),
    ("weight_grad", fp32, 90, "crops", 32, "ieee"),
    ("weight_grad", fp32, 90, "crops", 512, "tf32"),
    ("weight_grad", fp16, 90, "detail", 8, "ieee"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "shape", "images", "precision"),
    COVERING,
    ids=[f"{name}-{TYPES[dtype][1:]}-sm{c}-{shape}-{images}-{p}" for name, dtype, c, shape, images, p in COVERING],
)
def test_products_fit(name, dtype, capability, shape, images, precision):
    built = build_window_linear(name, dtype, capability, SHAPES[shape], images, precision)
    assert_fits(built)
    if dtype != fp32 or precision == "tf32":
        assert "wgmma.mma_async" in built.ptx if capability == 90 else "mma.sync" in built.ptx
    if name == "tokens":
        assert "cp.async.cg" in built.ptx  # 16 bytes at a time, past the first cache
        assert not re.search(r"cp\.async\.ca|ld\.global\S*\.b16", built.ptx)


@pytest.mark.parametrize("capability", SHARED)
def test_adding_of_splits_fits(capability):
    from spatial_tokens.ops.window_linear import triton as kernels

    constants = {"WINDOWS": CROPS["WINDOWS"], "POSITIONS": 1, "S": 512, "BLOCK": 256}
    assert_fits(build(kernels.add_splits_kernel, {"sums": "*fp32", "tokens": "*bf16"}, constants, capability))


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
@pytest.mark.parametrize("capability", SHARED)
def test_pyramid_fits(dtype, capability):
    from spatial_tokens.ops.pyramid import triton as kernels

    constants, pointer = {"SIZES": tuple((size, size) for size in KERNELS), "C": 1024, "BLOCK": kernels.BLOCK_C}, TYPES[dtype]
    assert_fits(build(kernels.pool_kernel, {"patch_map": pointer, "pooled": pointer}, constants, capability))
    pointers = {"grad": pointer, "map_grad": pointer}
    assert_fits(build(kernels.pool_grad_kernel, pointers, constants, capability, num_warps=kernels.WARPS))


@pytest.mark.parametrize("capability", SHARED)
def test_a_spill_would_be_seen(capability):
    assert (
        build_window_linear("tokens", fp32, capability, CROPS, 512).spilled("--maxrregcount=32", "--override-directive-values") > 0
    )
