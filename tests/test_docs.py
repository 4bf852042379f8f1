"""README and docs are run: their Python as doctests, their commands through the parser."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_tokens.cli.parser import make_parser

pytest.importorskip("timm")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page):
    parser, runner, shared = doctest.DocTestParser(), doctest.DocTestRunner(), {}
    for i, block in enumerate(blocks(page, "python")):
        test = parser.get_doctest(block, shared, f"{page.name}, block {i + 1}", str(page), 0)
        assert test.examples, f"{page.name}, block {i + 1} shows no result"
        assert runner.run(test, clear_globs=False).failed == 0
        shared = test.globs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    for line in "".join(blocks(page, "bash")).splitlines():
        for command in line.split("&&"):
            program, *arguments = shlex.split(command)
            if Path(program).name == "spatial-tokens":
                make_parser().parse_args(arguments)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_ci_runs_the_readmes_test_line():
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.endswith("&& .venv/bin/nox")]
    assert len(lines) == 1
    assert ".venv/bin/nox$' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readmes_figures_are_those_of_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/figures.py"
