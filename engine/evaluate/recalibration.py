"""A calibration in ``calibration.json``, which can be applied to other predictions of two classes.

Log-odds z become a + b z, with Cox's intercept a and slope b of the validation images (Platt, 1999), and an image is
called positive if z is at least the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_json
from ..parsing import parse_json
from .cases import Cases
from .class_names import positive_number

_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """The calibration of a network's predictions.

    Attributes:
        output: name of the positive class.
        slope, intercept: of the log-odds.
        threshold: log-odds before calibration from which an image is called positive.
        images: number of images that it was measured on.
        split: their split of a training.
        sha256: of the checkpoint.
        flips: mirror images over which the checkpoint averaged.
        number: index of the positive class in the checkpoint; not stored.
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
    """Fit a calibration on validation samples, and write it into a folder.

    It requires log-odds of two classes that rank better than chance and do not separate the classes. The threshold is
    that of the samples at the middle one of the evaluated specificities.

    Args:
        out: the folder.
        images: samples of the network (images, or exams with several views), only of split val.
        found: result of `evaluate`, for these or other samples.
        sha256: of the checkpoint.
        flips: mirror images over which the checkpoint averaged.

    Raises:
        DataError: with the reason if there is no calibration.
    """
    from .calibration import slope_and_intercept  # its libraries are not needed to apply a calibration
    from .measures import threshold_at

    known = images.labelled()
    if images.kind != "binary" or not images.probable:
        raise DataError("it needs log-odds of two classes")
    splits = set(images.columns.get("split", ())) - {"val"}
    if splits:
        raise DataError(f"it needs rows of split val only, not of {' and '.join(sorted(splits)) or 'none'}")
    [name] = images.outputs
    points = (
        found["levels"].get(images.level, {}).get("outputs", {}).get(name, {}).get("sensitivity_at_specificity", [])
    )
    limit = threshold_at(images, 0, points[len(points) // 2]["at"]) if points else None
    threshold = (limit or {}).get("log_odds")
    if threshold is None:
        raise DataError(f"no threshold was measured for the {images.level}s")
    fitted = slope_and_intercept(known.truth[:, 0], known.scores[:, 0])
    if fitted is None:
        raise DataError("the log-odds separate the two classes, so no slope can be fitted; use more images")
    if fitted[0] <= 0:
        raise DataError(f"the log-odds rank worse than chance (slope {fitted[0]:.3g})")
    split = "val" if "split" in images.columns else found.get("split")
    one = Calibration(name, *fitted, float(threshold), len(known), split, sha256, tuple(flips))
    path = Path(out) / _FILE
    stored = {name: value for name, value in asdict(one).items() if name != "number"}
    write_json(path, stored, "calibration")
    return path


def read_calibration(path: str | Path, classes: list[str], sha256: str, flips: Sequence[str] = ()) -> Calibration:
    """The calibration in a file, for a checkpoint and its classes.

    Args:
        path: of the file.
        classes: of the checkpoint.
        sha256: of the checkpoint.
        flips: mirror images over which the checkpoint averages.

    Raises:
        DataError: if it cannot be read, or belongs to another checkpoint, the other class or other mirror images.
    """
    try:
        stored = parse_json(Path(path).read_text())
        found = Calibration(**{**stored, "flips": tuple(stored.get("flips", ()))})
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is not a {_FILE} of gigamorph eval") from error
    if found.sha256 != sha256 or len(classes) != 2 or found.output not in classes:
        raise DataError(f"{path}: was measured on another checkpoint; evaluate predictions of this one")
    number = positive_number(classes)
    if found.output != classes[number]:
        text = f"{path}: is for class {found.output}; the positive class of this checkpoint is {classes[number]}"
        raise DataError(f"{text}; evaluate without --score")
    if found.flips != tuple(flips):
        how = " and ".join(f"--flip {name}" for name in found.flips) or "no --flip"
        raise DataError(f"{path}: was measured with {how}; predict with the same flips, or evaluate again")
    return replace(found, number=number)
