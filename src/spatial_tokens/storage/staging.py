"""Staging folders: files are written in a folder of their own next to the target until it is complete.

A staging folder is named `.{target}.{random}.tmp` and holds a file `lock`, on which its writer keeps a lock. The system frees the
lock when the writer ends, however it ends. So the next write of the same target can remove the folders of writers that were killed
and no others: not those of another thread, nor of another container or host that shares the volume, where process ids mean nothing.
Where the file system has no locks, a folder is removed once it is a day old.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OLD = "old"  # what was at the target while something else takes its place: it goes back if nothing did
_LOCK = "lock"
_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_DAY = 24 * 60 * 60


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside a target, removed when the block ends; removes those of writers that were killed.

    Raises:
        OSError: If the folder cannot be made.
    """
    for folder in _folders_of(target):
        with suppress(OSError):
            _remove(folder, target)
    folder, lock = _create(target)
    try:
        yield folder
    finally:
        with suppress(OSError):
            _discard(folder, target)
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()


def is_staging(name: str) -> bool:
    """Whether a file's name is that of a staging folder."""
    return _NAME.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on the disk.

    Raises:
        OSError: If a file cannot be brought there. Not every file system can do so with a directory; then nothing is raised.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not os.path.isdir(path):
            raise


def _create(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        folder.mkdir()
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # before it had a lock, another writer took it for abandoned
            continue
        except OSError:
            folder.rmdir()
            raise
        if _acquire(lock) is not False and (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _acquire(lock: int) -> bool | None:
    """Whether the lock is now ours; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _folders_of(target: Path) -> list[Path]:
    """The staging folders of a target, whether or not somebody still writes in them."""
    try:
        names = os.listdir(target.parent)
    except OSError:
        return []
    return [target.with_name(name) for name in names if (match := _NAME.fullmatch(name)) and match[1] == target.name]


def _remove(folder: Path, target: Path) -> None:
    """Removes a staging folder, unless somebody still writes in it."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        folder.rmdir()  # fails if it holds anything; a writer that has just made it makes another
        return
    try:
        is_ours = _acquire(lock)
        if is_ours or (is_ours is None and time.time() - folder.stat().st_mtime > _DAY):
            _discard(folder, target)
    finally:
        os.close(lock)
    folder.rmdir()


def _discard(folder: Path, target: Path) -> None:
    """Empties a staging folder, the lock last; first puts back what had to make room for something that did not come."""
    if (folder / OLD).exists() and not os.path.lexists(target):
        os.replace(folder / OLD, target)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink()
