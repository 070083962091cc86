"""Files that cannot be written: the reason, and what to do about that reason."""

import errno
import os
from types import SimpleNamespace

import pytest

from gigamorph import GigamorphError
from gigamorph.engine.files import require_writable, write_atomically


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EROFS, "Read-only file system; name a folder that can be written"),
        (errno.EFBIG, "File too large; raise the limit on the size of a file"),
        (errno.EACCES, "Permission denied; name a folder that can be written"),
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
    with pytest.raises(GigamorphError, match="Read-only file system; name a folder that can be written"):
        require_writable(tmp_path / "a.txt")


def test_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (require_writable, lambda path: write_atomically(path, lambda temporary: None)):
        with pytest.raises(GigamorphError, match="is a device or a pipe, in whose place the file would be put; name a"):
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
