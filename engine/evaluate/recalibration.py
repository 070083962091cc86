"""A calibration that was measured, kept in ``calibration.json``, so that it can be applied to further predictions.

Of two classes: log-odds z become a + b z, with Cox's intercept a and slope b of the validation images (Platt,
1999), and an image is called where z reaches the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_atomically
from ..parsing import parse_json
from .cases import Cases
from .class_names import positive_number

_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What predictions of a network become.

    Attributes:
        output: name of the positive class.
        threshold: log-odds before the calibration, from which on an image is called.
        images: how many it was measured on, of which split of a training.
        sha256: of the checkpoint that predicted them.
        flips: mirror images over which it averaged.
        number: which of the checkpoint's two classes the positive one is; not stored.
    """

    output: str
    slope: float
    intercept: float
    threshold: float
    images: int
    split: str | None
    sha256: str
    flips: tuple[str, ...] = ()
    number: int = field(default=1, repr=False)

    def __call__(self, log_odds: float) -> float:
        """Calibrated log-odds of the positive class."""
        return self.intercept + self.slope * log_odds

    def both(self, log_odds: Sequence[float]) -> tuple[float, float]:
        """Calibrated log-odds of the two classes of the checkpoint."""
        z = self(log_odds[self.number])
        return (z, -z) if self.number == 0 else (-z, z)

    def calls(self, log_odds: Sequence[float]) -> bool:
        """Whether calibrated log-odds of the two classes reach the threshold."""
        return log_odds[self.number] >= self(self.threshold)


def write_calibration(
    out: str | Path, images: Cases, found: Mapping[str, Any], sha256: str, flips: Sequence[str] = ()
) -> Path:
    """Write the calibration that is fitted on validation samples into a folder.

    There is one of log-odds of two classes that rank better than chance and do not part the classes. The threshold is
    theirs at the middle of the specificities that were evaluated.

    Args:
        images: what the network takes as one sample: images, or exams of several views; of split val alone.
        found: of `evaluate`, of these or other samples.
        sha256, flips: of the checkpoint, and over which mirror images it averaged.

    Raises:
        DataError: there is none; why.
    """
    from .calibration import slope_and_intercept  # whose libraries those who only apply one do without
    from .measures import threshold_at

    known = images.labelled()
    if images.kind != "binary" or not images.probable:
        raise DataError("it is of log-odds of two classes")
    splits = set(images.columns.get("split", ())) - {"val"}
    if splits:
        raise DataError(f"it is fitted on rows of split val alone, not of {' and '.join(sorted(splits)) or 'none'}")
    [name] = images.outputs
    points = (
        found["levels"].get(images.level, {}).get("outputs", {}).get(name, {}).get("sensitivity_at_specificity", [])
    )
    limit = threshold_at(images, 0, points[len(points) // 2]["at"]) if points else None
    threshold = (limit or {}).get("log_odds")
    if threshold is None:
        raise DataError(f"no threshold was measured of the {images.level}s")
    fitted = slope_and_intercept(known.truth[:, 0], known.scores[:, 0])
    if fitted is None:
        raise DataError("the log-odds part the two classes, to which no slope can be fitted; more images may")
    if fitted[0] <= 0:
        raise DataError(f"the log-odds rank worse than chance (slope {fitted[0]:.3g})")
    split = "val" if "split" in images.columns else found.get("split")
    one = Calibration(name, *fitted, float(threshold), len(known), split, sha256, tuple(flips))
    path = Path(out) / _FILE
    stored = {name: value for name, value in asdict(one).items() if name != "number"}
    write_atomically(path, lambda p: p.write_text(json.dumps(stored, indent=1) + "\n"), "calibration")
    return path


def read_calibration(path: str | Path, classes: list[str], sha256: str, flips: Sequence[str] = ()) -> Calibration:
    """The calibration in a file, for a checkpoint and its classes.

    Raises:
        DataError: if it cannot be read, or belongs to another checkpoint, the other class or other mirror images.
    """
    try:
        stored = parse_json(Path(path).read_text())
        found = Calibration(**{**stored, "flips": tuple(stored.get("flips", ()))})
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is no {_FILE} of gigamorph eval") from error
    if found.sha256 != sha256 or len(classes) != 2 or found.output not in classes:
        raise DataError(f"{path}: was measured on predictions of another checkpoint; evaluate those of this one")
    number = positive_number(classes)
    if found.output != classes[number]:
        told = f"{path}: is of the class {found.output}; the positive one of this checkpoint is {classes[number]}"
        raise DataError(f"{told}; evaluate without --score")
    if found.flips != tuple(flips):
        how = " and ".join(f"--flip {name}" for name in found.flips) or "no --flip"
        raise DataError(f"{path}: was measured on predictions with {how}; predict as they were, or evaluate others")
    return replace(found, number=number)
