"""Rows that last: every write may fail or be the last, and no row is lost, doubled or made up."""

import errno
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.predict import parts as module
from gigamorph.engine.predict.parts import Parts, read_parts, read_results

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.float64())])
CALLS = ("write", "fsync", "replace", "open", "ftruncate", "lseek")


def row(number):
    return {"key": str(number), "value": number / 7}


def kept(folder):
    return [one["key"] for rows in read_parts(folder) for one in rows]


def test_parts_and_journal_hold_the_rows_in_order(tmp_path):
    folder = tmp_path / "1-of-1"
    parts = Parts(folder, SCHEMA, rows=4)
    assert not folder.exists()  # made for the first row
    for number in range(10):
        parts.append(row(number))
        assert parts.sync() == 1
    assert sorted(path.name for path in folder.iterdir()) == ["00000001.parquet", "00000002.parquet", "_00000003.jsonl"]
    assert kept(tmp_path) == [str(n) for n in range(10)]
    assert len(pq.read_table(tmp_path)) == 8  # a data set at any moment
    parts.close()
    again = Parts(folder, SCHEMA, rows=4)
    again.append(row(10))
    again.sync()
    again.pack()
    found = pq.read_table(tmp_path).to_pylist()
    assert found == [row(n) for n in range(11)] and not list(folder.glob("_*"))


@pytest.mark.parametrize("tail", [b'{"key":"9","val', b"\0" * 40, b'{"key":"9"}'])
def test_a_line_that_was_cut_is_none(tmp_path, tail):
    parts = Parts(tmp_path / "1-of-1", SCHEMA)
    parts.append(row(1))
    parts.close()
    [journal] = (tmp_path / "1-of-1").glob("_*.jsonl")
    journal.write_bytes(journal.read_bytes() + tail)
    assert kept(tmp_path) == ["1"]
    again = Parts(tmp_path / "1-of-1", SCHEMA)
    again.append(row(2))
    again.close()
    assert kept(tmp_path) == ["1", "2"]


def test_a_kill_between_part_and_journal_doubles_nothing(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "1-of-1", SCHEMA, rows=2)
    with monkeypatch.context() as patched:
        patched.setattr(module.Path, "unlink", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "killed")))
        parts.append(row(1))
        parts.append(row(2))
        with pytest.raises(GigamorphError, match="1-of-1: cannot be written: Input/output error"):
            parts.sync()
    assert {path.suffix for path in (tmp_path / "1-of-1").iterdir()} == {".parquet", ".jsonl"}
    assert kept(tmp_path) == ["1", "2"]
    again = Parts(tmp_path / "1-of-1", SCHEMA, rows=2)
    again.append(row(3))
    again.close()
    assert kept(tmp_path) == ["1", "2", "3"]


class Killed(BaseException):
    """What a kill is in this process: nothing after it is done."""


@pytest.mark.parametrize("how", ["full", "killed", "cut"])
def test_whatever_write_is_the_last_one_no_row_is_lost_or_doubled(tmp_path, monkeypatch, how):
    """Fault after fault, one call of the system later each time, until a run gets through."""
    most = 7
    for fault in range(200):
        folder = tmp_path / str(fault)
        left, durable = [fault], []

        def failing(real, left=left, fault=fault, os_write=os.write):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] >= 0:
                    return real(*args, **kwargs)
                if how == "full":
                    left[0] = 1 << 30  # further writes go well, as after some space was freed
                    if real is os_write:
                        real(args[0], args[1][: len(args[1]) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if how == "cut" and real is os_write:
                    real(args[0], args[1][: random.Random(fault).randrange(len(args[1]))])
                raise Killed

            return call

        failed = False
        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, failing(getattr(os, name)))
            try:
                parts = Parts(folder / "1-of-1", SCHEMA, rows=3)
                for number in range(most):
                    parts.append(row(number))
                    parts.sync()
                    durable.append(str(number))
                parts.pack()
            except (GigamorphError, Killed) as error:
                failed = True
                assert how != "full" or "No space left on device" in str(error)
        found = kept(folder)
        assert found[: len(durable)] == durable and len(found) <= len(durable) + 1
        again = Parts(folder / "1-of-1", SCHEMA, rows=3)
        for number in range(most):
            if str(number) not in found:
                again.append(row(number))
        again.sync()
        again.pack()
        assert kept(folder) == [str(n) for n in range(most)]
        assert sorted(one["key"] for one in pq.read_table(folder).to_pylist()) == [str(n) for n in range(most)]
        if not failed:
            break
    assert not failed and fault > 20


def test_a_damaged_part_is_named(tmp_path):
    parts = Parts(tmp_path / "1-of-1", SCHEMA)
    parts.append(row(1))
    parts.sync()
    parts.pack()
    [part] = tmp_path.rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(GigamorphError, match=r"00000001\.parquet: cannot be read .*its images are predicted again"):
        kept(tmp_path)


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1e-300, -3.0000000000000004, 123456789.12345678]
    parts = Parts(tmp_path / "1-of-1", SCHEMA)
    for number, value in enumerate(values):
        parts.append({"key": str(number), "value": value})
    parts.sync()
    assert [one["value"] for rows in read_parts(tmp_path) for one in rows] == values
    parts.pack()
    assert pq.read_table(tmp_path)["value"].to_pylist() == values
    assert json.dumps(values[2]) == "-3.0000000000000004"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("column", ["name", "mask", "heatmap"])
@pytest.mark.parametrize("name", ["../a", "/tmp/a", "link/a"])
def test_names_of_files_that_lead_elsewhere_are_refused(name, column, packed, tmp_path):
    """What a run overwrites it removes, by the names in its parts."""
    parts = Parts(tmp_path / "1-of-1", pa.schema([("key", pa.string()), (column, pa.string())]))
    parts.append({"key": "1", column: "a..b"})
    parts.append({"key": "2", column: name})
    parts.sync()
    if packed:
        parts.pack()
    with pytest.raises(GigamorphError, match=rf"names the file '{name}' of another folder; name another --out"):
        list(read_results(tmp_path))


def test_files_of_other_names_beside_parts_are_left_alone(tmp_path):
    (tmp_path / "1-of-1").mkdir()
    for name in ("1x.parquet", "_1x.jsonl", f"{'9' * 200}.parquet"):
        (tmp_path / "1-of-1" / name).write_bytes(b"")
    parts = Parts(tmp_path / "1-of-1", SCHEMA)
    parts.append(row(0))
    parts.close()
    assert (tmp_path / "1-of-1" / "_00000001.jsonl").stat().st_size and (tmp_path / "1-of-1" / "_1x.jsonl").exists()
