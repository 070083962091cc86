"""Guards for standard streams that are closed, cannot be written or cannot encode text: the work continues."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# Control characters except colours and cursor moves: file names could set the terminal's title or the clipboard.
_CONTROL = re.compile(r"(\x1b\[[0-?]*[ -/]*[@-~])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NAMES = ("stdin", "stdout", "stderr")


class LostOutputs:
    """Errors of output streams that can no longer be written."""

    def __init__(self) -> None:
        self.errors: list[OSError] = []

    def exit_code(self) -> int:
        """Return 0 if everything was written, 1 if a reader ended (as `| head` does; like Python and click), else 2 and
        print the reason."""
        if not self.errors:
            return 0
        if all(error.errno == errno.EPIPE for error in self.errors):
            return 1
        reason = next(error.strerror for error in self.errors if error.errno != errno.EPIPE)
        with contextlib.suppress(OSError):
            print(f"error: cannot write the output: {reason}; redirect it elsewhere", file=sys.stderr, flush=True)
        return 2


class _Output(io.FileIO):
    """An output that is discarded after its first error, so that printing cannot stop a computation."""

    def __init__(self, number: int, lost: LostOutputs) -> None:
        super().__init__(number, "w", closefd=False)
        self._lost = lost

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            self._lost.errors.append(error)
            _open_null(self.fileno())
            return len(memoryview(data).cast("B"))


class _Text(io.TextIOWrapper):
    """A text stream that escapes control characters, as in ``\\x1b``."""

    def write(self, text: str, /) -> int:
        super().write(_CONTROL.sub(lambda found: found[1] or f"\\x{ord(found[0]):02x}", text))
        return len(text)


@contextlib.contextmanager
def guarded() -> Iterator[LostOutputs]:
    """Inside the context, every standard stream is open, and writing to one raises no error.

    A closed stream is opened to the null device: otherwise the next file would get its number and the output of
    libraries. Characters that an encoding lacks, such as those of file names, are written as ``\\xe9``.
    """
    lost, former = LostOutputs(), {name: getattr(sys, name) for name in _NAMES}
    for number, (name, stream) in enumerate(former.items()):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
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


def _guarded(stream: TextIO, lost: LostOutputs) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        output = _Output(stream.fileno(), lost)
    except ValueError:  # not an operating-system file
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


def _open_null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)
