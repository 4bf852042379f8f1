"""Which backend runs, that all give the same, and that the operators step aside for kernels that are more than their weight."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_tokens import DetailFeatureIntegrator, SpatialFeatureExtractor, SpatialTokensError
from spatial_tokens.modules.ablations import SlidingWindowExtractor
from spatial_tokens.ops import backends
from spatial_tokens.ops.backends import resolve
from tests.modules.checks import assert_all_close, outputs_and_gradients
from tests.tolerances import FLOAT32, assert_close, assert_each_close

features = torch.zeros(1, 2, 2, 3)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.setattr(backends, "OVERRIDE", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_always_finds_one(dtype, device):
    assert resolve("auto", features.to(device, dtype)) == "gemm"


@pytest.mark.parametrize("name", ["naive", "gemm"])
def test_a_named_one_runs_and_goes_before_the_environments(name, monkeypatch):
    assert resolve(name, features) == name
    monkeypatch.setattr(backends, "OVERRIDE", "triton")
    assert resolve(name, features) == name


def test_the_environments_goes_before_auto(monkeypatch):
    monkeypatch.setattr(backends, "OVERRIDE", "naive")
    assert resolve("auto", features) == "naive"


@pytest.mark.parametrize("name", ["cuda", "", "Naive", "naive ", None, 3])
def test_unknown_ones_are_refused(name, monkeypatch):
    with pytest.raises(SpatialTokensError, match=r"^backend must be one of auto, naive, gemm, triton, got "):
        resolve(name, features)
    monkeypatch.setattr(backends, "OVERRIDE", name)
    with pytest.raises(SpatialTokensError, match=r"^SPATIAL_TOKENS_BACKEND must be one of auto, naive, gemm, triton, got "):
        resolve("auto", features)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(
        SpatialTokensError, match=r"^backend='triton' cannot run: .* on cpu, .*TRITON_INTERPRET=1.*; use 'auto' or 'gemm'$"
    ):
        resolve("triton", features)
    with pytest.raises(SpatialTokensError, match=r"^backend='triton' cannot run: .* on meta"):
        resolve("triton", features.to("meta"))
    with pytest.raises(SpatialTokensError, match=r"take float32, bfloat16 and float16, got torch.float64; use 'auto' or 'gemm'$"):
        resolve("triton", features.double())
    monkeypatch.setattr(backends, "OVERRIDE", "triton")
    with pytest.raises(SpatialTokensError, match=r"^SPATIAL_TOKENS_BACKEND='triton' cannot run: "):
        resolve("auto", features)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("auto", features) == resolve("triton", features.half()) == "triton"
    with pytest.raises(SpatialTokensError, match=r"got torch\.float64"):
        resolve("triton", features.double())


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "TRITON", None)
    with pytest.raises(SpatialTokensError, match="cannot run: triton is not installed; use 'auto' or 'gemm'"):
        resolve("triton", features)
    assert resolve("auto", features) == "gemm"


CODE = """
import torch
from spatial_tokens import SpatialFeatureExtractor
extractor = SpatialFeatureExtractor(3, 2, grid_size=4, kernel_sizes=(2, 4))
with torch.profiler.profile() as profile:
    extractor(torch.zeros(1, 16, 3))
print(any("spatial_tokens::" in event.key for event in profile.key_averages()))
"""


@pytest.mark.parametrize(("value", "printed"), [("naive", "False\n"), (None, "True\n")])
def test_the_environment_variable_is_read(value, printed):
    run = run_code({"SPATIAL_TOKENS_BACKEND": value})
    assert (run.returncode, run.stdout) == (0, printed), run.stderr


def test_a_wrong_environment_variable_is_named():
    run = run_code({"SPATIAL_TOKENS_BACKEND": "fast"})
    assert "SPATIAL_TOKENS_BACKEND must be one of auto, naive, gemm, triton, got 'fast'" in run.stderr


def run_code(changes):
    environment = {name: value for name, value in (os.environ | changes).items() if value is not None}
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)


GRID = (6, 8)
MODULES = {
    "cropping": lambda: SpatialFeatureExtractor(4, 5, grid_size=GRID, kernel_sizes=(2, (4, 6), GRID)),
    "pooling": lambda: SpatialFeatureExtractor(4, 5, grid_size=GRID, kernel_sizes=(2, (4, 6), GRID), variant="pooling"),
    "integrator": lambda: DetailFeatureIntegrator(4, 5, grid_size=GRID, kernel_size=(3, 4)),
    "sliding window": lambda: SlidingWindowExtractor(4, 5, grid_size=GRID, kernel_size=(3, 4), stride=(1, 2)),
}
FIRST = {"cropping": "kernels.0", "pooling": "kernels.1", "integrator": "detail_kernel", "sliding window": "kernels.2"}
every_module = pytest.mark.parametrize("name", MODULES)


def inputs_of(module):
    patches = torch.randn(2, 48, 4)
    return [torch.randn(2, 3, 5), patches] if isinstance(module, DetailFeatureIntegrator) else [patches]


class Calls(TorchDispatchMode):
    """How often `window_linear` ran as one operator."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.name() == "spatial_tokens::window_linear"
        return function(*args, **(kwargs or {}))


@every_module
def test_every_backend_gives_the_same(name, monkeypatch):
    module = MODULES[name]()
    inputs, results = inputs_of(module), []
    for backend in ("naive", "gemm", "auto"):
        monkeypatch.setattr(backends, "OVERRIDE", backend)
        with Calls() as calls:
            results.append(outputs_and_gradients(module, inputs, dict(module.named_parameters())))
        assert calls.number == (backend != "naive")
    for other in results[1:]:
        assert_all_close(other, results[0], FLOAT32)


