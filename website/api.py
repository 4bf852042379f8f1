"""The pages of the reference: every public name, with its docstring, from the modules themselves."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).parent.parent / "src"

# Each page: what it is called, its modules, and what they are for.
PAGES: dict[str, tuple[str, ...]] = {
    "Top level": ("spatial_tokens",),
    "Modules": ("spatial_tokens.modules", "spatial_tokens.modules.ablations"),
    "Hugging Face models": ("spatial_tokens.adapters.huggingface", "spatial_tokens.adapters.huggingface.ready"),
    "Encoders": ("spatial_tokens.adapters.timm", "spatial_tokens.adapters.transformers"),
    "Other codebases": (
        "spatial_tokens.adapters.llava", "spatial_tokens.adapters.internvl", "spatial_tokens.adapters.nanovlm",
        "spatial_tokens.adapters.prepend",
    ),
    "Checkpoints": ("spatial_tokens.checkpoint",),
    "Training": (
        "spatial_tokens.training", "spatial_tokens.training.prepare", "spatial_tokens.training.conversations",
        "spatial_tokens.training.dataset", "spatial_tokens.training.trainer", "spatial_tokens.training.checkpoints",
        "spatial_tokens.training.tensor_parallel",
    ),
    "Compression and export": ("spatial_tokens.compression", "spatial_tokens.compression.plot", "spatial_tokens.export"),
    "Serving": ("spatial_tokens.serving",),
    "Operators": (
        "spatial_tokens.ops.window_linear", "spatial_tokens.ops.pyramid", "spatial_tokens.ops.integrate",
        "spatial_tokens.ops.backends",
    ),
    "Geometry and pictures": (
        "spatial_tokens.grid", "spatial_tokens.pictures", "spatial_tokens.visualize", "spatial_tokens.errors",
    ),
    "Diagnostics": ("spatial_tokens.diagnostics",),
    "Benchmarks": ("spatial_tokens.bench.own_projector",),
}  # fmt: skip


def public_names(module: ModuleType) -> list[str]:
    """What a module exports: its `__all__`, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name != "__version__"]
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_") and callable(getattr(module, name))]


def written() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The pages by file name, and the names that each documents.

    Raises:
        LookupError: If a public function or class has no docstring, or a package exports names and is on no page.
    """
    exporting = [path for path in SOURCE.rglob("__init__.py") if "\n__all__" in path.read_text(encoding="utf-8")]
    packages = {".".join(path.parent.relative_to(SOURCE).parts) for path in exporting}
    if lacking := packages - {module for modules in PAGES.values() for module in modules}:
        raise LookupError(f"website/api.py: no page documents {', '.join(sorted(lacking))}")
    pages, documented = {}, {}
    for title, modules in PAGES.items():
        file = f"reference/{title.lower().replace(' ', '-')}.md"
        lines, names = [f"# {title}\n"], []
        for path in modules:
            module = importlib.import_module(path)
            lines.append(f"## `{path}`\n\n{inspect.getdoc(module)}\n")
            for name in public_names(module):
                if callable(value := getattr(module, name)) and not (value.__doc__ or "").strip():
                    raise LookupError(f"{path}.{name} has no docstring")
                names.append(f"{path}.{name}")
                lines.append(f"::: {path}.{name}\n    options:\n      heading_level: 3\n")
        pages[file], documented[file] = "\n".join(lines), names
    return pages, documented
