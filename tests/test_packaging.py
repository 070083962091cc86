"""What is installed is what is here: an editable installation finds packages that a wheel would lack."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_named():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        "gigamorph." + ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("cli", "engine", "kernels")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert set(settings["packages"]) == here
