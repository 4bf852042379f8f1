"""Runs `triton_cases.py` in a process of its own: interpreted on any CPU, natively where there is a GPU."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")


def release(package="triton"):
    return tuple(int(part) for part in version(package).split(".")[:2])


COUNTS_IN_ARRAYS = pytest.mark.skipif(
    find_spec("triton") is not None and release() < (3, 7) and release("numpy") >= (2, 5),
    reason="the interpreter of these tritons counts loops in arrays, which numpy 2.5 does not take for integers",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(find_spec("triton") is not None and release() < (3, 3), reason="before 3.3 triton's kernels take no tuples")
@pytest.mark.parametrize(
    "interpret",
    [pytest.param("1", marks=COUNTS_IN_ARRAYS), pytest.param("0", marks=pytest.mark.gpu)],
    ids=["interpreted", "native"],
)
def test_kernels(interpret):
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment.pop("SPATIAL_TOKENS_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    passed = re.search(r"^(\d+) passed(, \d+ warnings?)? in ", run.stdout, re.MULTILINE)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert passed, run.stdout[-2000:]  # none failed, and none was skipped
    assert int(passed[1]) >= 65
