"""What docs say of where things are is true: the picture of the packages is the tree, each file named is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_is_the_tree() -> None:
    page = (ROOT / "docs/architecture.md").read_text().split("    engine/\n")[1].split("    kernels/")[0]
    drawn = set(re.findall(r"^ {6}(\w+(?:/|\.py))", page, re.MULTILINE))
    found = {path.name + "/" * path.is_dir() for path in (ROOT / "engine").iterdir()} - {"__init__.py", "__pycache__/"}
    assert drawn == found


def test_each_file_of_the_table_is_there() -> None:
    """Names without a folder lie beside the one named before them."""
    missing: list[str] = []
    for row in re.findall(r"^\| .* \| (.*`.*) \|$", (ROOT / "docs/where.md").read_text(), re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([^`]+(?:\.py|\.cpp|\.toml|/))`", row):
            named = name.replace("NAME", "cae")
            places = [place / named for place in (ROOT, folder, folder.parent)]
            found = next((place for place in places if place.exists()), None)
            if found is None:
                missing.append(name)
            else:
                folder = found if found.is_dir() else found.parent
    assert not missing
