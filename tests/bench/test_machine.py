"""The commit in a report."""

import shutil
import subprocess

import pytest

from spatial_tokens.bench.machine import commit_of


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_of_the_files_own_repository(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    file, other = tmp_path / "package.py", tmp_path / "other.py"
    file.write_text("1")
    assert commit_of(file) is None
    git("init", "-q")
    assert commit_of(file) is None, "not tracked: a package that was installed into somebody's checkout"
    git("add", "package.py")
    git("commit", "-qm", "a")
    other.write_text("untracked files do not count")
    assert commit_of(file) == git("rev-parse", "--short=12", "HEAD")
    file.write_text("2")
    assert commit_of(file) == git("rev-parse", "--short=12", "HEAD") + "+"
