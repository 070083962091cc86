"""The list of slow tests names tests that exist: a renamed test would be quick by mistake."""

from __future__ import annotations

import ast
from pathlib import Path

from slow import read

ROOT = Path(__file__).parents[1]


def test_the_slow_tests_exist() -> None:
    missing: list[str] = []
    for name, functions in read().items():
        nodes = ast.walk(ast.parse((ROOT / name).read_text()))
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        missing += (f"{name}: {one}" for one in functions - defined)
    assert not missing, "rename or remove them in tests/slow.txt"
