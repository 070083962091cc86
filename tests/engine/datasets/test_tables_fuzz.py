"""Tables that were damaged on their way: a `DataError` that names a file, or records; never another error."""

import random
import re
import shutil
from pathlib import Path

import pytest
from fuzz import DEPTH
from lookalikes import WRITERS

from gigamorph.engine.datasets.tables import Record, read_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.mammography.data_sets import DATA_SETS, read_data_set


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One of the accidents that happen to files."""
    data = bytearray(content)
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind == 1:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:  # digits become others, words become empty
        return bytes(byte if not chr(byte).isdigit() or rng.random() < 0.7 else rng.choice(b"019-.x") for byte in data)
    lines = content.splitlines(keepends=True)
    if kind == 3:
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 4:  # a column is lost, in some rows or in all
        column = rng.randrange(12)
        cut = [b",".join(cell for n, cell in enumerate(line.split(b",")) if n != column) for line in lines]
        return b"".join(c if rng.random() < 0.9 else line for c, line in zip(cut, lines, strict=True))
    if kind == 5:  # a number that Python cannot make, or that is not finite
        numbers = [match.span() for match in re.finditer(rb"\d+(\.\d+)?", content)] or [(0, 0)]
        first, last = rng.choice(numbers)
        return content[:first] + rng.choice([b"9" * 5000, b"9" * 25, b"1e999", b"inf", b"nan"]) + content[last:]
    return content.replace(rng.choice([b",", b";", b'"', b"\n", b" "]), rng.choice([b"", b",", b"\x00", b"\xff"]))


@pytest.mark.parametrize("name", list(DATA_SETS))
def test_damaged_tables_of_public_data_sets(tmp_path: Path, name: str) -> None:
    if name in ("cmmd", "cdd-cesm"):
        pytest.importorskip("python_calamine")
    WRITERS[name](tmp_path / "good")
    endings = {".csv", ".txt", ".xlsx", ".xml", ".pkl"}
    tables = sorted(path for path in (tmp_path / "good").rglob("*") if path.suffix in endings)
    assert tables
    rng = random.Random(name)
    refused = 0
    for number in range(25 * DEPTH):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = rng.choice(tables)
        target = tmp_path / "bad" / path.relative_to(tmp_path / "good")
        target.write_bytes(damaged(target.read_bytes(), rng))
        try:
            for record in read_data_set(name, tmp_path / "bad", check_files=False).records:
                check(record)
        except DataError as error:
            refused += 1
            assert str(tmp_path) in str(error), f"case {number}: {error}"
            assert "\n" not in str(error)
        shutil.rmtree(tmp_path / "bad")
    assert refused > 3 * DEPTH


def test_damaged_tables_of_ones_own(tmp_path: Path) -> None:
    header = "image_path,label,patient_id,split,laterality,view,findings,label_x\n"
    finding = '"[{""kind"": ""mass"", ""box"": [1, 5, 2, 9], ""outline"": [[1, 2], [3, 4], [5, 6]]}]"'
    good = (header + "".join(f"{n}.png,{n % 2},P{n},train,L,CC,{finding},0.5\n" for n in range(4))).encode()
    rng = random.Random(1)
    refused = 0
    for number in range(200 * DEPTH):
        (tmp_path / "t.csv").write_bytes(damaged(good, rng))
        try:
            for record in read_table(tmp_path / "t.csv", check_files=False).records:
                check(record)
        except DataError as error:
            refused += 1
            assert str(tmp_path) in str(error), f"case {number}: {error}"
    assert 50 * DEPTH < refused < 200 * DEPTH


def check(record: Record) -> None:
    """What others rely on."""
    assert record.laterality in (None, "L", "R")
    assert record.split in (None, "train", "val", "test")
    assert isinstance(record.patient_id, str) and record.patient_id
    for finding in record.findings:
        if finding.box:
            top, bottom, left, right = finding.box
            assert 0 <= top < bottom and 0 <= left < right
