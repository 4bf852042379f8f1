"""Directories that are replaced whole: the old one or the new one is there, at every moment."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spatial_tokens.checks import as_path
from spatial_tokens.storage.files import writing
from spatial_tokens.storage.staging import OLD, staging_folder, sync


@contextmanager
def new_directory(path: str | os.PathLike[str], check: Callable[[Path], None]) -> Iterator[Path]:
    """Gives a temporary directory, which takes the place of `path` when the block ends well, and is removed if not.

    On Linux the two change places in one step. On a file system that cannot do that, the old one is moved away first; if the
    process is killed right then, the next call moves it back.

    Args:
        path: Where it is to be.
        check: Raises SpatialTokensError if what is at `path` must not be replaced. Called at the start and, as the block may take
            long, again at the end.

    Raises:
        SpatialTokensError: If it cannot be written, or what is there must not be replaced; that is then as it was.
    """
    target = as_path(path)
    if os.path.lexists(target):
        check(target)
    with ExitStack() as stack:
        with writing(target):
            folder = stack.enter_context(staging_folder(target))
            new = folder / "new"
            new.mkdir()
        yield new
        if os.path.lexists(target):
            check(target)
        with writing(target):
            for each in (*new.rglob("*"), new):
                sync(each)
            if not os.path.lexists(target):
                os.replace(new, target)
            elif not _exchange(new, target):
                os.replace(target, folder / OLD)
                os.replace(new, target)
            sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two paths have changed places, which Linux can do in one step on most file systems."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # an older C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0)
