"""What is scored: images, or the breasts or exams that they belong to, each with a truth and a score."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError
from . import odds

Array = NDArray[np.float64]
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
        outputs: names of what is scored: the positive class of two; each of several classes; each of several labels.
        truth: (rows, outputs) 1, 0, or NaN where it is not known. Of several classes one is 1.
        scores: (rows, outputs), larger for 1: log-odds where `probable`, else any numbers, which only rank.
        kind: "binary"; "classes", of which a row has one; "labels", any of which a row may have.
        names: of the rows. patients, exams, sides: "" where not known.
        columns: further values of each row, by which it can be put into subgroups.
    """

    outputs: tuple[str, ...]
    truth: Array
    scores: Array
    names: tuple[str, ...]
    patients: tuple[str, ...]
    exams: tuple[str, ...]
    sides: tuple[str, ...]
    kind: Literal["binary", "classes", "labels"] = "binary"
    level: Level = "image"
    probable: bool = True
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Of probabilities 0 and 1 the log-odds are infinite.
        fine = ~np.isnan(self.scores) if self.probable else np.isfinite(self.scores)
        bad = np.flatnonzero(~fine.all(1))
        if len(bad):
            raise DataError(f"{self.names[bad[0]]}: its score is not a number; predict it again, or leave it out")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def clusters(self) -> tuple[str, ...]:
        """The patient of each row; rows without one stand for themselves."""
        return tuple(f"patient {p}" if p else f"row {name}" for p, name in zip(self.patients, self.names, strict=True))

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each row, -1 where not known; for "binary" 0 or 1. Not for "labels"."""
        known = ~np.isnan(self.truth).any(1)
        found = self.truth[:, 0] if self.kind == "binary" else self.truth.argmax(1)
        return np.where(known, np.where(known, found, 0), -1).astype(np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each row; of two that from probability 0.5 on. Not for "labels"."""
        return np.asarray(self.scores[:, 0] >= 0 if self.kind == "binary" else self.scores.argmax(1), np.int64)

    def where(self, rows: ArrayLike) -> Cases:
        """Some of the rows, by their numbers or a mask."""
        which = np.asarray(rows)
        chosen = np.arange(len(self))[which] if which.size else np.arange(0)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[i] for i in chosen)

        return replace(
            self,
            truth=self.truth[chosen],
            scores=self.scores[chosen],
            names=pick(self.names),
            patients=pick(self.patients),
            exams=pick(self.exams),
            sides=pick(self.sides),
            columns={name: pick(values) for name, values in self.columns.items()},
        )

    def labelled(self) -> Cases:
        """The rows of which some truth is known."""
        return self.where(~np.isnan(self.truth).all(1))

    def at(self, level: Level) -> Cases:
        """The images' breasts or exams, by `LEVELS`; images without patient (or, for breasts, side) stay single."""
        if level == self.level:
            return self
        if self.level != "image":
            raise DataError(f"rows are {self.level}s already; give those of images")
        sided = [bool(p and s) for p, s in zip(self.patients, self.sides, strict=True)]
        breasts = self._grouped("breast", list(zip(self.patients, self.exams, self.sides, strict=True)), sided)
        if level == "breast":
            return breasts
        known = [bool(p) for p in breasts.patients]
        return breasts._grouped("exam", list(zip(breasts.patients, breasts.exams, strict=True)), known)

    def _grouped(self, level: Level, keys: list[tuple[str, ...]], known: list[bool]) -> Cases:
        """Rows of one key together, in the order of their first; those of unknown key single."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, (key, is_known) in enumerate(zip(keys, known, strict=True)):
            groups.setdefault(key if is_known else (*key, "row", str(row)), []).append(row)
        members = [np.array(rows) for rows in groups.values()]
        combine = self._mean if level == "breast" else self._highest

        def joined(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple("+".join(sorted({values[i] for i in rows if values[i]})) for rows in members)

        names = []
        for rows in members:
            first = rows[0]
            parts = [part for part in keys[first] if part]
            names.append("_".join(dict.fromkeys(parts)) if known[first] else self.names[first])
        firsts = [rows[0] for rows in members]
        return replace(
            self,
            level=level,
            truth=np.array([self._truth(rows) for rows in members]).reshape(-1, len(self.outputs)),
            scores=np.array([combine(rows) for rows in members]).reshape(-1, len(self.outputs)),
            names=tuple(names),
            patients=tuple(self.patients[i] for i in firsts),
            exams=tuple(self.exams[i] for i in firsts),
            sides=joined(self.sides),
            columns={name: joined(values) for name, values in self.columns.items()},
        )

    def _truth(self, rows: NDArray[np.int64]) -> Array:
        if self.kind != "classes":
            return np.fmax.reduce(self.truth[rows])  # NaN only where none is known
        label = self.labels[rows].max()
        return np.eye(len(self.outputs))[label] if label >= 0 else np.full(len(self.outputs), np.nan)

    def _mean(self, rows: NDArray[np.int64]) -> Array:
        return odds.mean(self.scores[rows]) if self.probable else self.scores[rows].mean(0)

    def _highest(self, rows: NDArray[np.int64]) -> Array:
        if self.kind != "classes" or not self.probable:
            return self.scores[rows].max(0)
        # One breast's probabilities as a whole, so that they still add up to 1: that of the highest expected class.
        expected = odds.probabilities(self.scores[rows]) @ np.arange(len(self.outputs))
        return self.scores[rows[int(expected.argmax())]]
