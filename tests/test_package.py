"""What an index, a citation and a stranger's pip read: names, versions and addresses that agree."""

import re
from pathlib import Path

import pytest

from spatial_tokens import __version__

tomllib = pytest.importorskip("tomllib")  # Python 3.11
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = PROJECT["project"]["urls"]["Homepage"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml", "noxfile.py")),
    *WORKFLOWS,
    *(
        path
        for folder in ("docs", "src", "examples", "benchmarks", "website")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".md", ".py", ".yml")
    ),
]


def readme_of_the_index():
    """The README after the substitutions that a build makes."""
    text = README
    for each in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"].replace("$HFPR_VERSION", __version__), text)
    return text


def test_links_of_the_readme_are_absolute_on_an_index_and_lead_somewhere():
    targets = re.findall(r"\]\((.*?)\)", readme_of_the_index())
    assert len(targets) == len(re.findall(r"\]\((.*?)\)", README)) > 10
    for target in targets:
        assert target.startswith("https://")
        if target.startswith(f"{HOME}/"):
            kind, tag, path = target.removeprefix(f"{HOME}/").split("#")[0].split("/", 2)
            assert (kind, tag) == ("raw" if path.endswith(".png") else "blob", f"v{__version__}")
            assert (ROOT / path).exists()


def test_the_address_is_one():
    found = {
        match for path in TEXTS for match in re.findall(r"https://github\.com/[^/\s]+/spatial-tokens", path.read_text("utf-8"))
    }
    assert found == {HOME}


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["repository-code"] == HOME
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["references"][0]["url"] == PROJECT["project"]["urls"]["Paper"]


def test_extras_that_are_named_are_those_that_there_are():
    extras = PROJECT["project"]["optional-dependencies"].keys()
    for path in TEXTS:
        text = path.read_text("utf-8")
        named = [
            *re.findall(r"(?:spatial-tokens|')\.?\[([\w,]+)\]", text),
            *re.findall(r'MissingExtraError\([^()]*"(\w+)"\)', text),
        ]
        assert {extra for each in named for extra in each.split(",")} <= extras, path


def test_every_extra_is_tried_alone():
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for extra in PROJECT["project"]["optional-dependencies"].keys() - {"all", "dev"}:
        assert f'    "{extra}": [' in sessions


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_sessions_that_there_are(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    sessions = re.findall(r"nox -s (\w+)", commands)
    assert sessions or ".ci/run" in commands
    defined = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(sessions) <= set(defined)


def test_the_gate_runs_on_every_python_that_the_classifiers_name():
    named = [each.split(" :: ")[-1] for each in PROJECT["project"]["classifiers"] if "Python :: 3." in each]
    gate = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    assert gate["jobs"]["gate"]["strategy"]["matrix"]["python"] == named
