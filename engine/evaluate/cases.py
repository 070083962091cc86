"""The evaluated rows: images, or breasts or exams that are formed of them, with truth and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..datasets.unknown_views import unplaced
from ..errors import DataError
from . import odds
from .checks import Array, NotANumber

Kind = Literal["binary", "classes", "labels", "numbers"]
Level = Literal["image", "breast", "exam"]
LEVELS = {
    "image": "each image by itself",
    "breast": "mean probability of a breast's views; its label is the highest of theirs",
    "exam": "highest of the exam's breasts (each the mean of its views), and the highest label",
}


@dataclass(frozen=True)
class Cases:
    """Rows with truth and scores.

    Attributes:
        outputs: names of the outputs: the positive class of two, or all classes, labels or numbers.
        truth: (rows, outputs) 1, 0, or NaN where unknown; for "classes" one is 1; for "numbers" the true numbers.
        scores: (rows, outputs), larger for 1: log-odds if `probable`, else any numbers, of which only ranks count.
        names: of the rows.
        patients, exams, sides: of the rows; "" where unknown.
        kind: "binary"; "classes" (a row has exactly one); "labels" (a row may have any); "numbers".
        level: what a row is.
        probable: whether scores are log-odds.
        columns: other values of each row, for subgroups.
        ordered: whether "classes" are ordered, like grades.
    """

    outputs: tuple[str, ...]
    truth: Array
    scores: Array
    names: tuple[str, ...]
    patients: tuple[str, ...]
    exams: tuple[str, ...]
    sides: tuple[str, ...]
    kind: Kind = "binary"
    level: Level = "image"
    probable: bool = True
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ordered: bool = True

    def __post_init__(self) -> None:
        for name in ("truth", "scores"):
            shape = getattr(self, name).shape
            if shape != (len(self.names), len(self.outputs)):
                raise DataError(
                    f"{name} of shape {shape} do not fit {len(self.names)} rows of {len(self.outputs)} outputs"
                )
        for name in ("patients", "exams", "sides", *self.columns):
            values = self.columns[name] if name in self.columns else getattr(self, name)
            if len(values) != len(self.names):
                raise DataError(f"{name}: {len(values)} values do not fit {len(self.names)} rows")
        fits = np.isfinite(self.truth) if self.kind == "numbers" else (self.truth == 0) | (self.truth == 1)
        wrong = np.flatnonzero(~(fits | np.isnan(self.truth)).all(1))
        if len(wrong):
            wanted = "a finite number" if self.kind == "numbers" else "1, 0"
            raise DataError(f"{self.names[wrong[0]]}: its truth must be {wanted}, or NaN if unknown")
        # The log-odds of probabilities 0 and 1 are infinite.
        fine = ~np.isnan(self.scores) if self.probable else np.isfinite(self.scores)
        bad = np.flatnonzero(~fine.all(1))
        if len(bad):
            raise NotANumber(f"{self.names[bad[0]]}: its score is not a number; predict it again, or omit it")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def clusters(self) -> tuple[str, ...]:
        """The patient of each row; rows without a patient form their own clusters."""
        return tuple(f"patient {p}" if p else f"row {name}" for p, name in zip(self.patients, self.names, strict=True))

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each row, -1 where unknown; for "binary" 0 or 1. Not for "labels"."""
        known = ~np.isnan(self.truth).any(1)
        found = self.truth[:, 0] if self.kind == "binary" else self.truth.argmax(1)
        return np.where(known, np.where(known, found, 0), -1).astype(np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each row; of two, 1 from probability 0.5. Not for "labels"."""
        return np.asarray(self.scores[:, 0] >= 0 if self.kind == "binary" else self.scores.argmax(1), np.int64)

    def where(self, rows: ArrayLike) -> Cases:
        """The rows that indices or a mask select."""
        which = np.asarray(rows)
        chosen = np.arange(len(self))[which] if which.size else np.arange(0)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[i] for i in chosen)

        return replace(
            self,
            truth=self.truth[chosen],
            scores=self.scores[chosen],
            **{name: pick(getattr(self, name)) for name in ("names", "patients", "exams", "sides")},
            columns={name: pick(values) for name, values in self.columns.items()},
        )

    def in_order(self, outputs: tuple[str, ...]) -> Cases:
        """The same with the outputs in another order."""
        columns = [self.outputs.index(name) for name in outputs]
        return replace(self, outputs=outputs, truth=self.truth[:, columns], scores=self.scores[:, columns])

    def labelled(self) -> Cases:
        """The rows of which some truth is known."""
        return self.where(~np.isnan(self.truth).all(1))

    def placed(self, level: Level) -> Cases:
        """Without the rows that are in no breast or exam, see `engine.datasets.unknown_views`."""
        missing: set[int] = set()
        if self.level != "exam" and level != "image":
            missing.update(unplaced(self.patients, self.exams))
        if self.level == "image" and level == "breast":
            missing.update(unplaced(self.patients, self.sides))
        return self.where([row not in missing for row in range(len(self))]) if missing else self

    def at(self, level: Level) -> Cases:
        """The breasts or exams of the images, by `LEVELS`; images without patient (for breasts, side) remain single."""
        if level == self.level:
            return self
        if self.level == "exam" or level == "image":
            raise DataError(f"rows are already {self.level}s; use the table of images")
        breasts = self if self.level == "breast" else self._breasts()
        if level == "breast":
            return breasts
        known = [bool(p) for p in breasts.patients]
        return breasts._grouped("exam", list(zip(breasts.patients, breasts.exams, strict=True)), known)

    def _breasts(self) -> Cases:
        sided = [bool(p and s) for p, s in zip(self.patients, self.sides, strict=True)]
        return self._grouped("breast", list(zip(self.patients, self.exams, self.sides, strict=True)), sided)

    def _grouped(self, level: Level, keys: list[tuple[str, ...]], known: list[bool]) -> Cases:
        """Rows grouped by key, in the order of each group's first row; rows with unknown key remain single."""
        numbers: dict[tuple[str, ...], int] = {}
        firsts: list[int] = []
        group = np.empty(len(self), np.int64)
        for row, (key, is_known) in enumerate(zip(keys, known, strict=True)):
            number = numbers.setdefault(key if is_known else (*key, "row", str(row)), len(firsts))
            if number == len(firsts):
                firsts.append(row)
            group[row] = number

        def joined(values: tuple[str, ...]) -> tuple[str, ...]:
            found = [values[i] for i in firsts]
            several: dict[int, set[str]] = {}
            for number, value in zip(group.tolist(), values, strict=True):
                if value != found[number]:
                    several.setdefault(number, {found[number]}).add(value)
            for number, of in several.items():
                found[number] = "+".join(sorted(of - {""}))
            return tuple(found)

        members = _Groups(group, len(firsts))
        return replace(
            self,
            level=level,
            truth=self._truth_of(members),
            scores=self._mean_of(members) if level == "breast" else self._highest_of(members),
            names=tuple("_".join(part for part in keys[i] if part) if known[i] else self.names[i] for i in firsts),
            patients=tuple(self.patients[i] for i in firsts),
            exams=tuple(self.exams[i] for i in firsts),
            sides=joined(self.sides),
            columns={name: joined(values) for name, values in self.columns.items()},
        )

    def _truth_of(self, members: _Groups) -> Array:
        if self.kind == "numbers":
            known = members.reduce(np.add, (~np.isnan(self.truth)).astype(np.float64))
            sums = members.reduce(np.add, np.nan_to_num(self.truth))
            return np.divide(sums, known, out=np.full_like(sums, np.nan), where=known > 0)
        if self.kind != "classes":
            return members.reduce(np.fmax, self.truth)  # NaN only if all are unknown
        labels = members.reduce(np.maximum, self.labels)
        return np.where((labels >= 0)[:, None], np.eye(len(self.outputs))[labels], np.nan)

    def _mean_of(self, members: _Groups) -> Array:
        if not self.probable:
            return members.reduce(np.add, self.scores) / members.sizes[:, None]
        return odds.means(self.scores[members.order], members.starts)

    def _highest_of(self, members: _Groups) -> Array:
        if self.kind == "numbers":
            return self._mean_of(members)
        if self.kind != "classes" or not self.probable:
            return members.reduce(np.maximum, self.scores)
        # All probabilities of one breast, so that they sum to 1: the breast with the highest expected class.
        expected = odds.probabilities(self.scores) @ np.arange(len(self.outputs))
        best = np.lexsort((*self.scores.T, -expected, members.group))  # independent of the order of rows
        return self.scores[best[members.starts]]


def counted_patients(patients: Sequence[str]) -> dict[str, int]:
    """The numbers of patients and of rows without a patient, each of which counts as a patient in intervals."""
    return {"patients": len(set(patients) - {""}), "rows_without_patient": patients.count("")}


class _Groups:
    """Rows sorted into non-empty groups."""

    def __init__(self, group: NDArray[np.int64], count: int) -> None:
        self.group, self.order = group, np.argsort(group, kind="stable")
        self.sizes = np.bincount(group, minlength=count)
        self.starts = np.append(0, np.cumsum(self.sizes)[:-1])[:count]

    def reduce(self, how: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Values (rows, ...) -> (groups, ...)."""
        return how.reduceat(values[self.order], self.starts, axis=0) if len(values) else values
