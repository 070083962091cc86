"""Files that cannot be written: the reason, and what to do about that reason."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Forked
from killed import command_killed_in_save, killed_in_write

from gigamorph import GigamorphError
from gigamorph.engine import files
from gigamorph.engine.files import require_writable, temporary_name, write_atomically
from gigamorph.engine.mammography.phantom import write_phantoms


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EROFS, "Read-only file system; choose a writable folder"),
        (errno.EFBIG, "File too large; raise the limit on the size of a file"),
        (errno.EACCES, "Permission denied; choose a writable folder"),
    ],
)
def test_the_remedy_is_that_of_the_reason(code, remedy, tmp_path):
    def fail(path):
        raise OSError(code, "never mind")

    with pytest.raises(GigamorphError, match=remedy):
        write_atomically(tmp_path / "a.txt", fail, "text")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_read_only_is_told_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(GigamorphError, match="Read-only file system; choose a writable folder"):
        require_writable(tmp_path / "a.txt")


def test_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (require_writable, lambda path: write_atomically(path, lambda temporary: None)):
        with pytest.raises(GigamorphError, match="is a device or a pipe, which the file would replace; choose a file"):
            write(pipe)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    with pytest.raises(GigamorphError, match="is a device"):
        require_writable("/dev/stdout")


def test_what_has_nothing_to_do_with_files_stays_what_it_is(tmp_path):
    def fail(path):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_atomically(tmp_path / "a.txt", fail, "text")
    assert not list(tmp_path.iterdir())


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_killed_process_left_is_removed_with_the_next_file(tmp_path, monkeypatch):
    process = Forked(killed_in_write, str(tmp_path / "best.ckpt"), str(tmp_path / "net"))
    assert process.wait() == -signal.SIGKILL
    left = hidden(tmp_path)
    assert len(left) == 2 and all(f"-{process.pid}-" in name for name in left)
    (tmp_path / ".best.ckpt.of-somebody.ckpt").touch()
    monkeypatch.setattr(files, "_seen", set())  # as in a process that begins
    write_atomically(tmp_path / "other.txt", lambda path: path.write_text("whole"))
    assert hidden(tmp_path) == [".best.ckpt.of-somebody.ckpt"] and (tmp_path / "other.txt").read_text() == "whole"


def test_what_a_process_is_writing_is_not_removed(tmp_path, monkeypatch):
    """One of this machine while it is alive; of another machine, where that is not known, while the file changes."""
    code = (
        "import sys, pathlib\n"
        "from gigamorph.engine.files import temporary_name\n"
        f"temporary_name(pathlib.Path({str(tmp_path / 'a.tiff')!r})).touch()\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        own = temporary_name(tmp_path / "b.tiff")
        own.touch()
        away = tmp_path / f".c.tiff.{'0' * 8}-1-{'0' * 9}.part.tiff"
        away.touch()
        monkeypatch.setattr(files, "_seen", set())
        write_atomically(tmp_path / "d.txt", Path.touch)
        assert len(hidden(tmp_path)) == 3
        process.communicate()
    former = tmp_path / own.name.replace(files._START, "0" * 8)  # of a process that had the number of this one
    former.touch()
    os.utime(away, (0, 0))
    monkeypatch.setattr(files, "_seen", set())
    write_atomically(tmp_path / "d.txt", Path.touch)
    assert hidden(tmp_path) == [own.name]


@pytest.mark.parametrize("nth", [1, 2])  # best.ckpt, last.ckpt
def test_a_training_that_is_killed_while_it_writes_a_checkpoint_goes_on(nth, tmp_path):
    table, out = write_phantoms(tmp_path, patients=6, height=128, width=96, seed=1), tmp_path / "run"
    words = ["train", table, "--model", "lesionnet", "--epochs", "1", "--accumulate", "4", "--out", out, "--resume"]
    command = [str(word) for word in words]
    assert Forked(command_killed_in_save, command, nth).wait() == -signal.SIGKILL
    assert len(hidden(out)) == 1
    process = Forked(command_killed_in_save, command, 100)
    assert process.wait() == 0, process.error
    assert not hidden(out) and (out / "best.ckpt").exists() and (out / "last.ckpt").exists()
