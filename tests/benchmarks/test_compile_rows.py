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


@pytest.fixture
def sources(compile_rows, monkeypatch):
    """Kernels' code by name, in place of the package's own."""
    found = {"conv": "1", "pool": "1", "": "1"}
    monkeypatch.setattr(compile_rows, "_sources", lambda: found)
    return found


def test_rows_are_kept_until_their_kernels_code_changes(compile_rows, tmp_path, sources):
    path = tmp_path / "made" / "rows.jsonl"
    conv = compile_rows.CompiledKernel("conv2d_forward", 90, "conv", registers=168, faults=("3 spills",))
    pool = compile_rows.CompiledKernel("max_pool", 80, "pool")
    kept = compile_rows.RowFile(path)
    kept.add(90, {"a", "b"}, [conv])
    with path.open("a") as file:
        file.write('\n{"code": "cut o')
    kept.add(80, {"a"}, [pool])

    again = compile_rows.RowFile(path)
    assert again.rows(90) == [conv] and again.rows(80) == [pool]
    assert again.keys(90) == {"a", "b"} and again.keys(80) == {"a"}
    sources["conv"] = "2"
    changed = compile_rows.RowFile(path)
    assert not changed.keys(90) and changed.rows(80) == [pool]


def test_what_no_step_launches_any_more_is_left_out(compile_rows, tmp_path, sources):
    path = tmp_path / "rows.jsonl"
    rows = [compile_rows.CompiledKernel(case, 90, "conv") for case in "abc"]
    file = compile_rows.RowFile(path)
    file.add(90, {"a", "b"}, rows[:1])
    file.add(90, {"c"}, rows[1:2])
    file.add(80, {"a"}, rows[2:])
    file.leave_out(90, {"a", "c"})
    for left in file, compile_rows.RowFile(path):
        assert left.rows(90) == rows[1:2] and left.rows(80) == rows[2:]


def test_nothing_compiled_is_a_failure(compile_rows):
    assert compile_rows.summary([], 1.0).startswith("FAIL: 0 kernels")


def test_the_worst_of_each_kernel_is_told(compile_rows):
    rows = [
        compile_rows.CompiledKernel("a", 90, "conv", shared=64, registers=90, blocks=3, matrix="wgmma", loads=6),
        compile_rows.CompiledKernel("b", 90, "conv", shared=1024, registers=70, blocks=2, faults=("3 spills",)),
        compile_rows.CompiledKernel("c", 80, "conv", shared=32, registers=60, blocks=4, matrix="mma"),
        compile_rows.CompiledKernel("d", 90, "", faults=("CompilationError: none",)),
    ]
    cells = zip(*(list(column.cells) for column in compile_rows.by_kernel(rows).columns), strict=True)
    assert list(cells) == [
        ("80", "conv", "1", "32", "60", "4", "mma", "0", "0"),
        ("90", "conv", "2", "1,024", "90", "2", "wgmma", "1", "1"),
    ]
