"""The folder of what was measured and built for this machine, and who can have written a file in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """`GIGAMORPH_CACHE`, `XDG_CACHE_HOME` or ~/.cache, and in it a folder of ours.

    Raises:
        OSError: this account has no home; set GIGAMORPH_CACHE.
    """
    base = os.environ.get("GIGAMORPH_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError("this account has no home for a cache; set GIGAMORPH_CACHE to a folder") from error
    return Path(base) / "gigamorph"


def make_private(folder: Path) -> None:
    """Make a folder of the cache that only this account can write to.

    Raises:
        OSError: it cannot be made.
    """
    for one in (*reversed(folder.parents), folder):
        one.mkdir(mode=0o700, exist_ok=True)


def is_private(path: Path) -> bool:
    """Whether nobody but this account and root can have written a file, by owner and mode of it and of its folders.

    What is executed or believed is read from private files only: others may write into a cache that accounts share.
    """
    if not hasattr(os, "getuid"):
        return True
    path = Path(os.path.abspath(path))
    ends = (path, path.resolve())  # links can be set by whoever owns a folder on either way
    return all(_is_ours(one.lstat()) for end in ends for one in (end, *end.parents))


def _is_ours(found: os.stat_result) -> bool:
    if found.st_uid not in (os.getuid(), 0):
        return False
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        return True  # in a sticky folder nobody can rename what is another's
    return not found.st_mode & stat.S_IWOTH and (not found.st_mode & stat.S_IWGRP or _is_own_group(found.st_gid))


def _is_own_group(number: int) -> bool:
    """Whether a group is this account's alone, as many systems make one for each account."""
    import grp
    import pwd

    try:
        group, own = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return number == own.pw_gid and group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}
