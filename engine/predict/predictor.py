"""One image through the network: its result, and its heat map."""

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
from ..images.derived import header_of
from ..images.pixels import as_stored
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
"""Of the parts. Keys are of image and model; log-odds are those of the network, before any calibration; header_patient
and header_exam stand for the patient and the study that a DICOM header names, laterality and view are its own; row is
what the network gave, where it combines views by that; odd is a warning about the grey values."""
OpenImages = Callable[[Sequence[Record]], Images]
"""Records -> their images."""


@dataclass(frozen=True)
class Classifier:
    """A network of whole images, ready to predict.

    Attributes:
        net: pixel source -> (1, classes).
        classes: names of the outputs.
        open_images: of records.
        trained_on: how many images the training had; their table tells which split an image was in.
    """

    net: Accelerated
    classes: list[str]
    open_images: OpenImages
    trained_on: int = 0


class Opener(Protocol):
    """Opens the network in the process that computes; to be pickled where there are several."""

    def __call__(self, *, device: str) -> Classifier: ...


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each image; goes to the processes that compute.

    Attributes:
        model: SHA-256 of the checkpoint.
        out: folder of the run.
        secret: by which patients of DICOM headers are renamed; None names them.
    """

    model: str
    out: Path
    heatmaps: bool = False
    calibration: Calibration | None = None
    secret: bytes | None = None


def open_one(classifier: Classifier, record: Record, work: Work) -> dict[str, Any]:
    """The item of a record, which keeps what the table says of it."""
    return {**classifier.open_images([record])[0], "record": work.row.record}


class Predicting:
    """The unit (`job.Unit`) that predicts."""

    def __init__(self, classifier: Classifier, wanted: Wanted) -> None:
        classifier.net.eval()
        self.net, self._classifier, self._wanted = classifier.net, classifier, wanted

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        return open_one(self._classifier, record, work)

    def __call__(self, opened: Opened) -> dict[str, Any]:
        return predict_image(self._classifier, self._wanted, opened)


def start_predicting(opener: Opener, wanted: Wanted, *, device: str) -> Predicting:
    """As `job.Start`."""
    return Predicting(opener(device=device), wanted)


def predict_image(classifier: Classifier, wanted: Wanted, opened: Opened) -> dict[str, Any]:
    """The result of an image, a row of `RESULTS`; its heat map is drawn.

    Raises:
        DataError: if the image cannot be read. BudgetError: if no tile of it fits. Both name it.
    """
    item, work = opened.item, opened.work
    assert item is not None
    net, source = classifier.net, item["image"]
    with naming(work.row.name):
        if wanted.heatmaps:
            explained, logits, which = explain_class(net, source, positive_class(classifier.classes, outputs_of(net)))
        else:
            with torch.no_grad():
                explained, logits, which = None, net(source)[0], 0
    check_numbers(logits, work.row.name)
    outputs = outputs_of(net)
    found = prediction(item, logits, outputs)
    record, header = work.row.record, header_of(source)
    result = {
        "key": work.key,
        "model": wanted.model,
        "image_path": work.row.name,
        "patient_id": record.patient_id,
        **headed(source, wanted.secret),
        "exam_id": record.exam_id or "",
        "header_exam": renamed(header.study_uid, wanted.secret) if getattr(header, "study_uid", None) else None,
        "split": found.split,
        "label": found.label,
        "log_odds": list(found.log_odds),
        "exclusive": found.exclusive,
        "row": logits.tolist() if outputs is not None and outputs.views is not None else None,
        "pixels": source.shape[-2] * source.shape[-1],
        "heatmap": None,
        "odd": opened.odd or None,
    }
    if explained is not None:
        log_odds = found.log_odds[which]
        if wanted.calibration is not None:
            log_odds = wanted.calibration.both(found.log_odds)[which]
            explained = replace(explained, values=explained.values * wanted.calibration.slope, log_odds=log_odds)
        name = overlay_name(work.name, as_stored(source).shape)
        text = caption(classifier.classes[which], log_odds, found.numbers)
        write_overlay(explained, wanted.out / "heatmaps" / name, stored=True, caption=text)
        result["heatmap"] = work.name
    return result


@contextlib.contextmanager
def naming(image: str) -> Iterator[None]:
    """That nothing of an image fits is an error that names it: the larger images of a set may not fit.

    Where nothing of any image would, all of them are not tried.
    """
    try:
        yield
    except NoRoomError as error:
        raise GigamorphError(str(error)) from error
    except BudgetError as error:
        raise BudgetError(f"{image}: {error}") from error
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise BudgetError(
            f"{image}: the device ran out of memory ({str(error).splitlines()[0]}); give a --memory-budget"
        ) from error


def check_numbers(logits: torch.Tensor, image: str) -> None:
    """Of an image whose pixels are NaN, or that overflows, nothing is known; it must not spoil the tables.

    Raises:
        DataError: that names it.
    """
    if not logits.isfinite().all():
        raise DataError(
            f"{image}: the network gives no number ({', '.join(map(str, logits.tolist()))}); look at its pixels: "
            "gigamorph data preview"
        )


def headed(source: Any, secret: bytes | None) -> dict[str, str | None]:
    """What the header of an image says, whatever a table does: the table of a resumed run may say something else.

    Returns:
        Columns of `RESULTS`: header_patient (a header without a patient has its study in the place), laterality, view.
    """
    header = header_of(source)
    patient = getattr(header, "patient_id", None) or getattr(header, "study_uid", None)
    return {
        "header_patient": renamed(patient, secret) if patient else None,
        "laterality": getattr(header, "laterality", None) or "",
        "view": getattr(header, "view", None) or "",
    }


def renamed(patient: str, secret: bytes | None) -> str:
    """What stands for a patient in the parts of a run: the same for the same patient, and no way back."""
    return patient if secret is None else hmac.digest(secret, patient.encode(), "sha256").hex()[:24]
