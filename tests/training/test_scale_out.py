"""Several processes do what one does, under each engine: losses, first gradients, saved weights."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError, SPProjector
from spatial_tokens.adapters.huggingface import saving
from spatial_tokens.modules.ablations import TransformerExtractor
from spatial_tokens.training.tensor_parallel import parallelize_projector, tensor_parallel_plan
from tests.modules.checks import assert_all_close
from tests.tolerances import FLOAT32, assert_close
from tests.training import on_cpu, workers
from tests.training.workers import CASES, CHECKS, CONFIGS, STATE_DICTS
from tests.training.zero3 import BFLOAT16, CHECKS_OF_TWO, FILES, LOADED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds of a case, and what it saves."""
    made = {}

    def find(name):
        if name not in made:
            case, folder = CASES[name](), tmp_path_factory.mktemp("alone")
            found = workers.alone(case)
            case.save(folder)
            made[name] = found, weights_in(folder)
        return made[name]

    return find


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def ran(request, tmp_path_factory):
    """What each of so many processes found of a check, and where they saved."""
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    workers.start(request.param, folder)
    return lambda name: ([torch.load(folder / f"{name}.{rank}") for rank in range(request.param)], folder / name)


def weights_in(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same(found, weights, expected, expected_weights):
    for each in found:
        assert_close(torch.tensor(each["losses"]), torch.tensor(expected["losses"]))
        assert_all_close(each["gradients"], expected["gradients"], FLOAT32)
    assert_all_close(weights, expected_weights, FLOAT32)


@pytest.mark.parametrize("name", [name for name in CHECKS if name != STATE_DICTS])
def test_as_one_process(ran, alone, name):
    found, folder = ran(name)
    assert_same(found, weights_in(folder), *alone(CHECKS[name][1]))


@pytest.fixture(scope="module")
def of_two(ran):
    """What each of two processes found, where that is what `ran` ran."""
    if not CHECKS_OF_TWO:
        pytest.skip("deepspeed is not installed")
    if len(ran(next(iter(CHECKS)))[0]) != 2:
        pytest.skip("these are checks of two processes")
    return ran


@pytest.mark.parametrize("name", ["zero3, cropping", "zero3, llava", LOADED])
def test_zero3_as_one_process(of_two, alone, name):
    """Attached first; attached to a base that was loaded in parts."""
    found, folder = of_two(name)
    assert_same(found, weights_in(folder), *alone(CHECKS_OF_TWO[name][1]))
    assert found[0].get("base is whole", True)


def test_files_under_zero3(of_two):
    found, _ = of_two(FILES)
    names = ("load_adapter", "detach", "load_trained", "a step, and the same again", "nan is seen")
    assert found == [dict.fromkeys(names, True)] * 2


def test_prepared_models_that_deepspeed_casts(of_two, alone):
    found, _ = of_two(BFLOAT16)
    expected = alone("llava")[0]["losses"][0]
    for each in found:
        torch.testing.assert_close(torch.tensor(each["losses"]), torch.full((3,), expected), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("tensor parallel")])
def test_each_process_has_its_part_of_the_kernels(ran, name):
    """No more than that is in memory; all kernels' tokens, the detail map and each MLP take one collective, the weights none."""
    found, _ = ran(name)
    for each in found:
        if "factorized" in name:  # small: whole in each process, so that the two MLPs alone are shared out
            assert each["share"] == 1
            assert each["collectives"] == 2
            continue
        assert each["share"] == pytest.approx(1 / len(found), rel=0.25 if "uneven" in name else 1e-9)
        assert each["collectives"] == (3 if "pooling" in name or "llava" in name else 4)


def test_state_dicts_of_a_tensor_parallel_projector(ran):
    for each in ran(STATE_DICTS)[0]:
        alone, together = each["norms"]
        assert together == pytest.approx(alone, rel=FLOAT32)
        assert each["same"] == [True, True, True]


