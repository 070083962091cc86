"""Files that cannot be written: the reason, and what to do about that reason."""

import errno

import pytest

from gigamorph import GigamorphError
from gigamorph.engine.files import write_atomically


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


def test_what_has_nothing_to_do_with_files_stays_what_it_is(tmp_path):
    def fail(path):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_atomically(tmp_path / "a.txt", fail, "text")
    assert not list(tmp_path.iterdir())
