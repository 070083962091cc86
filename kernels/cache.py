"""The cache folder for measurements and built libraries, and checks that only this account can write to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The folder `gigamorph` in `GIGAMORPH_CACHE`, `XDG_CACHE_HOME` or ~/.cache.

    Raises:
        OSError: if this account has no home folder and GIGAMORPH_CACHE is not set.
    """
    base = os.environ.get("GIGAMORPH_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError("this account has no home folder for a cache; set GIGAMORPH_CACHE to a folder") from error
    return Path(base) / "gigamorph"


def make_private(folder: Path) -> None:
    """Make a folder of the cache that only this account can write to.

    Raises:
        OSError: if it cannot be made.
    """
    for one in (*reversed(folder.parents), folder):
        one.mkdir(mode=0o700, exist_ok=True)


def is_private(path: Path) -> bool:
    """Whether only this account and root can have written a file, by owner and mode of the file and its folders.

    Libraries and measurements are read from private files only, because other accounts may write to a shared cache.
    """
    if not hasattr(os, "getuid"):
        return True
    path = Path(os.path.abspath(path))
    ends = (path, path.resolve())  # the owner of a folder on either path can set links
    return all(_is_ours(one.lstat()) for end in ends for one in (end, *end.parents))


def _is_ours(found: os.stat_result) -> bool:
    if found.st_uid not in (os.getuid(), 0):
        return False
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        return True  # in a sticky folder nobody can rename another account's files
    return not found.st_mode & stat.S_IWOTH and (not found.st_mode & stat.S_IWGRP or _is_own_group(found.st_gid))


def _is_own_group(number: int) -> bool:
    """Whether this account is the only member of a group, as in the per-account groups of many systems."""
    import grp
    import pwd

    try:
        group, own = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return number == own.pw_gid and group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}
