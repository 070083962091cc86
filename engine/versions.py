"""Versions of gigamorph and of the packages that a result depends on."""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

# From the top-level package, which is imported first. The metadata of an installed package may describe other code than
# a checkout on Python's path, or may not exist.
OWN: str = sys.modules[__name__.partition(".")[0]].__version__


class Tested(NamedTuple):
    """Releases of a package that gigamorph is tested with."""

    oldest: str
    newest: str
    """The newest release with which the quick and the core tests of `tests/releases.py` pass."""


TESTED = {"torch": Tested("2.11", "2.15"), "triton": Tested("3.6", "3.9")}


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed packages among those named; for gigamorph, the version of the running code."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = OWN if name == "gigamorph" else version(name)
    return found


def versions_of_results() -> dict[str, str]:
    """Versions of Python and of the packages that the result of a run depends on."""
    packages = ("gigamorph", "torch", "lightning", "numpy", "pydicom", "timm", "triton", "scikit-learn")
    return {"python": platform.python_version(), **versions(*packages)}


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, such as (2, 15, 0) for "2.15.0+cu130"."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def newer(installed: Mapping[str, str]) -> dict[str, Tested]:
    """Those of `TESTED` of which a newer release is installed than the newest tested one."""
    releases = {name: release(installed.get(name, ""))[:2] for name in TESTED}
    return {name: tested for name, tested in TESTED.items() if releases[name] > release(tested.newest)}


@functools.cache
def warn_of_newer() -> None:
    """Log a warning, once in a process, if a package is newer than the tested releases."""
    installed = versions(*TESTED)
    for name, tested in newer(installed).items():
        logging.getLogger("gigamorph").warning(
            "%s %s is newer than %s, the newest with which gigamorph is tested; compare results with: gigamorph doctor",
            name,
            installed[name],
            tested.newest,
        )
