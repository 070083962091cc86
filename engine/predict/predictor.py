"""Predicts a single image: its result, and its heat map."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from ..accelerate import Accelerated
from ..datasets.tables import Record
from ..errors import BudgetError, DataError, GigamorphError, NoRoomError
from ..evaluate.recalibration import Calibration
from ..images.pixels import PixelSource, as_stored, header_of
from ..models.outputs import outputs_of
from ..train.classify import prediction
from ..train.data import Images
from ..train.explanation import caption, explain_class, positive_class
from ..train.heatmap import overlay_name, write_overlay
from .decoders import Opened
from .job import texts
from .rows import Work

RESULTS = pa.schema(
    [
        *texts("key", "model", "image_path", "patient_id", "header_patient", "exam_id", "header_exam", "laterality"),
        *texts("view", "split"),
        ("label", pa.int64()),
        ("log_odds", pa.list_(pa.float64())),
        ("exclusive", pa.bool_()),
        ("row", pa.list_(pa.float64())),
        ("pixels", pa.int64()),
        *texts("heatmap", "odd"),
    ]
)
"""Schema of the parts. Keys identify image and model. Log-odds are those of the network, before calibration.
header_patient and header_exam are (pseudonyms of) patient and study in the DICOM header, laterality and view are those
of the header. row is the network's output, if views are combined from outputs. odd is a warning about grey values."""
OpenImages = Callable[[Sequence[Record]], Images]
"""Opens the images of records."""


@dataclass(frozen=True)
class Classifier:
    """A network of whole images, ready to predict.

    Attributes:
        net: pixel source -> (1, classes).
        classes: names of the outputs.
        open_images: opens the images of records.
        trained_on: number of images in the training.
    """

    net: Accelerated
    classes: list[str]
    open_images: OpenImages
    trained_on: int = 0


class Opener(Protocol):
    """Opens the network in the computing process; must be picklable if there are several."""

    def __call__(self, *, device: str) -> Classifier: ...


@dataclass(frozen=True)
class Wanted:
    """The requested outputs per image; sent to the computing processes.

    Attributes:
        model: SHA-256 of the checkpoint.
        out: folder of the run.
        heatmaps: whether to draw heat maps.
        calibration: of two classes, for heat maps.
        secret: key that pseudonymizes patients of DICOM headers; None keeps their names.
    """

    model: str
    out: Path
    heatmaps: bool = False
    calibration: Calibration | None = None
    secret: bytes | None = None


class NetworkUnit:
    """Base class of the units (`job.Unit`) of an opened network, which has `net` and `open_images`."""

    def __init__(self, network: Any, wanted: Wanted) -> None:
        network.net.eval()
        self.net, self._network, self._wanted = network.net, network, wanted

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        """The item of a record, with the record of the table."""
        return {**self._network.open_images([record])[0], "record": work.row.record}

    def _columns(self, source: PixelSource, work: Work) -> dict[str, Any]:
        """The columns that the results of all jobs have."""
        return {
            "key": work.key,
            "model": self._wanted.model,
            "image_path": work.row.name,
            "pixels": source.shape[-2] * source.shape[-1],
            **header_columns(source, self._wanted.secret),
        }


class PredictionUnit(NetworkUnit):
    """The unit of prediction."""

    def __call__(self, opened: Opened) -> dict[str, Any]:
        """The result of an image, a row of `RESULTS`; writes its heat map if requested.

        Raises:
            DataError: naming the image, if it cannot be read.
            BudgetError: naming the image, if none of its tiles fits.
        """
        item, work, classes, wanted = opened.item, opened.work, self._network.classes, self._wanted
        assert item is not None
        net, source = self.net, item["image"]
        with naming(work.row.name):
            if wanted.heatmaps:
                explained, logits, which = explain_class(net, source, positive_class(classes, outputs_of(net)))
            else:
                with torch.no_grad():
                    explained, logits, which = None, net(source)[0], 0
        check_numbers(logits, work.row.name)
        outputs = outputs_of(net)
        found = prediction(item, logits, outputs)
        record, header = work.row.record, header_of(source)
        result = {
            **self._columns(source, work),
            "patient_id": record.patient_id,
            "exam_id": record.exam_id or "",
            "header_exam": pseudonym(header.study_uid, wanted.secret) if getattr(header, "study_uid", None) else None,
            "split": found.split,
            "label": found.label,
            "log_odds": list(found.log_odds),
            "exclusive": found.exclusive,
            "row": logits.tolist() if outputs is not None and outputs.views is not None else None,
            "heatmap": None,
            "odd": opened.odd or None,
        }
        if explained is not None:
            log_odds = found.log_odds[which]
            if wanted.calibration is not None:
                log_odds = wanted.calibration.both(found.log_odds)[which]
                explained = replace(explained, values=explained.values * wanted.calibration.slope, log_odds=log_odds)
            name = overlay_name(work.name, as_stored(source).shape)
            text = caption(classes[which], log_odds, found.numbers)
            write_overlay(explained, wanted.out / "heatmaps" / name, stored=True, caption=text)
            result["heatmap"] = work.name
        return result


@contextlib.contextmanager
def naming(image: str) -> Iterator[None]:
    """Context whose budget errors name the image, because only the larger images of a set may not fit.

    If no image can fit, a `GigamorphError` ends the run instead.
    """
    try:
        yield
    except NoRoomError as error:
        raise GigamorphError(str(error)) from error
    except BudgetError as error:
        raise BudgetError(f"{image}: {error}", error.needed_bytes) from error
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise BudgetError(
            f"{image}: the device ran out of memory ({str(error).splitlines()[0]}); give a --memory-budget"
        ) from error


def check_numbers(logits: torch.Tensor, image: str) -> None:
    """Refuse non-finite outputs, caused by NaN pixels or overflow, so that they do not enter the tables.

    Raises:
        DataError: naming the image.
    """
    if not logits.isfinite().all():
        raise DataError(
            f"{image}: the network's output is not finite ({', '.join(map(str, logits.tolist()))}); inspect its pixels "
            "with gigamorph data preview"
        )


def header_columns(source: Any, secret: bytes | None) -> dict[str, str | None]:
    """The values of an image's header, independent of the table, which may change before a run is resumed.

    Returns:
        Columns of `RESULTS`: header_patient (or the study if the header has no patient), laterality, view.
    """
    header = header_of(source)
    patient = getattr(header, "patient_id", None) or getattr(header, "study_uid", None)
    return {
        "header_patient": pseudonym(patient, secret) if patient else None,
        "laterality": getattr(header, "laterality", None) or "",
        "view": getattr(header, "view", None) or "",
    }


def pseudonym(patient: str, secret: bytes | None) -> str:
    """The pseudonym of a patient in the parts of a run: a keyed hash, or the name without a secret."""
    return patient if secret is None else hmac.digest(secret, patient.encode(), "sha256").hex()[:24]
