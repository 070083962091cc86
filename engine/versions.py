"""The versions of what a result depends on."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

# The door's, which is loaded before any room. What is installed may be other code than a checkout on Python's path, or
# nothing at all.
OWN: str = sys.modules[__name__.partition(".")[0]].__version__


class Tested(NamedTuple):
    """Releases of a package that gigamorph is tested with."""

    oldest: str
    newest: str
    """The last that all tests pass with."""
    in_parts: str
    """The last that parts of them pass with."""


TESTED = {"torch": Tested("2.11", "2.14", "2.15"), "triton": Tested("3.6", "3.8", "3.8")}


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed; of gigamorph that of the code which runs."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = OWN if name == "gigamorph" else version(name)
    return found


def versions_of_results() -> dict[str, str]:
    """Python's, and those of the packages that the result of a run depends on."""
    packages = ("gigamorph", "torch", "lightning", "numpy", "pydicom", "timm", "triton", "scikit-learn")
    return {"python": platform.python_version(), **versions(*packages)}
