"""Writers that are killed, and writers of one target at the same time."""

import os
import threading
import time
import warnings
from contextlib import suppress
from functools import partial

import pytest

from spatial_tokens import SpatialTokensError, SPProjector
from spatial_tokens.storage import directories, staging
from spatial_tokens.storage.directories import new_directory
from spatial_tokens.storage.files import atomic_write, write_text
from spatial_tokens.training.checkpoints import check_complete, mark_complete
from tests.storage.kills import killed, killed_at_every_step
from tests.storage.test_pretrained import CONFIGS, build

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def state_of(projector):
    return projector.config, [each.tolist() for each in projector.state_dict().values()]


def loaded(folder):
    """What is loaded, and whether a warning said that config.json is of another save."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = state_of(SPProjector.from_pretrained(folder))
    assert all("is not the config that model.safetensors was saved with" in str(each.message) for each in caught)
    return state, bool(caught)


def test_a_save_killed_at_any_step_leaves_the_old_state_or_the_new_one(tmp_path):
    old, new = build(), build(CONFIGS["pooling"])
    old.save_pretrained(tmp_path)
    seen = set()
    for _ in killed_at_every_step(partial(new.save_pretrained, tmp_path)):
        state, warned = loaded(tmp_path)
        assert state in (state_of(old), state_of(new))
        seen.add((state == state_of(new), warned))
        old.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"], "the next save removes what was left"
        assert loaded(tmp_path) == (state_of(old), False)
    assert seen == {(False, False), (True, True), (True, False)}


def test_a_first_save_killed_at_any_step(tmp_path):
    new = build()
    for _ in killed_at_every_step(partial(new.save_pretrained, tmp_path / "a" / "b")):
        with suppress(SpatialTokensError):
            assert loaded(tmp_path / "a" / "b") == (state_of(new), False)
    assert loaded(tmp_path / "a" / "b") == (state_of(new), False)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]


def write_directory(path, text, *, fails=False):
    with new_directory(path, lambda _: None) as folder:
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text(text)
        if fails:
            raise InterruptedError


def content(path):
    return {name: (path / name).read_text() for name in ("a", "below/b")}


@pytest.mark.parametrize("before", ["old", None])
def test_a_directory_killed_at_any_step_is_the_old_one_or_the_new_one(tmp_path, before):
    target, seen = tmp_path / "out", []
    if before:
        write_directory(target, before)
    for _ in killed_at_every_step(partial(write_directory, target, "new")):
        seen.append(target.exists() and content(target)["a"])
        assert not seen[-1] or set(content(target).values()) == {seen[-1]}
        assert seen[-1] or not before, "at no moment is there none"
    assert set(seen) == {before or False, "new"}
    write_directory(target, "new")
    assert os.listdir(tmp_path) == ["out"]


def test_where_directories_cannot_change_places_the_next_call_brings_the_old_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "_exchange", lambda *_: False)
    target, missing = tmp_path / "out", 0
    write_directory(target, "old")
    for _ in killed_at_every_step(partial(write_directory, target, "new")):
        missing += not target.exists()
        with suppress(InterruptedError):
            write_directory(target, "other", fails=True)
        assert content(target) in ({"a": "old", "below/b": "old"}, {"a": "new", "below/b": "new"})
        assert os.listdir(tmp_path) == ["out"]
    assert missing == 1


def test_a_checkpoint_killed_while_it_is_marked(tmp_path):
    (tmp_path / "weights").write_text("weights")
    for _ in killed_at_every_step(partial(mark_complete, tmp_path)):
        with suppress(SpatialTokensError):
            check_complete(tmp_path)
        mark_complete(tmp_path)
        check_complete(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["complete.json", "weights"]
        (tmp_path / "complete.json").unlink()


def test_writers_of_one_process_do_not_share_a_temporary_file(tmp_path):
    target = tmp_path / "file"
    with atomic_write(target) as first:
        first.write_text("first")
        write_text(target, "second")
        assert target.read_text() == "second"
        assert first.read_text() == "first", "a writer that is alive keeps its file"
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def test_two_savers_and_a_reader_at_once(tmp_path):
    projectors = [build(), build(CONFIGS["pooling"])]
    states, failures, done = [state_of(each) for each in projectors], [], threading.Event()
    projectors[0].save_pretrained(tmp_path)

    def guarded(action):
        try:
            action()
        except Exception as error:
            failures.append(error)

    def read():
        while not done.is_set():
            assert state_of(SPProjector.from_pretrained(tmp_path)) in states

    def save(projector):
        for _ in range(15):
            projector.save_pretrained(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # config.json may be the other saver's
        reader = threading.Thread(target=guarded, args=(read,))
        savers = [threading.Thread(target=guarded, args=(partial(save, each),)) for each in projectors]
        for thread in (reader, *savers):
            thread.start()
        for thread in savers:
            thread.join()
        done.set()
        reader.join()
    assert failures == []
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_what_a_killed_process_left_is_removed_by_the_next_save_of_the_same_target(tmp_path):
    killed(partial(write_text, tmp_path / "file", "new"))
    left = os.listdir(tmp_path)
    assert [staging.is_staging(name) for name in left] == [True]
    write_text(tmp_path / "another file", "text")
    assert left[0] in os.listdir(tmp_path)
    write_text(tmp_path / "file", "text")
    assert sorted(os.listdir(tmp_path)) == ["another file", "file"]


def test_without_locks_only_old_left_overs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "fcntl", None)
    killed(partial(write_text, tmp_path / "file", "new"))
    (left,) = tmp_path.iterdir()
    write_text(tmp_path / "file", "text")
    assert left.exists()
    os.utime(left, (0, time.time() - 25 * 60 * 60))
    write_text(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == ["file"]


def test_names_like_ours_are_not_touched(tmp_path):
    names = [
        ".file.tmp",
        ".file.1234.tmp",
        ".other.0123456789abcdef.tmp",
        ".file.0123456789abcdef.tmp",
        ".file.fedcba9876543210.tmp",
    ]
    for name in names[:-1]:
        (tmp_path / name).write_text("theirs")
    (tmp_path / names[-1]).mkdir()
    (tmp_path / names[-1] / "file").write_text("theirs")
    write_text(tmp_path / "file", "text")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "file"])


@pytest.fixture
def events(monkeypatch):
    """Each file that is flushed to the disk or renamed, by its inode, in order."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(("fsync", os.fstat(file).st_ino)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", os.stat(a).st_ino)), replace(a, b)))
    return events


