"""Checks of a data set: unreadable files, duplicate images, wrong sides, leaks between splits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..images.header import DicomInfo, read_info
from ..images.levels import White, brighter_half, require_numbers
from ..images.open import open_pixels
from ..images.parallel import run_parallel
from ..images.pixels import ImageSource
from .dataset import ImageDataset, open_record, with_white
from .grey import label_by_kind_warning, odd_range, unlike_kinds
from .index import is_dicom
from .splits import leaks
from .tables.schema import Record

KINDS = {
    "unreadable": "cannot be opened or decoded",
    "blank": "all pixels are equal",
    "grey": "outside the scale from black to white: nearly black, or brighter than white",
    "mask": "a mask that is missing, unreadable, empty, or of another size than its image",
    "label": "no label, although other rows have one: train refuses such a table",
    "duplicate": "the same image or the same pixels twice, perhaps mirrored",
    "leak": "a patient or an image in two splits",
    "patient": "one patient under two names, which breaks splits by patient",
    "laterality": "table, header and pixels disagree on the side of the breast",
    "view": "table and header disagree on the view",
    "written": "file types that reveal the label or the source of an image",
    "frames": "several images in one file; a run reads the one that the column frame names",
    "flag": "not a standard view for presentation; for information, not an error",
}
_ROWS = 256
# Without PatientOrientation the usual side of a laterality needs at least _FEW images, of which the share _MOST agree.
_FEW, _MOST = 3, 0.8
# A PatientID of more than this many patients of the table is a placeholder of an anonymiser.
_PLACEHOLDER = 3


@dataclass(frozen=True)
class Problem:
    """One problem of one image."""

    path: Path
    kind: str
    """A key of `KINDS`."""
    message: str
    """The problem in words; names files and splits, never patients."""


@dataclass(frozen=True)
class _Facts:
    """The results of reading one image."""

    digest: bytes
    """Hash of shape and pixels; the same for an image and its mirror image."""
    blank: bool
    brighter: str | None
    """The brighter half of the stored image, "left" or "right"; None if unclear."""
    info: DicomInfo | None
    grey: str
    """The problem of the range of grey values; empty without one."""
    masks: tuple[str, ...]
    """The problems of the masks."""


def check_images(
    records: Sequence[Record],
    *,
    labels: Sequence[str] = (),
    white: White | None = None,
    workers: int | None = None,
    on_done: Callable[[], object] = lambda: None,
    on_stopped: Callable[[int], object] | None = None,
) -> list[Problem]:
    """Decode all images in parallel, compare them with each other and with the table, and return their problems.

    A damaged file does not stop the check. Memory: 32 bytes and a header per image.

    Args:
        records: the images; the problems have the same order.
        labels: the label of each image in addition to `Record.labels`; empty if it is unknown.
        white: the white level of images without one in the table, as in `open_pixels`.
        on_done: called after each image.
        on_stopped: called on Ctrl-C with the number of checked images, whose problems are returned. Without it, Ctrl-C
            raises `KeyboardInterrupt`.
    """
    facts: dict[int, _Facts | DataError] = {}
    try:
        for number, result in run_parallel(_inspect, with_white(records, white), workers=workers, chunk=4):
            facts[number] = result
            on_done()
    except KeyboardInterrupt:
        if on_stopped is None or not facts:
            raise
        on_stopped(len(facts))
    seen = sorted(facts)
    records, labels = [records[number] for number in seen], [labels[number] for number in seen] if labels else []
    pairs = [(record, facts[number]) for record, number in zip(records, seen, strict=True)]
    good = [(record, fact) for record, fact in pairs if isinstance(fact, _Facts)]
    problems = [
        Problem(record.path, "unreadable", _reason(fact, record.path))
        for record, fact in pairs
        if isinstance(fact, DataError)
    ]
    problems += [Problem(r.path, "blank", f"all {_size(f)}pixels are equal") for r, f in good if f.blank]
    problems += [Problem(r.path, "grey", f.grey) for r, f in good if f.grey and not f.blank]
    problems += [Problem(r.path, "mask", text) for r, f in good for text in f.masks]
    if any(labels):
        none = "has no label; fill it in, or remove the row"
        problems += [Problem(r.path, "label", none) for r, label in zip(records, labels, strict=True) if not label]
    problems += _duplicates(good, {id(r): label for r, label in zip(records, labels, strict=False)})
    problems += _leaks(records, good)
    problems += _disagreements(good)
    problems += [Problem(records[0].path, "written", text) for text in _labels_by_kind(records, labels)]
    if not any(problem.kind == "grey" for problem in problems):  # that problem also makes file types differ
        unlike = unlike_kinds(ImageDataset([r for r, f in good if not f.blank], channels=1, white=white))
        problems += [Problem(good[0][0].path, "written", text) for text in unlike]
    advice = "and all were checked; a run reads one: name it in the column frame, or write all for a volume"
    headers = [(record, fact.info) for record, fact in good if fact.info]
    problems += [
        Problem(r.path, "frames", f"has {info.frames} frames, {advice}") for r, info in headers if _are_frames(r, info)
    ]
    problems += [Problem(r.path, "flag", ", ".join(info.flags)) for r, info in headers if info.flags]
    order = {record.path: number for number, record in enumerate(records)}
    return sorted(problems, key=lambda problem: (order[problem.path], list(KINDS).index(problem.kind)))


def _are_frames(record: Record, info: DicomInfo) -> bool:
    """Whether a file has several images and the table does not choose one."""
    return record.frame is None and info.matrix is None and info.frames > 1


def _inspect(record: Record) -> _Facts:
    path, frame = record.path, record.frame
    info = read_info(path) if is_dicom(path) else None
    frames: Iterable[Any] = [frame]
    if info is not None and _are_frames(record, info):
        frames = range(info.frames)
    # Stored grey values, so that the result does not depend on a window.
    parts, source = [], None
    for number in frames:  # one source at a time, because a source stores its decoded frame
        source = open_record(replace(record, frame=number), volume=number == "all", voi="none", flip=False)
        parts.append(_read_through(source))
    assert source is not None
    digests, least, most, columns = zip(*parts, strict=True)
    digest = digests[0] if len(parts) == 1 else blake2b(b"".join(digests), digest_size=32).digest()
    blank = all(low == high for low, high in zip(least, most, strict=True))
    side, grey = brighter_half(np.sum(columns, 0)), odd_range(source, max(most))
    masks = (_mask_problem(finding.mask, source.shape) for finding in record.findings if finding.mask)
    return _Facts(digest, blank, side, info, grey, tuple(text for text in masks if text))


def _mask_problem(mask: Path, shape: tuple[int, ...]) -> str:
    """The problem of a mask of an image of this shape; empty without one."""
    try:
        source = open_pixels(mask, voi="none", flip=False)
        if source.shape[-2:] != shape[-2:]:
            return f"{mask} is {source.shape[-2]} x {source.shape[-1]}, but its image is {shape[-2]} x {shape[-1]}"
        _, _, most, _ = _read_through(source)
    except DataError as error:
        return f"{mask}: {_reason(error, mask)}"
    return f"{mask} is empty" if most <= 0 else ""


def _read_through(source: ImageSource) -> tuple[bytes, float, float, np.ndarray]:
    """Digest, smallest and largest grey value, and the mean grey value of each column."""
    *outer, height, width = source.shape
    seed = " ".join(map(str, source.shape)).encode()
    plain, mirrored = blake2b(seed, digest_size=32), blake2b(seed, digest_size=32)
    columns = np.zeros(width)
    least, most = np.inf, -np.inf
    for top in range(0, height, _ROWS):
        pixels = source.read(top, min(top + _ROWS, height), 0, width)
        require_numbers(pixels)
        strip = pixels.numpy()
        plain.update(np.ascontiguousarray(strip).data)
        mirrored.update(np.ascontiguousarray(strip[..., ::-1]).data)
        columns += strip.reshape(-1, width).sum(0, dtype=np.float64)
        least, most = min(least, float(strip.min())), max(most, float(strip.max()))
    return min(plain.digest(), mirrored.digest()), least, most, columns / (math.prod(outer) * height)


def _reason(error: DataError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def _size(fact: _Facts) -> str:
    return f"{fact.info.rows} x {fact.info.columns} " if fact.info else ""


def _duplicates(good: Sequence[tuple[Record, _Facts]], labels: Mapping[int, str]) -> Iterator[Problem]:
    groups: dict[bytes, list[tuple[Record, _Facts]]] = defaultdict(list)
    for record, fact in good:
        if not fact.blank:
            groups[fact.digest].append((record, fact))
    for group in groups.values():
        first, first_fact = group[0]
        for record, fact in group[1:]:
            text = f"has the pixels of {first.path}"
            if (record.path, record.frame) == (first.path, first.frame):
                text = "is in several rows of the table"
            if record.split != first.split:
                yield Problem(record.path, "leak", f"{text}, in splits {first.split} and {record.split}")
            elif _patient(record, fact) != _patient(first, first_fact):
                yield Problem(record.path, "duplicate", f"{text}, under another patient")
            else:
                other = labels.get(id(record)) != labels.get(id(first))
                yield Problem(record.path, "duplicate", f"{text}, with another label" if other else text)


def _patient(record: Record, fact: _Facts) -> str:
    """The patient in the table, or in the header if the table has none."""
    own = fact.info.patient_id if fact.info and not record.patient_known else None
    return own or record.patient_id


def _leaks(records: Sequence[Record], good: Sequence[tuple[Record, _Facts]]) -> Iterator[Problem]:
    of_patient: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_patient[record.patient_id].append(record)
    for patient, splits in leaks(records).items():
        for split in splits[1:]:
            path = next(record.path for record in of_patient[patient] if record.split == split)
            yield Problem(path, "leak", f"its patient is in {' and '.join(splits)}")
    yield from _patients_under_two_names(good)


def _patients_under_two_names(good: Sequence[tuple[Record, _Facts]]) -> Iterator[Problem]:
    """Images of one patient by their headers, and of two patients by the table."""
    of_header: dict[str, dict[str, Record]] = defaultdict(dict)
    for record, fact in good:
        # In a table without patients, each image is a patient.
        if fact.info and fact.info.patient_id and Path(record.patient_id).name != record.path.name:
            of_header[fact.info.patient_id].setdefault(record.patient_id, record)
    for names in of_header.values():
        first, *others = names.values()
        if len(names) > _PLACEHOLDER:
            continue
        for record in (one for one in others if one.path != first.path):
            text = f"has the PatientID of {first.path}, but another patient in the table"
            if record.split != first.split:
                text = f"{text}; they are in {first.split} and {record.split}"
            yield Problem(record.path, "leak" if record.split != first.split else "patient", text)


def _labels_by_kind(records: Sequence[Record], labels: Sequence[str]) -> list[str]:
    """Warnings about labels that the file type determines."""
    found = [label_by_kind_warning((r.path, label) for r, label in zip(records, labels, strict=False) if label)]
    for name in dict.fromkeys(name for record in records for name in record.labels):
        known = [(r.path, f"{r.labels[name]:g}") for r in records if name in r.labels]
        text = label_by_kind_warning(known) if {value for _, value in known} == {"0", "1"} else ""
        found.append(text and f"label_{name}: {text}")
    return list(filter(None, found))


def _disagreements(good: Sequence[tuple[Record, _Facts]]) -> Iterator[Problem]:
    usual = _usual_sides(good)
    for record, fact in good:
        info = fact.info
        side = record.laterality or (info.laterality if info else None)
        if info and record.laterality and info.laterality and record.laterality != info.laterality:
            text = f"is {record.laterality} in the table, {info.laterality} in the header"
            yield Problem(record.path, "laterality", text)
        if info and record.view and info.view and record.view != info.view:
            yield Problem(record.path, "view", f"is {record.view} in the table, {info.view} in the header")
        expected = _expected_side(fact) or usual.get(side or "")
        if expected and fact.brighter and fact.brighter != expected:
            why = "PatientOrientation puts" if _expected_side(fact) else f"other {side} images have"
            text = f"{why} the breast on the {expected}, the pixels on the {fact.brighter}: mirrored or mislabelled"
            yield Problem(record.path, "laterality", text)


def _expected_side(fact: _Facts) -> str | None:
    """The side of the chest wall, and of the breast, by PatientOrientation."""
    info = fact.info
    if info is None or not info.is_mammogram or info.orientation is None:
        return None
    return {"A": "left", "P": "right"}.get(info.orientation[0][:1])


def _usual_sides(good: Iterable[tuple[Record, _Facts]]) -> dict[str, str]:
    """The half with the breast for each laterality, by the majority of images without PatientOrientation."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for record, fact in good:
        side = record.laterality or (fact.info.laterality if fact.info else None)
        if side and fact.brighter and _expected_side(fact) is None:
            seen[side][fact.brighter] += 1
    usual = {}
    for side, counts in seen.items():
        half, count = counts.most_common(1)[0]
        if counts.total() >= _FEW and count >= _MOST * counts.total():
            usual[side] = half
    return usual
