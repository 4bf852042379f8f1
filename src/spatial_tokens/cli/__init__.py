"""The `spatial-tokens` command: its streams, its errors and its exit code.

What a command does is imported, most often with torch, once its words are known to be right, and where Ctrl-C already ends it
without a traceback.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pkgutil import resolve_name
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn, TextIO

from spatial_tokens.cli.parser import make_parser
from spatial_tokens.errors import SpatialTokensError, on_one_line, reason

PROGRAM = "spatial-tokens"
INTERRUPTED = 130

Handler = Callable[[int, FrameType | None], Any]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after one line on standard error if what was asked for cannot be done, 130 after Ctrl-C."""
    if sys.stdout is None:  # as Python has it where file descriptor 1 is closed
        return _fail(f"{PROGRAM}: error: standard output is closed; redirect it to a file, or to /dev/null")
    interrupts: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        interrupts.append(number)  # as a library that is being imported may pass over the exception, and fail later
        raise KeyboardInterrupt

    with _escapes(sys.stdout):
        try:
            failure = _run(argv, interrupt)
        except BaseException as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                return INTERRUPTED
            raise
    if interrupts:
        return INTERRUPTED
    return 0 if failure is None else _fail(failure)


def _run(argv: list[str] | None, interrupt: Handler) -> str | None:
    """Runs the command; returns what to say if it fails."""
    name = PROGRAM
    try:
        try:
            # torch may abort where KeyboardInterrupt meets it in its C++ code
            with _on_interrupt(lambda *_: os._exit(INTERRUPTED)):
                arguments = make_parser().parse_args(argv)
                name = f"{PROGRAM} {arguments.command}"
                command = resolve_name(f"{__name__}.{arguments.run}")
            with _on_interrupt(interrupt):
                command(arguments)
        finally:
            sys.stdout.flush()
    except SpatialTokensError as error:
        return f"{name}: error: {error}"
    except BrokenPipeError:  # whoever read our output has seen enough
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        return f"{name}: error: cannot use {error.filename or 'standard output'}: {reason(error)}"
    return None


@contextmanager
def _on_interrupt(handler: Handler) -> Iterator[None]:
    """Has Ctrl-C call a handler, unless it is ignored or another's already; only the main thread can say."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _escapes(stream: TextIO) -> Iterator[None]:
    """Writes characters that the terminal's encoding lacks as escapes."""
    errors, reconfigure = stream.errors, getattr(stream, "reconfigure", None)
    if reconfigure is None or errors != "strict":
        yield
        return
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # it flushes, and what is left may have nowhere to go
            reconfigure(errors=errors)


def _fail(message: str) -> int:
    if sys.stderr is not None:
        try:
            print(on_one_line(message), file=sys.stderr)
        except OSError:
            _discard(sys.stderr)
    return 2


def _discard(stream: TextIO) -> None:
    """Sends what a stream still holds nowhere, so that Python does not complain of it as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