def flushed(path):
    return "fsync", path.stat().st_ino


def renamed(path):
    return "replace", path.stat().st_ino


def test_files_and_their_directory_are_on_the_disk(tmp_path, events):
    """Each file before it is renamed, its directory afterwards."""
    folder = tmp_path / "new"
    build().save_pretrained(folder)
    for name in ("model.safetensors", "config.json"):
        at = events.index(renamed(folder / name))
        assert flushed(folder / name) in events[:at]
        assert flushed(folder) in events[at:]
    assert flushed(tmp_path) in events, "the directory that holds the new directory"


def test_a_directory_is_on_the_disk(tmp_path, events):
    write_directory(tmp_path / "out", "text")
    at = events.index(renamed(tmp_path / "out"))
    for path in ("out", "out/a", "out/below", "out/below/b"):
        assert flushed(tmp_path / path) in events[:at]
    assert flushed(tmp_path) in events[at:]


def test_a_checkpoint_is_on_the_disk_before_it_is_marked(tmp_path, events):
    (tmp_path / "weights").write_text("weights")
    mark_complete(tmp_path)
    assert events.index(flushed(tmp_path / "weights")) < events.index(renamed(tmp_path / "complete.json"))


def test_a_disk_that_cannot_hold_a_file_is_an_error(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    real = os.fsync

    def full(file):
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpatialTokensError, match=r"cannot write .*file: No space left on device"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
