"""Writers that are killed at every step, and one that is killed in earnest."""

import os
import signal
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

from spatial_tokens.storage import directories
from spatial_tokens.storage.staging import is_staging

STEPS = ["open", "mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "fsync", "listdir", "scandir"]


class Killed(BaseException):
    """What a killed process does next: nothing."""


def killed_at_every_step(action):
    """Runs an action again and again, ended before its n-th step on the file system, with nothing done after; yields after each."""
    for last in count():
        try:
            with ExitStack() as stack:
                steps = count()
                for owner, name in [*((os, name) for name in STEPS), (directories, "_exchange")]:
                    stack.enter_context(patch.object(owner, name, _until(last, steps, getattr(owner, name))))
                action()
        except Killed:
            _free_locks()
            yield
        else:
            assert last > 5, "hardly any step was seen"
            return


def _until(last, steps, function):
    def call(*args, **options):
        if next(steps) >= last:
            raise Killed
        return function(*args, **options)

    return call


def _free_locks():
    """As the system does when a process ends."""
    for file in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if is_staging(Path(os.readlink(f"/proc/self/fd/{file}")).parent.name):
                os.close(int(file))


def killed(action):
    """Runs an action in a process of its own, killed before its first rename."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            os.replace = die
            action()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
