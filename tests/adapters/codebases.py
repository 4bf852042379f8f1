"""Small models of other codebases, written as those are laid out, and the patches that docs/codebases.md shows for them."""

import importlib
import re
import sys
from pathlib import Path

from tests import reference

PAGE = Path(__file__).parents[2] / "docs" / "codebases.md"


def patches():
    """Each file's hunks, as (old text, new text)."""
    found = {}
    for block in re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        for path, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", block, flags=re.DOTALL | re.MULTILINE):
            for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
                lines = hunk.splitlines(keepends=True)
                assert all(line[0] in " +-" for line in lines), hunk
                old = "".join(line[1:] for line in lines if line[0] != "+")
                new = "".join(line[1:] for line in lines if line[0] != "-")
                found.setdefault(path, []).append((old, new))
    return found


def added_lines(path):
    return sum(new.count("\n") - old.count("\n") for old, new in patches()[path])


def load(directory, files, *names, patched=True):
    """The named modules of a codebase of these files; nothing of it stays in `sys.modules`."""
    for path, source in files.items():
        for old, new in patches().get(path, ()) if patched else ():
            assert source.count(old) == 1, f"the patch of {path} does not apply: {old}"
            source = source.replace(old, new)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(source, encoding="utf-8")
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(directory))
        roots = {path.split("/")[0].removesuffix(".py") for path in files}
        for name in set(sys.modules) - before:
            if name.split(".")[0] in roots:
                del sys.modules[name]


def spatial_tokens(parameters, patches, *, grid_size, kernel_sizes, detail_kernel_size):
    """What an SPProjector with an integrator and an MLP head gives without a patch head."""
    tokens = reference.extractor(reference.part(parameters, "extractor."), patches, grid_size=grid_size, kernel_sizes=kernel_sizes)
    tokens, _ = reference.integrator(
        reference.part(parameters, "integrator."),
        tokens,
        patches,
        grid_size=grid_size,
        kernel_size=detail_kernel_size,
        stride=2,
    )
    return reference.head(reference.part(parameters, "spatial_head."), tokens)
