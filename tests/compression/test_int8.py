"""Kernels in 8 bits, by torchao: what they give, and in files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.checkpoint import to_llava_sp
from spatial_tokens.compression import compress, quantize_int8
from spatial_tokens.errors import MissingExtraError
from tests.tolerances import assert_close

CONFIG = SPProjectorConfig(
    vision_hidden_size=8, text_hidden_size=12, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=6, detail_kernel_size=4,
    spatial_head="linear",
)  # fmt: skip
KERNELS = ["extractor.kernels.0.weight", "extractor.kernels.1.weight", "integrator.detail_kernel.weight"]


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_rows_of_int8(torchao, dtype):
    projector, patches = SPProjector.from_config(CONFIG, dtype=dtype), torch.randn(3, 64, 8, dtype=dtype)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    small = quantize_int8(projector)
    assert small.config == projector.config
    tensors = small.state_dict()
    for name, value in before.items():
        assert torch.equal(projector.state_dict()[name], value)
        if name in KERNELS:
            assert tensors[name].qdata.dtype == torch.int8
            step = value.double().abs().amax(1, keepdim=True) / 127
            assert ((tensors[name].dequantize().double() - value.double()).abs() <= step).all()
            value.copy_(tensors[name].dequantize())
        else:
            assert torch.equal(tensors[name], value)
            assert tensors[name].data_ptr() != projector.state_dict()[name].data_ptr()
    plain = SPProjector.from_config(CONFIG, dtype=dtype)
    plain.load_state_dict(before)
    assert_close(small(patches), plain(patches), 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("whole", [False, True])
def test_it_is_saved_and_loaded(torchao, tmp_path, whole):
    projector, patches = SPProjector.from_config(CONFIG, dtype=torch.bfloat16), torch.randn(3, 64, 8, dtype=torch.bfloat16)
    if whole:
        torchao.quantize_(projector, torchao.Int8WeightOnlyConfig())
    else:
        projector = quantize_int8(projector)
    projector.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {stored[name].dtype for name in KERNELS} == {torch.int8}
    assert {stored[f"{name}.scale"].shape for name in KERNELS} == {(6, 1)}
    loaded = SPProjector.from_pretrained(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(patches), projector(patches))
    assert not loaded.extractor.kernels[0].weight.requires_grad
    assert loaded.integrator.query_projector[0].weight.requires_grad
    wide = SPProjector.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide(patches.float()).dtype == wide.extractor.kernels[0].weight.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    assert all(torch.equal(value, stored[name]) for name, value in load_file(tmp_path / "again" / "model.safetensors").items())


def test_other_quantizations_are_refused(torchao, tmp_path):
    for config in (
        torchao.Int8DynamicActivationInt8WeightConfig(),
        torchao.Float8WeightOnlyConfig(),
        torchao.IntxWeightOnlyConfig(),
    ):
        projector = SPProjector.from_config(CONFIG)
        torchao.quantize_(projector, config)
        with pytest.raises(
            SpatialTokensError, match=r"cannot be saved: .* is quantized \(a \w+\), only torchao's Int8WeightOnlyConfig"
        ):
            projector.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_plain_kernels_are_needed_for(torchao):
    small = quantize_int8(SPProjector.from_config(CONFIG))
    with pytest.raises(SpatialTokensError, match=r"the released names cannot hold .* is quantized \(a Int8Tensor\), plain weights"):
        to_llava_sp(small)
    for work in (quantize_int8, lambda projector: compress(projector, torch.randn(10, 64, 8))):
        with pytest.raises(SpatialTokensError, match="a kernel is quantized; use the projector before quantization"):
            work(small)
    with pytest.raises(SpatialTokensError, match="torchao quantizes no float64; cast the projector first"):
        quantize_int8(SPProjector.from_config(CONFIG, dtype=torch.float64))


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "no JSON",
        json.dumps({KERNELS[0]: "bfloat17"}),
        json.dumps({KERNELS[0]: "int8"}),
        json.dumps({"spatial_head.fc.weight": "float32"}),
    ],
)
def test_a_damaged_file(torchao, tmp_path, metadata):
    quantize_int8(SPProjector.from_config(CONFIG)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        told = {**file.metadata(), "int8": metadata}
    save_file(load_file(path), path, metadata=told)
    with pytest.raises(SpatialTokensError, match="is damaged: its int8 weights are not those that its metadata describes"):
        SPProjector.from_pretrained(tmp_path)


def test_a_file_of_int8_needs_torchao(tmp_path, monkeypatch):
    projector = SPProjector.from_config(CONFIG)
    projector.save_pretrained(tmp_path)
    tensors = projector.state_dict()
    weight = tensors.pop(KERNELS[0])
    tensors |= {KERNELS[0]: torch.zeros(weight.shape, dtype=torch.int8), f"{KERNELS[0]}.scale": torch.ones(6, 1)}
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        told = {**file.metadata(), "int8": json.dumps({KERNELS[0]: "float32"})}
    save_file(tensors, path, metadata=told)
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(MissingExtraError, match=r"torchao 0.18 or later .* pip install 'spatial-tokens\[torchao\]'"):
        SPProjector.from_pretrained(tmp_path)
    with pytest.raises(MissingExtraError, match=r"pip install 'spatial-tokens\[torchao\]'"):
        quantize_int8(projector)
