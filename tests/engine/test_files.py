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
        (errno.EACCES, "Permission denied; name a folder that can be written"),
    ],
)
def test_the_remedy_is_that_of_the_reason(code, remedy, tmp_path):
    def fail(path):
        raise OSError(code, "never mind")

    with pytest.raises(GigamorphError, match=remedy):
        write_atomically(tmp_path / "a.txt", fail, "text")
    assert not list(tmp_path.iterdir())
