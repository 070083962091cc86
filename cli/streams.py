"""The standard streams where they are closed, take nothing more, or lack letters: the work is done all the same."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# What a terminal obeys, but for colours and moves of the cursor: names of files could set its title or the clipboard.
_CONTROL = re.compile(r"(\x1b\[[0-?]*[ -/]*[@-~])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NAMES = ("stdin", "stdout", "stderr")


class Lost:
    """Outputs that take nothing more."""

    def __init__(self) -> None:
        self.errors: list[OSError] = []

    def exit_code(self) -> int:
        """0 if all was written; 1 if a reader has ended, as `| head` does, for which Python and click take it; else 2,
        with a line that says why."""
        if not self.errors:
            return 0
        if all(error.errno == errno.EPIPE for error in self.errors):
            return 1
        reason = next(error.strerror for error in self.errors if error.errno != errno.EPIPE)
        with contextlib.suppress(OSError):
            print(f"error: the output cannot be written: {reason}; send it elsewhere", file=sys.stderr, flush=True)
        return 2


class _Output(io.FileIO):
    """An output that goes nowhere from its first error on, for what is printed must not end what is computed."""

    def __init__(self, number: int, lost: Lost) -> None:
        super().__init__(number, "w", closefd=False)
        self._lost = lost

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            self._lost.errors.append(error)
            _to_nothing(self.fileno())
            return len(memoryview(data).cast("B"))


class _Text(io.TextIOWrapper):
    """Writes control characters as ``\\x1b``."""

    def write(self, text: str, /) -> int:
        super().write(_CONTROL.sub(lambda found: found[1] or f"\\x{ord(found[0]):02x}", text))
        return len(text)


@contextlib.contextmanager
def guarded() -> Iterator[Lost]:
    """Inside, no standard stream is closed, and none raises an error for what is written to it.

    A closed one is opened to nothing: the next file would get its number, and what libraries print would go into it.
    Letters that the encoding of an output lacks, as of file names, are written as ``\\xe9``.
    """
    lost, former = Lost(), {name: getattr(sys, name) for name in _NAMES}
    for number, (name, stream) in enumerate(former.items()):
        try:
            os.fstat(number)
        except OSError:
            _to_nothing(number)
        if stream is None:
            stream = os.fdopen(number, "w" if number else "r", closefd=False, encoding="utf-8")
            former[name] = stream
        setattr(sys, name, _guarded(stream, lost) if number else stream)
    try:
        yield lost
    finally:
        for name, stream in former.items():
            if name != "stdin":
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _guarded(stream: TextIO, lost: Lost) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        output = _Output(stream.fileno(), lost)
    except ValueError:  # not a file of the system
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return _Text(
        output if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(output),  # PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _to_nothing(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)
