"""The patch files beside docs/codebases.md: git applies them, and they change what the page shows."""

import re
import shutil
import subprocess

import pytest

from tests.adapters.codebases import PAGE

FILES = sorted((PAGE.parent / "patches").glob("*.patch"))


def changed(text):
    """The changed lines of each file of a diff, but for empty ones."""
    found, path = {}, None
    for line in text.splitlines():
        if line.startswith("--- "):
            path = line.removeprefix("--- ").removeprefix("a/")
        elif line[:1] in ("+", "-") and line != "+" and not line.startswith("+++ "):
            found.setdefault(path, []).append(line)
    return found


def test_they_change_what_the_page_shows():
    page = "".join(re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert changed("".join(path.read_text(encoding="utf-8") for path in FILES)) == changed(page)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_applies_them(tmp_path, path):
    """To files that have what the patch was made on where it says, and other lines elsewhere."""
    text = path.read_text(encoding="utf-8")
    for name, body in re.findall(r"^--- a/(\S+)\n(.*?)(?=^--- |\Z)", text, flags=re.DOTALL | re.MULTILINE):
        lines = []
        hunks = re.split(r"^@@ -(\d+),\d+ .*\n", body, flags=re.MULTILINE)[1:]
        for start, hunk in zip(hunks[::2], hunks[1::2], strict=True):
            lines += [f"filler {number}" for number in range(len(lines) + 1, int(start))]
            lines += [line[1:] for line in hunk.splitlines() if line[:1] != "+"]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join([*lines, "filler", ""]))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "apply", "--verbose", path], cwd=tmp_path, check=True)
    for name, lines in changed(text).items():
        assert {line[1:] for line in lines if line[0] == "+"} <= set((tmp_path / name).read_text().splitlines())
