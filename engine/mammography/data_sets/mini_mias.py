"""mini-MIAS: 322 digitised films of 1024 x 1024 pixels; Info.txt with a centre and radius per abnormality."""

from __future__ import annotations

import re

from ...datasets.tables.schema import Box, Finding, Record
from ...errors import DataError
from .files import DataSet, Files, unlabelled_record

_SIDE = 1024
_LINE = re.compile(r"(mdb(\d{3}))[a-z]*\s+([FGD])\s+(CALC|CIRC|SPIC|MISC|ARCH|ASYM|NORM)(?:\s+([BM]))?(.*)")
_KINDS = {
    "CALC": "calcification",
    "CIRC": "circumscribed mass",
    "SPIC": "spiculated mass",
    "MISC": "other mass",
    "ARCH": "architectural distortion",
    "ASYM": "asymmetry",
}
_PLACE = re.compile(r"\s+(\d{1,9})\s+(\d{1,9})(?:\s+(\d{1,9}))?\s*")


def read(files: Files) -> list[Record]:
    """One record per film; the films of a patient have consecutive numbers, and the left one is odd.

    The README of mini-MIAS says that even numbers are left. This reader follows the names of the films in the original
    MIAS, which state the side (mdb001lm, mdb002rl); whether films were mirrored later is unknown.
    """
    path = files.table("Info.txt")
    if path is None:
        raise DataError(f"{files.path}: contains no Info.txt; pass the folder of the data set")
    films: dict[str, list[re.Match[str]]] = {}
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), 1):
        match = _LINE.fullmatch(line.strip())
        if match:
            films.setdefault(match[1], []).append(match)
        elif line.startswith("mdb"):
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} must be REFNUM BG CLASS SEVERITY X Y RADIUS; correct it"
            )
    if not films:
        raise DataError(f"{path}: lists no films; pass the Info.txt of mini-MIAS")
    return [_record(files, name, lines) for name, lines in films.items()]


def _record(files: Files, name: str, lines: list[re.Match[str]]) -> Record:
    number = int(lines[0][2])
    findings = [_finding(line) for line in lines if line[4] != "NORM"]
    return unlabelled_record(
        path=files.expect(f"{name}.pgm"),
        patient_id=f"mias{(number + 1) // 2:03d}",
        laterality="L" if number % 2 else "R",
        view="MLO",
        exam_id=f"mias{(number + 1) // 2:03d}",
        labels={"malignant": float(any(line[5] == "M" for line in lines)), "abnormal": float(bool(findings))},
        findings=tuple(findings),
        # Fatty, fatty-glandular or dense: not the BI-RADS scale.
        extra={"tissue": lines[0][3]},
    )


def _finding(line: re.Match[str]) -> Finding:
    place = _PLACE.match(line[6] or "")
    box: Box | None = None
    if place:
        # y counts from the bottom of the film.
        x, y, radius = int(place[1]), _SIDE - 1 - int(place[2]), int(place[3] or 0)
        box = (max(y - radius, 0), min(y + radius + 1, _SIDE), max(x - radius, 0), min(x + radius + 1, _SIDE))
        box = box if box[0] < box[1] and box[2] < box[3] else None
    return Finding(kind=_KINDS[line[4]], box=box, pathology={"M": "malignant", "B": "benign"}.get(line[5] or "", ""))


DATA_SET = DataSet(
    name="mini-mias",
    title="mini-MIAS",
    tables=("Info.txt",),
    rules={
        "malignant": "1 if an abnormality of the film is malignant (M), 0 if all are benign or it is normal",
        "abnormal": "1 if the film has an abnormality, 0 if it is normal",
    },
    split="none",
    read=read,
)
