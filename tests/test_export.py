"""Programs for other runtimes give what the projector gives, and need no library of ours where they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.cli import main
from spatial_tokens.export import compile_package, data_files, export_onnx, export_program, export_pt2
from spatial_tokens.modules import MLPHead
from spatial_tokens.presets import PRESETS
from tests.modules.test_factorized import refused
from tests.tolerances import assert_close, rounding

SMALL = {"vision_hidden_size": 16, "text_hidden_size": 12, "spatial_hidden_size": 8}


def make(preset="llava-sp-cropping", **fields):
    torch.manual_seed(0)
    projector = SPProjector.from_config(SPProjectorConfig.from_preset(preset, **{**SMALL, **fields}))
    return projector, projector.extractor.grid_size


def patches_of(projector, grid, batch=3, seed=1):
    dtype = next(projector.parameters()).dtype
    return torch.randn(batch, grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(projector, patches, *grid):
    with torch.no_grad():
        found = projector(patches, *grid, return_attention=projector.integrator is not None)
    return found if isinstance(found, tuple) else (found,)


WRITERS = (export_pt2, export_onnx, compile_package)
KINDS = ("llava-sp-cropping", "llava-sp-pooling-dfi", "factorized-pooling")


@pytest.mark.parametrize(("preset", "strict"), [*((name, False) for name in PRESETS), *((name, True) for name in KINDS)])
def test_programs_of_torchs_own_operators(preset, strict):
    projector, grid = make(preset)
    program = export_program(projector, strict=strict)
    operators = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert operators == {"aten"}
    for batch in (1, 4):
        patches = patches_of(projector, grid, batch)
        for given, expected in zip(program.module()(patches), outputs(projector, patches), strict=True):
            assert_close(given, expected)


def run_alone(folder, text):
    """In a process that cannot import this library."""
    given = ["-c", f"import sys; sys.modules['spatial_tokens'] = None\nimport torch\n{text}"]
    subprocess.run([sys.executable, *given], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""}, timeout=300)


@pytest.mark.parametrize(
    ("write", "load", "rank"),
    [
        (export_pt2, "torch.export.load('p.pt2').module()", None),
        (compile_package, "torch._inductor.aoti_load_package('p.pt2')", None),
        (compile_package, "torch._inductor.aoti_load_package('p.pt2')", 4),
    ],
    ids=["torch.export", "AOTInductor", "AOTInductor, factorized"],
)
def test_in_a_process_without_this_library(tmp_path, write, load, rank):
    projector, grid = make(rank=rank)
    cases = [(patches, outputs(projector, patches)) for patches in (patches_of(projector, grid, batch) for batch in (1, 8))]
    write(projector, tmp_path / "p.pt2")
    torch.save(cases, tmp_path / "cases.pt")
    run_alone(
        tmp_path,
        f"run = {load}\n"
        "for patches, expected in torch.load('cases.pt'):\n"
        "    for given, wanted in zip(run(patches), expected, strict=True):\n"
        "        assert (given - wanted).abs().max() <= 1e-5 * wanted.abs().max()",
    )
    assert sorted(os.listdir(tmp_path)) == ["cases.pt", "p.pt2"]


def onnx_outputs(path, patches):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["patches"]
    assert [each.name for each in session.get_outputs()] == ["tokens", "attention"][: len(session.get_outputs())]
    return [torch.from_numpy(each) for each in session.run(None, {"patches": patches.numpy()})]


@pytest.mark.parametrize(
    ("preset", "dtype"), [*((name, torch.float32) for name in PRESETS), *((name, torch.float16) for name in KINDS)]
)
def test_onnx(tmp_path, preset, dtype):
    pytest.importorskip("onnxscript")
    projector, grid = make(preset)
    projector.to(dtype)
    export_onnx(projector, tmp_path / "p.onnx")
    for batch in (1, 5):
        patches = patches_of(projector, grid, batch)
        expected = outputs(projector.double(), patches.double())
        projector.to(dtype)
        for given, wanted in zip(onnx_outputs(tmp_path / "p.onnx", patches), expected, strict=True):
            assert given.dtype == dtype
            assert_close(given, wanted, 1e-5 if dtype == torch.float32 else rounding(dtype, 10))
    assert os.listdir(tmp_path) == ["p.onnx"]


def test_onnx_weights_beside_the_model(tmp_path, monkeypatch):
    """A killed export leaves the model that was there, with its own weights; a whole one removes what it replaces."""
    pytest.importorskip("onnxscript")
    path, foreign = tmp_path / "p.onnx", tmp_path / "p.onnx.data"
    foreign.write_text("mine")
    projector, grid = make(kernel_sizes=(24,), detail_kernel_size=None)
    patches = patches_of(projector, grid)

    replace = os.replace

    def killed(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("spatial_tokens.export.LARGEST_MESSAGE", 1000)
        export_onnx(projector, path)
        (data,) = data_files(path)
        before = {each: each.read_bytes() for each in (path, data, foreign)}
        assert set(tmp_path.iterdir()) == set(before)
        for given, expected in zip(onnx_outputs(path, patches), outputs(projector, patches), strict=True):
            assert_close(given, expected)
        torch.nn.init.ones_(projector.patch_head.fc1.weight)
        patched.setattr("spatial_tokens.storage.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(projector, path)
    assert len(data_files(path)) == 2
    assert {each: each.read_bytes() for each in before} == before
    export_onnx(projector, path)
    assert set(tmp_path.iterdir()) == {path, foreign}
    assert_close(onnx_outputs(path, patches)[0], outputs(projector, patches)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_onnx_runtime_cannot_run(tmp_path, capsys, dtype):
    pytest.importorskip("onnxscript")
    projector, _ = make(kernel_sizes=(24,), detail_kernel_size=None)
    projector.to(dtype).save_pretrained(tmp_path / "in")
    name = str(dtype).removeprefix("torch.")
    message = f"is in {name}, which ONNX Runtime cannot run; cast first: projector.to(torch.float16)"
    with refused(message):
        export_onnx(projector, tmp_path / "p.onnx")
    given = ["export", str(tmp_path / "in"), str(tmp_path / "p.onnx")]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]
    if dtype == torch.bfloat16:
        assert main([*given, "--dtype", "float16"]) == 0
        expected = SPProjector.from_pretrained(tmp_path / "in", dtype=torch.float32)
        patches = patches_of(expected, expected.extractor.grid_size).half()
        tokens = onnx_outputs(tmp_path / "p.onnx", patches)[0]
        assert tokens.dtype == torch.float16
        assert_close(tokens, outputs(expected, patches.float())[0], rounding(torch.float16, 10))


@pytest.mark.parametrize("write", WRITERS)
def test_quantized_weights_need_another_library(tmp_path, write):
    pytest.importorskip("torchao")
    from spatial_tokens.compression import quantize_int8

    if write is export_onnx:
        pytest.importorskip("onnxscript")
    with refused("is quantized (a Int8Tensor), plain weights are needed; use the projector before quantization"):
        write(quantize_int8(make()[0]), tmp_path / "p.pt2")
    assert os.listdir(tmp_path) == []


def test_factorized_kernels_for_another_grid():
    projector, _ = make("factorized-cropping")
    program = export_program(projector, grid_size=(10, 16)).module()
    patches = patches_of(projector, (10, 16))
    for given, expected in zip(program(patches), outputs(projector, patches, (10, 16)), strict=True):
        assert_close(given, expected)


@pytest.mark.parametrize("write", WRITERS)
def test_dense_kernels_for_another_grid(tmp_path, write):
    if write is export_onnx:
        pytest.importorskip("onnxscript")
    with refused("this module reads only the grid that it was built for, got grid_sizes=(10, 16)"):
        write(make()[0], tmp_path / "p.pt2", grid_size=(10, 16))
    assert os.listdir(tmp_path) == []


def test_the_projector_stays_as_it_is():
    projector, _ = make()
    projector.extractor.eval()
    before = [module.training for module in projector.modules()]
    export_program(projector)
    assert [module.training for module in projector.modules()] == before
    assert any(before)
    assert not all(before)


class Sums(torch.nn.Module):
    num_spatial_tokens = 1

    def forward(self, patches):
        return patches.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "projector must be an SPProjector, got a Linear"),
        (lambda: SPProjector.from_config(make()[0].config, device="meta"), "the projector is on the meta device, without values"),
        (lambda: SPProjector(Sums(), None, MLPHead(4, 4), None), "a Sums names no grid_size and vision_hidden_size; give it both"),
    ],
)
def test_what_cannot_be_exported(tmp_path, projector, message):
    for write in (export_pt2, compile_package):
        with refused(message):
            write(projector(), tmp_path / "p.pt2")
    assert os.listdir(tmp_path) == []


def test_names_of_packages(tmp_path):
    with refused("a package's name ends in .pt2, got"):
        compile_package(make()[0], tmp_path / "p.so")
    with pytest.raises(SpatialTokensError, match="cannot write"):
        export_pt2(make()[0], Path("/proc/p.pt2"))


def test_in_a_terminal(tmp_path, capsys):
    projector, _ = make("factorized-cropping")
    projector.save_pretrained(tmp_path / "in")
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out.pt2"), "--grid", "10", "16"]
    assert main(given) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'out.pt2'}, 0.")
    patches = patches_of(projector, (10, 16))
    (tokens, _), (expected, _) = torch.export.load(tmp_path / "out.pt2").module()(patches), outputs(projector, patches, (10, 16))
    assert_close(tokens, expected)
    for arguments, message in [
        (given, "out.pt2 is already there; choose another OUT or give --overwrite"),
        ([*given[:2], "out.bin"], "OUT must end in .onnx or .pt2, got out.bin"),
        ([*given[:2], "out.onnx", "--compile"], "OUT must end in .pt2 with --compile, got out.onnx"),
        (["export", str(tmp_path), "out.onnx"], "is no directory of this library's format; make one: spatial-tokens convert"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["llava-sp-cropping", "factorized-pooling"])
def test_an_attached_llava(preset):
    """torch.export takes the whole model; its program reads other pictures and texts of any length, and checks the places."""
    pytest.importorskip("transformers")
    from spatial_tokens.adapters.huggingface import attach
    from spatial_tokens.adapters.huggingface.api import attachment_of
    from spatial_tokens.adapters.huggingface.ready import tiny_llava

    torch.manual_seed(0)
    model, processor = attach(*tiny_llava(), preset, spatial_hidden_size=8)
    for each in model.spatial_tokens.spatial_head.parameters():  # so that the tokens change what the model says
        torch.nn.init.normal_(each)

    def asked(text, picture):
        return {**processor(images=picture, text=text, return_tensors="pt"), "use_cache": False}

    length = {1: torch.export.Dim.AUTO}
    shapes = {"input_ids": length, "attention_mask": length, "pixel_values": None, "use_cache": None}
    given = asked("<image> What is this?", torch.zeros(3, 336, 336))
    program = torch.export.export(model.eval(), (), given, dynamic_shapes=shapes).module()
    picture = torch.rand(3, 336, 336, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for text in ("<image> What?", "Please look at <image> now"):
            other = asked(text, picture)
            expected = model(**other).logits
            assert_close(program(**other).logits, expected)
            assert (program(**asked(text, 1 - picture)).logits - expected).abs().max() > 0.001
        ids = other["input_ids"]
        with pytest.raises(RuntimeError, match="not as many places for spatial tokens as maps of patches"):
            program(**{**other, "input_ids": ids.masked_fill(ids == attachment_of(model).token_id, 5)})
