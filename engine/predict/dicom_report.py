"""Predictions for the images of a study as a DICOM structured report (TID 1500), by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from ..errors import DataError
from ..images.dicom_results import MAKER, highdicom_errors, own_code, source_header
from ..images.dicomweb import is_dicomweb, parse_location
from ..images.header import read_info
from ..versions import OWN
from .rows import Row


@dataclass(frozen=True)
class ImageValues:
    """The predicted values of an image.

    Attributes:
        key: of the result.
        row: the image.
        values: probability of each class, or numbers, by name.
        numbers: whether the values are numbers, not probabilities.
    """

    key: str
    row: Row
    values: dict[str, float]
    numbers: bool = False


def study_of(row: Row) -> str:
    """The UID of an image's study; for other files than DICOM images, their unique name."""
    if is_dicomweb(row.url):
        return parse_location(row.url).study or row.name
    try:
        return (None if row.url else read_info(row.record.path).study_uid) or row.name
    except DataError:
        return row.name


def report(said: Sequence[ImageValues], uid: str, checkpoint: str, model: str) -> Dataset:
    """A Comprehensive SR of the images of a study, with a measurement group per image and class for its probability.

    Classes have private codes with their names as meanings, because only the model's author knows what they mean.

    Args:
        said: the values of each image.
        uid: of the instance.
        checkpoint: name of the checkpoint.
        model: SHA-256 of the checkpoint.

    Raises:
        DataError: if a file is not a DICOM image, or its header lacks an attribute that the report must repeat.
    """
    import highdicom.sr as sr

    headers = [source_header(one.row.place, "so its result cannot be stored") for one in said]
    with highdicom_errors(said[0].row.name, "a structured report"):
        algorithm = sr.AlgorithmIdentification(
            name=f"{MAKER} {checkpoint}"[:64], version=OWN, parameters=[f"model SHA-256 {model}"]
        )
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(
                    uid=generate_uid(entropy_srcs=[uid, one.key, name]), identifier=f"{one.key[:8]} {name}"[:64]
                ),
                finding_type=own_code(name),
                algorithm_id=algorithm,
                measurements=[
                    sr.Measurement(
                        name=own_code("value") if one.numbers else codes.DCM.Probability,
                        value=value,
                        unit=codes.UCUM.NoUnits,
                    )
                ],
                source_images=[sr.SourceImageForMeasurementGroup.from_source_image(header)],
            )
            for one, header in zip(said, headers, strict=True)
            for name, value in one.values.items()
        ]
        device = sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=["device", model]),
            name=MAKER,
            manufacturer_name=MAKER,
            model_name=checkpoint[:64],
        )
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(
                observer_device_context=sr.ObserverContext(
                    observer_type=codes.DCM.Device, observer_identifying_attributes=device
                )
            ),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=groups,
        )
        return sr.ComprehensiveSR(
            evidence=headers,
            content=content[0],
            series_instance_uid=generate_uid(entropy_srcs=[uid, "series"]),
            series_number=1,
            sop_instance_uid=uid,
            instance_number=1,
            manufacturer=MAKER,
            is_complete=True,
        )
