"""One image through the network: its result, and its heat map."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from ..accelerate import Accelerated
from ..errors import BudgetError
from ..evaluate.recalibration import Calibration
from ..images.pixels import as_stored
from ..models.outputs import outputs_of
from ..train.classify import prediction
from ..train.explanation import caption, explain_class
from ..train.heatmap import overlay_name, write_overlay
from .ahead import Open, Opened

RESULTS = pa.schema(
    [
        ("key", pa.string()),
        ("model", pa.string()),
        ("image_path", pa.string()),
        ("patient_id", pa.string()),
        ("header_patient", pa.string()),
        ("exam_id", pa.string()),
        ("laterality", pa.string()),
        ("view", pa.string()),
        ("split", pa.string()),
        ("label", pa.int64()),
        ("log_odds", pa.list_(pa.float64())),
        ("exclusive", pa.bool_()),
        ("pixels", pa.int64()),
        ("heatmap", pa.string()),
    ]
)
"""Of the parts. Keys are of image and model; log-odds are those of the network, before any calibration; header_patient
stands for a patient whom only a DICOM header names."""
FAILURES = pa.schema([(name, pa.string()) for name in ("key", "model", "image_path", "reason")])


@dataclass(frozen=True)
class Classifier:
    """A network of whole images, ready to predict.

    Attributes:
        net: pixel source -> (1, classes).
        classes: names of the outputs.
        open_images: records -> their images.
        trained_on: how many images the training had; their table tells which split an image was in.
    """

    net: Accelerated
    classes: list[str]
    open_images: Open
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


def predict_image(classifier: Classifier, wanted: Wanted, opened: Opened) -> dict[str, Any]:
    """The result of an image, a row of `RESULTS`; its heat map is drawn.

    Raises:
        DataError: if the image cannot be read. BudgetError: if no tile of it fits. Both name it.
    """
    item, work = opened.item, opened.work
    assert item is not None
    net, source = classifier.net, item["image"]
    try:
        if wanted.heatmaps:
            explained, logits, which = explain_class(net, source)
        else:
            with torch.no_grad():
                explained, logits, which = None, net(source)[0], 0
    except BudgetError as error:  # the larger images of a set may not fit
        raise BudgetError(f"{work.row.name}: {error}") from error
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise BudgetError(
            f"{work.row.name}: the device ran out of memory ({str(error).splitlines()[0]}); give a --memory-budget"
        ) from error
    found = prediction(item, logits, outputs_of(net))
    record = work.row.record
    result = {
        "key": work.key,
        "model": wanted.model,
        "image_path": work.row.name,
        "patient_id": record.patient_id,
        "header_patient": None,
        "exam_id": found.exam,
        "laterality": found.laterality,
        "view": found.view,
        "split": found.split,
        "label": found.label,
        "log_odds": list(found.log_odds),
        "exclusive": found.exclusive,
        "pixels": source.shape[-2] * source.shape[-1],
        "heatmap": None,
    }
    if found.patient != record.patient_id:
        result["header_patient"] = renamed(found.patient, wanted.secret)
    if explained is not None:
        log_odds = found.log_odds[which]
        if wanted.calibration is not None:
            z = wanted.calibration(found.log_odds[1])
            log_odds = (-z, z)[which]
            explained = replace(explained, values=explained.values * wanted.calibration.slope, log_odds=z)
        name = overlay_name(work.heatmap, as_stored(source).shape)
        text = caption(classifier.classes[which], log_odds, found.numbers)
        write_overlay(explained, wanted.out / "heatmaps" / name, stored=True, caption=text)
        result["heatmap"] = work.heatmap
    return result


def renamed(patient: str, secret: bytes | None) -> str:
    """What stands for a patient in the parts of a run: the same for the same patient, and no way back."""
    return patient if secret is None else hmac.digest(secret, patient.encode(), "sha256").hex()[:24]