def by_forward_hook(layer, seen):
    layer.register_forward_hook(lambda *_: seen.append("ran"))


def by_pre_hook(layer, seen):
    layer.register_forward_pre_hook(lambda *_: seen.append("ran"))


def by_backward_hook(layer, seen):
    layer.register_full_backward_hook(lambda *_: seen.append("ran"))


def by_backward_pre_hook(layer, seen):
    layer.register_full_backward_pre_hook(lambda *_: seen.append("ran"))


def by_forward(layer, seen):
    forward = layer.forward
    layer.forward = lambda x: seen.append("ran") or forward(x)


def by_class(layer, seen):
    class LowRank(nn.Linear):
        def forward(self, x):
            seen.append("ran")
            return super().forward(x) + 0 * x[..., :1]

    layer.__class__ = LowRank


def by_parametrization(layer, seen):
    class Same(nn.Module):
        def forward(self, weight):
            seen.append("ran")
            return weight.clone()

    parametrize.register_parametrization(layer, "weight", Same())
    seen.clear()


def by_parameter_class(layer, seen):
    class Quantized(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                seen.append("ran")
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    layer.weight = Quantized(layer.weight.data)


WRAPS = [
    by_forward_hook,
    by_pre_hook,
    by_backward_hook,
    by_backward_pre_hook,
    by_forward,
    by_class,
    by_parametrization,
    by_parameter_class,
]


def run_with_gradients(module, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    output = module(*inputs)
    output.square().sum().backward()
    return [output.detach(), *[x.grad for x in inputs], *[p.grad for p in module.parameters()]]


@pytest.mark.parametrize("wrap", WRAPS)
@every_module
def test_a_wrapped_kernel_is_called(name, wrap):
    module, seen = MODULES[name](), []
    inputs = inputs_of(module)
    expected = run_with_gradients(module, inputs)
    wrap(module.get_submodule(FIRST[name]), seen)
    with Calls() as calls:
        given = run_with_gradients(module, inputs)
    assert seen
    assert calls.number == 0
    assert_close(given[0], expected[0])
    for ours, theirs in zip(sorted(map(norm, given)), sorted(map(norm, expected)), strict=True):
        assert abs(ours - theirs) <= 10 * FLOAT32 * max(1.0, theirs)  # a parametrization moves its parameter to the end


def norm(tensor):
    return tensor.norm().item()


GLOBAL = {
    "forward": global_hooks.register_module_forward_hook,
    "pre": global_hooks.register_module_forward_pre_hook,
    "backward": global_hooks.register_module_full_backward_hook,
    "backward pre": global_hooks.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL)
@every_module
def test_a_hook_on_all_modules_sees_every_kernel(name, kind):
    module, seen = MODULES[name](), set()
    inputs = inputs_of(module)
    expected = run_with_gradients(module, inputs)
    handle = GLOBAL[kind](lambda layer, *_: seen.add(layer) or None)
    try:
        given = run_with_gradients(module, inputs)
    finally:
        handle.remove()
    for ours, theirs in zip(given, expected, strict=True):
        assert_each_close(ours, theirs)
    assert {layer for layer in module.modules() if type(layer) in (nn.Linear, nn.LayerNorm)} <= seen
    with Calls() as calls:
        module(*inputs)
    assert calls.number == 1


PARTS = ["query_projector.0", "value_projector", "key_projector.1"]
BY_PART = [(part, wrap) for part in PARTS for wrap in (WRAPS if part.endswith("1") else WRAPS[:5])]


@pytest.mark.parametrize(("layer", "wrap"), BY_PART)
def test_a_wrapped_projector_of_the_integrator_is_called(layer, wrap):
    module, seen = MODULES["integrator"](), []
    inputs, part = inputs_of(module), module.get_submodule(layer)
    expected = run_with_gradients(module, inputs)
    wrap(part, seen)
    given = run_with_gradients(module, inputs)
    assert seen
    assert_close(given[0], expected[0])
    assert_close(given[2], expected[2])


def test_a_projector_of_other_parts_is_called():
    module = MODULES["integrator"]()
    inputs = inputs_of(module)
    module.query_projector = nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 5))
    module.key_projector = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    module.value_projector = nn.Identity()
    tokens = module(*inputs)
    assert tokens.shape == (2, 3, 10)
    assert_close(tokens.norm().square(), run_by_hand(module, *inputs).norm().square())


def run_by_hand(module, tokens, patches):
    windows = patches.unflatten(1, GRID).unfold(1, 3, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
    detail = module.detail_kernel(windows)
    query, key = module.query_projector(tokens), module.key_projector(detail)
    return torch.cat([tokens, (query @ key.mT * 5**-0.5).softmax(-1) @ module.value_projector(detail)], -1)


DTENSOR = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from spatial_tokens import SpatialFeatureExtractor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
extractor = SpatialFeatureExtractor(3, 2, grid_size=4, kernel_sizes=(2, 4))
patches = torch.randn(2, 16, 3)
expected = extractor(patches)
for kernel in extractor.kernels:
    kernel.weight = nn.Parameter(distribute_tensor(kernel.weight.data, mesh, [Shard(0)]))
given = extractor(distribute_tensor(patches, mesh, [Replicate()]))
assert isinstance(given, DTensor)
torch.testing.assert_close(given.full_tensor(), expected)
given.full_tensor().sum().backward()
assert all(isinstance(kernel.weight.grad, DTensor) for kernel in extractor.kernels)
dist.destroy_process_group()
print("same")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_sharded_kernels_are_called():
    run = subprocess.run([sys.executable, "-c", DTENSOR], capture_output=True, text=True)
    assert run.stdout == "same\n", run.stderr
