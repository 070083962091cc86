"""benchmarks/compile_rows.py: rows of kernels are kept, and taken again unless code or Triton have changed."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def compile_rows(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import compile_rows

    return compile_rows


def test_rows_are_kept_until_code_changes(compile_rows, tmp_path, monkeypatch):
    path = tmp_path / "made" / "rows.jsonl"
    row = compile_rows.Row("conv2d_forward", 90, "conv", registers=168, faults=("3 spills",))
    kept = compile_rows.RowFile(path)
    kept.add(90, {"a", "b"}, [row])
    with path.open("a") as file:
        file.write('\n{"code": "cut o')
    kept.add(80, {"a"}, [])

    again = compile_rows.RowFile(path)
    assert again.rows == {90: [row], 80: []} and again.keys == {90: {"a", "b"}, 80: {"a"}}
    monkeypatch.setattr(compile_rows, "_code", lambda: "other")
    assert compile_rows.RowFile(path).keys == {}


def test_nothing_compiled_is_a_failure(compile_rows):
    assert compile_rows.summary([], 1.0).startswith("FAIL: 0 kernels")


def test_the_worst_of_each_kernel_is_told(compile_rows):
    rows = [
        compile_rows.Row("a", 90, "conv", shared=64, registers=90, blocks=3, matrix="wgmma", loads=6),
        compile_rows.Row("b", 90, "conv", shared=1024, registers=70, blocks=2, faults=("3 spills",)),
        compile_rows.Row("c", 80, "conv", shared=32, registers=60, blocks=4, matrix="mma"),
        compile_rows.Row("d", 90, "", faults=("CompilationError: none",)),
    ]
    cells = zip(*(list(column.cells) for column in compile_rows.by_kernel(rows).columns), strict=True)
    assert list(cells) == [
        ("80", "conv", "1", "32", "60", "4", "mma", "0", "0"),
        ("90", "conv", "2", "1,024", "90", "2", "wgmma", "1", "1"),
    ]