def test_a_process_that_writes_nothing_uploads_nothing(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", lambda **_: None)
    monkeypatch.setattr(saving, "save_adapter", lambda model, folder: None)
    assert saving.push_to_hub(None, "user/name") == ""


# examples/engines, as the page says to launch them

LAUNCHED = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("engine", LAUNCHED)
def test_a_ready_config(tmp_path, alone, engine):
    pytest.importorskip("accelerate")
    if engine.startswith("zero") and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    if engine == "fsdp2" and not workers.FSDP_ON_CPU:
        pytest.skip("this torch's FSDP2 does not run on CPUs")
    options = ["--config_file", f"examples/engines/{engine}.yaml", "--num_processes=2", "--mixed_precision=no"]
    options += ["--main_process_port=0", "--gradient_clipping=1e9"]
    script = ["-m", "tests.training.on_cpu", "tests/training/launched.py", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, *script],
        cwd=ROOT, env={**os.environ, **on_cpu.environment(engine)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = [torch.load(tmp_path / f"found.{rank}") for rank in range(2)]
    assert [each["engine"] for each in found] == [LAUNCHED[engine]] * 2
    assert_same(found, weights_in(tmp_path / "adapter"), *alone("llava"))


# What is refused


def projector():
    return SPProjector.from_config(CONFIGS["cropping"])


def mesh(*sizes):
    return SimpleNamespace(ndim=len(sizes), mesh_dim_names=("dp", "tp")[-len(sizes) :], size=lambda: sizes[-1])


def with_another_extractor():
    made = projector()
    extractor = TransformerExtractor(8, grid_size=8, kernel_sizes=(4, 8), num_layers=1, num_heads=2)
    return SPProjector(extractor, None, nn.Linear(8, 12), made.patch_head)


def with_another_head():
    made = projector()
    return SPProjector(made.extractor, made.integrator, nn.Linear(16, 12), made.patch_head)


def with_a_wrapped_kernel():
    made = projector()
    made.extractor.kernels[0] = nn.Sequential(made.extractor.kernels[0])
    return made


class Sharded(nn.Parameter):
    pass


def with_learned_maps():
    made = projector()
    return SPProjector.from_config(replace(made.config, rank=2, frequencies=2, spatial_basis="learned"))


def with_a_sharded_kernel():
    made = projector()
    made.extractor.kernels[0].weight = Sharded(made.extractor.kernels[0].weight.detach())
    return made


@pytest.mark.parametrize(
    ("make", "shard", "message"),
    [
        (projector, "rows", "shard must be 'output' or 'input', got 'rows'"),
        (with_another_extractor, "output", "no tensor-parallel plan for a TransformerExtractor"),
        (with_learned_maps, "output", "no tensor-parallel plan for learned maps; use spatial_basis='cosine'"),
        (with_another_head, "output", "no tensor-parallel plan for a Linear"),
        (with_a_wrapped_kernel, "input", "if a part is wrapped, merge or unload it first"),
        (with_a_sharded_kernel, "input", "sharded or quantized already"),
    ],
)
def test_no_plan(make, shard, message):
    with pytest.raises(SpatialTokensError, match=message):
        tensor_parallel_plan(make(), shard)


@pytest.mark.parametrize(
    ("sizes", "shard", "message"),
    [
        ((2, 2), "output", r"the mesh has 2 dimensions, \('dp', 'tp'\); give one of them"),
        ((9,), "output", "8 output channels of a kernel cannot be shared out over 9 processes"),
        ((13,), "input", "12 channels of a head cannot be shared out over 13 processes"),
        ((129,), "input", "128 input channels of a kernel cannot be shared out over 129 processes"),
    ],
)
def test_meshes_that_do_not_fit(sizes, shard, message):
    made = projector()
    with pytest.raises(SpatialTokensError, match=message):
        parallelize_projector(made, mesh(*sizes), shard)
    assert all(type(each) is nn.Parameter for each in made.parameters())
