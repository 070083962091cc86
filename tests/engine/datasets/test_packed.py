"""Tables of a few bytes that unpack to gigabytes: one line that names the file, in bounded memory."""

from __future__ import annotations

import gzip
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packed_tables
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forked

from gigamorph.engine.datasets.tables.cells import read_rows, stream_rows
from gigamorph.engine.errors import DataError

MIB = 2**20


def _packed(path: Path, row: bytes) -> None:
    """200 MiB of such rows; a MiB is compressed once, and its block repeated."""
    head, rows, packer = b"image_path\n", row * (MIB // len(row)), zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    begin, block = (packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in (head, rows))
    crc = zlib.crc32(head)
    for _ in range(200):
        crc = zlib.crc32(rows, crc)
    end = packer.flush() + struct.pack("<II", crc, len(head) + 200 * len(rows))
    path.write_bytes(b"\x1f\x8b\x08" + bytes(6) + b"\xff" + begin + 200 * block + end)


def _repeated(path: Path, text: str, rows: int) -> None:
    column = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [text])
    pq.write_table(pa.table({"image_path": column}), path, compression="zstd")


def _nested(path: Path) -> None:
    column = pa.ListArray.from_arrays([0, 30_000_000], np.zeros(30_000_000, np.int8))
    pq.write_table(pa.table({"image_path": ["a.png"], "odd": column}), path, compression="zstd")


_KINDS = "http://schemas.openxmlformats.org"
_MAIN = f'xmlns="{_KINDS}/spreadsheetml/2006/main"'
_RELATIONS = f"{_KINDS}/officeDocument/2006/relationships"


def _excel(path: Path, last: str) -> None:
    """A sheet of two rows of one cell, the second at ``last``."""
    book, sheet = ("xl/workbook.xml", "officeDocument"), ("s.xml", "worksheet")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, (target, kind) in (("_rels/.rels", book), ("xl/_rels/workbook.xml.rels", sheet)):
            own = f'<Relationship Id="r" Type="{_RELATIONS}/{kind}" Target="{target}"/>'
            file.writestr(name, f'<Relationships xmlns="{_KINDS}/package/2006/relationships">{own}</Relationships>')
        sheets = '<sheets><sheet name="S" sheetId="1" r:id="r"/></sheets>'
        file.writestr("xl/workbook.xml", f'<workbook {_MAIN} xmlns:r="{_RELATIONS}">{sheets}</workbook>')
        cell = '<row><c r="{}" t="inlineStr"><is><t>{}</t></is></c></row>'
        rows = cell.format("A1", "image_path") + cell.format(last, "a.png")
        file.writestr("xl/s.xml", f"<worksheet {_MAIN}><sheetData>{rows}</sheetData></worksheet>")


BOMBS: dict[str, Callable[[Path], None]] = {
    "line.csv.gz": lambda path: _packed(path, b"a"),
    "rows.csv.gz": lambda path: _packed(path, b"a" * 4090 + b".png\n"),
    "texts.parquet": lambda path: _repeated(path, "a" * MIB, 4096),
    "rows.parquet": lambda path: _repeated(path, "a.png", 10_000_000),
    "list.parquet": _nested,
    "sparse.xlsx": lambda path: _excel(path, "XFD1048576"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_gigabytes_is_refused(name: str, tmp_path: Path) -> None:
    BOMBS[name](path := tmp_path / name)
    process = Forked(packed_tables.read, str(path))
    assert process.wait() == 0, process.error
    first, second, grown = process.output.splitlines()
    assert first.startswith(f"{path}: ") and second.startswith(f"{path}: ") and int(grown) < 512 * 1024


def test_packed_tables_are_read(tmp_path: Path) -> None:
    _excel(tmp_path / "a.xlsx", "A2")
    _repeated(tmp_path / "a.parquet", "a.png", 1)
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(b"image_path\na.png\n")
    for name in ("a.xlsx", "a.parquet", "a.csv.gz"):
        assert read_rows(tmp_path / name).rows == [{"image_path": "a.png"}]
    assert [row for _, row in stream_rows(tmp_path / "a.csv.gz")[1]] == [{"image_path": "a.png"}]
    (tmp_path / "cut.csv.gz").write_bytes((tmp_path / "a.csv.gz").read_bytes()[:-4])
    for read in (read_rows, lambda path: list(stream_rows(path)[1])):
        with pytest.raises(DataError, match=r"cut\.csv\.gz: cannot be read"):
            read(tmp_path / "cut.csv.gz")
