"""Work that ends in its midst."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gigamorph.engine.train.task import Task


@contextlib.contextmanager
def killed_at(kind: type[Task], nth: int | Callable[[Any], int]) -> Iterator[None]:
    """What runs inside must end where a task of this kind is asked for its loss for the nth time (of a task)."""
    loss, calls = kind.loss, []

    def killed(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == (nth if isinstance(nth, int) else nth(self)):
            raise RuntimeError("killed")
        return loss(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(kind, "loss", killed)
        yield


def command_killed_in_save(words: list[str], nth: int) -> None:
    """`gigamorph WORDS`, which the system kills in the midst of the nth file that torch.save writes."""
    from gigamorph.cli.main import main

    save, calls = torch.save, []

    def half(content: object, file: Any, *args: Any, **options: Any) -> None:
        calls.append(content)
        if len(calls) == nth:
            file.write(b"PK")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file, *args, **options)

    torch.save = half
    main(words)


def killed_in_write(path: str, folder: str) -> None:
    """What the system kills while it writes a file and a folder that are whole or absent."""
    from gigamorph.engine.files import temporary_name, write_atomically

    temporary_name(Path(folder)).mkdir()

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    write_atomically(path, half)
