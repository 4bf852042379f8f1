import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import spatial_tokens
from spatial_tokens import SPProjectorConfig
from spatial_tokens.ops.backends import using
from spatial_tokens.presets import PRESETS

PACKAGE = Path(spatial_tokens.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LAYERS = [  # lowest first; each holds top-level names of the package
    {"errors", "checks", "grid", "versions"},
    {"config", "presets", "pictures", "ops", "storage"},
    {"modules"},
    {"adapters", "visualize", "bench", "compression", "export"},
    {"checkpoint", "training", "serving", "diagnostics", "evaluation"},
    {"demo", "cli"},
    {"__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {  # what a package must not import although it is in a lower layer
    "ops": {"spatial_tokens.config", "spatial_tokens.storage"},
    "storage": {"spatial_tokens.ops"},
    "config": {"spatial_tokens.ops", "spatial_tokens.storage"},
}
OPTIONAL = {  # libraries beyond the core's, and the packages that may import them
    "timm": {"adapters", "bench", "diagnostics"},
    "torchvision": {"adapters"},
    "transformers": {"adapters", "bench", "checkpoint", "training", "serving", "diagnostics", "evaluation"},
    "tokenizers": {"adapters"},
    "huggingface_hub": {"storage"},
    "peft": {"adapters", "training"},
    "deepspeed": {"storage"},
    "triton": {"ops"},
    "vllm": {"serving"},
    "lmms_eval": {"evaluation"},
    "accelerate": {"evaluation"},
    "tqdm": {"evaluation"},
    "numpy": {"visualize", "bench", "demo"},
    "PIL": {"pictures", "visualize", "adapters", "diagnostics", "demo"},
    "torchao": {"storage", "compression"},
    "onnx_ir": {"export"},
    "onnxscript": {"export"},
    "matplotlib": {"visualize", "bench", "compression", "diagnostics", "demo"},
    "rich": {"bench"},
}
SUBCLASSES = {  # of an optional library's classes: nothing else imports these with itself
    "spatial_tokens.adapters.huggingface.rolled_vit",
    "spatial_tokens.evaluation.lmms_eval",
    "spatial_tokens.training.trainer",
    "spatial_tokens.serving.vllm.model",
    "spatial_tokens.serving.vllm.processing",
}
CORE = {"torch", "einops", "safetensors", "spatial_tokens"}


def imports(path):
    """The modules that a file imports, anywhere but under TYPE_CHECKING, each with whether importing the file imports it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    in_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        at_import = id(node) not in in_functions
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule if submodule in MODULES else node.module), at_import


def top_level(module):
    return module.split(".")[1] if "." in module else ""


def test_public_names():
    assert sorted(spatial_tokens.__all__) == [
        "DetailFeatureIntegrator",
        "FactorizedFeatureExtractor",
        "SPProjector",
        "SPProjectorConfig",
        "SpatialFeatureExtractor",
        "SpatialTokensError",
        "__version__",
        "list_backends",
        "list_presets",
    ]
    assert all(hasattr(spatial_tokens, name) for name in spatial_tokens.__all__)
    assert spatial_tokens.__version__ == version("spatial-tokens")


def test_what_there_is_can_be_listed():
    assert spatial_tokens.list_presets() == tuple(PRESETS)
    assert all(SPProjectorConfig.from_preset(name) for name in spatial_tokens.list_presets())
    listed = spatial_tokens.list_backends()
    assert listed[:3] == ("auto", "naive", "gemm")
    extractor = spatial_tokens.SpatialFeatureExtractor(4, 4, grid_size=4, kernel_sizes=(2,))
    for name in listed:  # each of them runs here, or on this machine's GPU
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        with using(name):
            extractor.to(device)(torch.randn(1, 16, 4, device=device))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "spatial_tokens.adapters.huggingface",
            {
                "attach",
                "detach",
                "PEFT_EXCLUDE_MODULES",
                "MaskPlaceholders",
                "insert_placeholders",
                "insert_slots",
                "list_families",
                "load_adapter",
                "print_trainable_parameters",
                "push_to_hub",
                "replace_projector",
                "save_adapter",
                "trainer_callback",
            },
        ),
        (
            "spatial_tokens.checkpoint",
            {"convert_released", "from_llava_sp", "from_released", "llava_from_parts", "to_llava_sp"},
        ),
        (
            "spatial_tokens.diagnostics",
            {"ProbeReport", "UsageReport", "another_pictures", "log_usage", "plot_probe", "plot_usage", "probe", "usage"},
        ),
        ("spatial_tokens.serving", {"hf_overrides", "serve_export"}),
        ("spatial_tokens.ops.window_linear", {"window_linear"}),
        ("spatial_tokens.ops.pyramid", {"pyramid"}),
        ("spatial_tokens.ops.integrate", {"attend", "integrate"}),
        (
            "spatial_tokens.modules",
            {
                "DetailFeatureIntegrator",
                "FactorizedFeatureExtractor",
                "LinearHead",
                "MLPHead",
                "SPProjector",
                "SpatialFeatureExtractor",
            },
        ),
        ("spatial_tokens.compression", {"CompressionReport", "CurvePoint", "TokenReport", "compress", "quantize_int8"}),
        ("spatial_tokens.modules.ablations", {"SlidingWindowExtractor", "TransformerExtractor"}),
    ],
)
def test_names_of_the_packages(module, names):
    exported = __import__(module, fromlist=["__all__"])
    assert set(exported.__all__) == names
    assert all(hasattr(exported, name) for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_the_name_of_what_it_defines(module):
    """An attribute of a package is one of the two, and API pages show that one."""
    path = MODULES[module]
    defined = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    assert path.stem not in defined
    if path.stem == "__init__":
        package = importlib.import_module(module) if "vllm" not in module else None
        submodules = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
        assert not submodules & set(getattr(package, "__all__", ()))


def test_errors_are_value_errors():
    assert issubclass(spatial_tokens.SpatialTokensError, ValueError)


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_importing_costs_torch_einops_and_safetensors_alone():
    script = (
        "import json, sys, torch, einops, safetensors.torch; before = {n.partition('.')[0] for n in sys.modules};"
        "import spatial_tokens, spatial_tokens.checkpoint, spatial_tokens.modules.ablations;"
        "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules} - before)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(json.loads(result.stdout)) - sys.stdlib_module_names == {"spatial_tokens"}
    assert not result.stderr


def test_the_package_and_the_command_are_imported_without_torch():
    script = (
        "import sys, spatial_tokens.cli; assert 'torch' not in sys.modules; spatial_tokens.modules.MLPHead;"
        "from spatial_tokens import *; SPProjector.config"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="module 'spatial_tokens' has no attribute 'projector'"):
        spatial_tokens.projector


@pytest.mark.parametrize("name", ["errors", "checks", "grid", "versions", "presets", "config", "pictures"])
def test_what_is_counted_and_checked_needs_no_torch(name):
    allowed = {"", "errors", "checks", "grid", "versions", "presets", "config"}
    for module, _ in imports(PACKAGE / f"{name}.py"):
        root = module.split(".")[0]
        known = root in sys.stdlib_module_names or top_level(module) in allowed
        assert known or (name, root) == ("pictures", "PIL")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    if module == "spatial_tokens":
        return
    assert top_level(module) in LAYER_OF, "a new top-level name: add it to LAYERS"
    for imported, _ in imports(MODULES[module]):
        if imported.split(".")[0] == "spatial_tokens" and top_level(imported):
            assert LAYER_OF[top_level(imported)] <= LAYER_OF[top_level(module)], f"{module} imports {imported}, from a higher layer"
            assert not any(imported.startswith(name) for name in FORBIDDEN.get(top_level(module), ()))


def test_imports_make_no_circle():
    below = {
        module: {name for name, _ in imports(path) if name in MODULES and name not in ("spatial_tokens", module)}
        for module, path in MODULES.items()
    }
    while below:
        ground = {module for module, needs in below.items() if not needs & below.keys()}
        assert ground, f"a circle within {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in ground}


@pytest.mark.parametrize("module", MODULES)
def test_optional_libraries_stay_in_their_packages(module):
    for imported, at_import in imports(MODULES[module]):
        library = imported.split(".")[0]
        if library in CORE or library in sys.stdlib_module_names:
            continue
        assert top_level(module) in OPTIONAL[library], f"{module} imports {library}"
        if module not in SUBCLASSES and top_level(module) != "ops":
            assert not at_import, f"{module} imports {library} with itself, not where it is used"


@pytest.mark.parametrize("module", MODULES)
def test_what_subclasses_an_optional_library_is_imported_where_it_is_used(module):
    if module not in SUBCLASSES:
        assert not {imported for imported, at_import in imports(MODULES[module]) if at_import} & SUBCLASSES


@pytest.mark.parametrize(
    "text", ["import timm", "try:\n    import timm\nexcept ImportError:\n    pass", "class A:\n    import timm"]
)
def test_imports_are_found_wherever_importing_the_file_runs_them(tmp_path, text):
    (tmp_path / "file.py").write_text(f"{text}\ndef f():\n    import rich\n")
    assert list(imports(tmp_path / "file.py")) == [("timm", True), ("rich", False)]
