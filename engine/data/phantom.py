"""Phantom mammograms: a task that is easy at native resolution and impossible at low resolution, as real DICOM files.

A breast outline on black holds tissue with the power-law texture of real breasts (amplitude falls as f^-1.5), soft
masses and lines. The label is whether there is a cluster of micro-calcifications, specks of 1 to 3 pixels. Every image
without a cluster gets the same cluster *blurred* over some 8 pixels instead: same place, same total brightness, so that
averaging over 8 x 8 pixels leaves nothing that tells the two apart, while masses and lines are in both classes alike.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from ..errors import DataError
from .dicom import MG_FOR_PRESENTATION
from .splits import assign_splits
from .tables import Record

Box = tuple[int, int, int, int]  # top, bottom, left, right; ends excluded

_FULL = 4095  # 12 bits
_TISSUE, _TEXTURE, _NOISE = 1300.0, 220.0, 10.0  # grey levels: mean tissue, std of texture and of quantum noise
_SPECK = (600.0, 1100.0)  # grey levels of a speck above the tissue
_BLUR = 2.5  # pixels: standard deviation of the specks' blurred twins
_SPACING = 0.1  # millimetres


@dataclass(frozen=True)
class Phantom:
    """A phantom mammogram with its chest wall on the left, as `open_pixels` delivers it."""

    pixels: np.ndarray
    """uint16 (height, width), 12 bit, background 0."""
    cluster: Box | None
    """The cluster of micro-calcifications; None where there is none."""
    masses: tuple[Box, ...]
    """Soft masses, in both classes."""

    @property
    def label(self) -> int:
        """1 with a cluster, 0 without."""
        return int(self.cluster is not None)


def make_array(
    seed: int | tuple[int, ...], *, cluster: bool, height: int = 1024, width: int = 768, view: str = "CC"
) -> Phantom:
    """One phantom; the same arguments give the same pixels.

    seed: anatomy and lesions. Calls that differ only in `cluster` give the same breast, with sharp or blurred specks.
    view: "CC", or "MLO" with a pectoral muscle in the upper corner at the chest wall.
    `DataError` if the image is smaller than 128 x 96, where breast and lesions find no room.
    """
    if height < 128 or width < 96:
        raise DataError(f"a phantom of {height} x {width} has no room for lesions; use 128 x 96 or more")
    rng = np.random.default_rng(seed)
    depth = _depth(rng, height, width)  # pixels from the skin, on the scale of the breast
    breast = depth > 0
    image = _texture(rng, height, width)
    image *= _TEXTURE
    image += _TISSUE
    if view == "MLO":
        _add_muscle(rng, image)
    masses = tuple(_add_mass(rng, image, depth) for _ in range(int(rng.integers(0, 3))))
    for _ in range(int(rng.integers(2, 6))):
        _add_line(rng, image, depth)
    box = _add_cluster(rng, image, depth, sharp=cluster)
    # Compressed tissue is as thick everywhere, but for a seam along the skin.
    image *= np.clip(depth / (0.06 * width), 0, 1) ** 0.5
    image += np.float32(_NOISE) * rng.standard_normal((height, width), dtype=np.float32)
    np.clip(image, 40, _FULL, out=image)
    image[~breast] = 0
    return Phantom(np.rint(image).astype(np.uint16), box if cluster else None, masses)


def write_phantoms(
    folder: str | Path,
    *,
    patients: int = 60,
    height: int = 1024,
    width: int = 768,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.6, 0.15, 0.25),
) -> Path:
    """Write phantom patients as DICOM files and the table of them; returns the path of the csv.

    Every patient has one breast in two views (CC, MLO) with the same label; every other patient has a cluster.
    folder: gets `images/*.dcm` (For Presentation mammograms, 12 bit, as stored by a scanner: right breasts with their
    chest wall on the right) and `phantoms.csv` with columns image_path, label, patient_id, split, laterality, view, and
    cluster: top, bottom, left, right of the cluster as `open_pixels` shows the image, empty without one.
    fractions: of the patients, for train, val and test.
    Raises `DataError` if the folder cannot be written.
    """
    folder = Path(folder)
    rng = np.random.default_rng([seed, 1])
    rows: list[dict[str, object]] = []
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number in range(patients):
            patient, label = f"PHANTOM{number:04d}", number % 2
            laterality = "LR"[int(rng.integers(2))]
            for view_number, view in enumerate(("CC", "MLO")):
                phantom = make_array(
                    (seed, 2, number, view_number), cluster=bool(label), height=height, width=width, view=view
                )
                name = f"images/{patient}_{laterality}_{view}.dcm"
                _write_dicom(folder / name, phantom.pixels, patient, laterality, view, f"{seed}.{height}.{width}")
                box = "" if phantom.cluster is None else " ".join(str(side) for side in phantom.cluster)
                row = {"image_path": name, "label": label, "patient_id": patient, "laterality": laterality}
                rows.append({**row, "view": view, "cluster": box})
        records = [Record(Path(str(row["image_path"])), int(str(row["label"])), str(row["patient_id"])) for row in rows]
        splits = [record.split for record in assign_splits(records, fractions=fractions, seed=seed)]
        table = folder / "phantoms.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            columns = ["image_path", "label", "patient_id", "split", "laterality", "view", "cluster"]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**row, "split": split} for row, split in zip(rows, splits, strict=True))
    except OSError as error:
        raise DataError(f"{folder}: phantoms cannot be written ({error.strerror or error})") from error
    return table


def _depth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (height, width): pixels inside the outline, a half ellipse at the left border; 0 or less outside."""
    centre = height * rng.uniform(0.45, 0.55)
    semi_y, semi_x = height * rng.uniform(0.38, 0.46), width * rng.uniform(0.6, 0.9)
    y = ((np.arange(height, dtype=np.float32) - centre) / semi_y)[:, None]
    x = (np.arange(width, dtype=np.float32) / semi_x)[None, :]
    return ((1 - np.sqrt(y * y + x * x)) * min(semi_y, semi_x)).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (height, width), mean 0, std 1, power spectrum 1/f^3: Gaussian noise shaped in the frequency domain."""
    fy = np.fft.fftfreq(height).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(width).astype(np.float32)[None, :]
    power = fy * fy + fx * fx
    power[0, 0] = 1.0
    amplitude = power ** np.float32(-0.75)
    # Slower than 1/4 of the image no further growth, or one slope would fill the breast.
    amplitude = np.minimum(amplitude, np.float32((4 / min(height, width)) ** -1.5))
    amplitude[0, 0] = 0
    noise = rng.standard_normal((2, *amplitude.shape), dtype=np.float32)
    spectrum = np.empty(amplitude.shape, np.complex64)
    spectrum.real, spectrum.imag = noise[0] * amplitude, noise[1] * amplitude
    field = np.fft.irfft2(spectrum, (height, width)).astype(np.float32)
    return field / field.std()


def _add_muscle(rng: np.random.Generator, image: np.ndarray) -> None:
    """Brighten the pectoral muscle of an MLO view: a triangle in the upper left corner with a soft edge."""
    height, width = image.shape
    y = np.arange(height, dtype=np.float32)[:, None] / (height * rng.uniform(0.4, 0.6))
    x = np.arange(width, dtype=np.float32)[None, :] / (width * rng.uniform(0.3, 0.45))
    image += 350 * np.clip((1 - y - x) * 15, 0, 1)


def _place(rng: np.random.Generator, depth: np.ndarray, margin: float) -> tuple[int, int]:
    """A point at least `margin` pixels inside the outline and the image, or the deepest there is."""
    height, width = depth.shape
    for _ in range(200):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        if depth[y, x] > margin and margin <= x and margin <= y < height - margin:
            return y, x
    return int(depth[:, 0].argmax()), int(margin)


def _add_mass(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray) -> Box:
    """A soft Gaussian mass."""
    sigma = image.shape[1] * rng.uniform(0.02, 0.05)
    y, x = _place(rng, depth, 2 * sigma)
    radius = int(3 * sigma)
    box = _box(image, y - radius, y + radius + 1, x - radius, x + radius + 1)
    blob = _gaussian(np.arange(box[0], box[1]) - y, sigma) * _gaussian(np.arange(box[2], box[3]) - x, sigma).T
    image[box[0] : box[1], box[2] : box[3]] += rng.uniform(200, 450) * blob
    return box


def _add_line(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray) -> None:
    """A straight vessel or ligament with a soft profile of 2 to 5 pixels."""
    length = image.shape[1] * rng.uniform(0.1, 0.3)
    y, x = _place(rng, depth, length / 4)
    angle, sigma = rng.uniform(0, math.pi), rng.uniform(2, 5)
    radius = int(length / 2)
    top, bottom, left, right = _box(image, y - radius, y + radius + 1, x - radius, x + radius + 1)
    dy = (np.arange(top, bottom, dtype=np.float32) - y)[:, None]
    dx = (np.arange(left, right, dtype=np.float32) - x)[None, :]
    across = dx * math.sin(angle) - dy * math.cos(angle)
    along = dx * math.cos(angle) + dy * math.sin(angle)
    profile = np.exp(-0.5 * (across / sigma) ** 2) * np.clip((length / 2 - np.abs(along)) / (2 * sigma), 0, 1)
    image[top:bottom, left:right] += np.float32(rng.uniform(80, 200)) * profile


def _add_cluster(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray, *, sharp: bool) -> Box:
    """8 to 20 specks of 1 to 3 pixels within some 5 mm; or the same blurred, with the same sum over the image."""
    radius = int(rng.integers(18, 30))
    pad = math.ceil(3 * _BLUR)
    y, x = _place(rng, depth, radius + pad + 4.0)
    side = 2 * (radius + pad) + 4
    patch = np.zeros((side, side), np.float32)
    for _ in range(int(rng.integers(8, 21))):
        angle, distance = rng.uniform(0, 2 * math.pi), radius * math.sqrt(rng.uniform())
        top = round(radius + pad + distance * math.sin(angle))
        left = round(radius + pad + distance * math.cos(angle))
        rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        if rows * columns == 9:  # the largest are round
            patch[top : top + 3, left + 1] += rng.uniform(*_SPECK)
            columns, rows, top = 3, 1, top + 1
        patch[top : top + rows, left : left + columns] += rng.uniform(*_SPECK)
    if not sharp:
        steps = np.arange(side)
        kernel = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / _BLUR) ** 2).astype(np.float32)
        kernel /= kernel.sum(0, keepdims=True)  # what a speck loses to its surroundings it loses to nothing else
        patch = kernel @ patch @ kernel.T
    top, left = y - side // 2, x - side // 2
    box = _box(image, top, top + side, left, left + side)
    image[box[0] : box[1], box[2] : box[3]] += patch[box[0] - top : box[1] - top, box[2] - left : box[3] - left]
    return box


def _gaussian(steps: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-0.5 * (steps.astype(np.float32) / np.float32(sigma)) ** 2)[:, None]


def _box(image: np.ndarray, top: int, bottom: int, left: int, right: int) -> Box:
    height, width = image.shape
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)


def _write_dicom(path: Path, pixels: np.ndarray, patient: str, laterality: str, view: str, study: str) -> None:
    """A For Presentation mammogram, uncompressed; right breasts are stored with their chest wall on the right."""
    stored = pixels if laterality == "L" else pixels[:, ::-1]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = UID(MG_FOR_PRESENTATION)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[study, patient, laterality, view])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[study, patient])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[study, patient, "series"])
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.Modality, ds.PresentationIntentType = "MG", "FOR PRESENTATION"
    ds.Manufacturer, ds.SeriesDescription = "gigamorph", "phantom"
    ds.PatientID = ds.PatientName = patient
    ds.PatientBirthDate, ds.PatientSex, ds.PatientIdentityRemoved = "", "F", "YES"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20000101", "000000", "1", ""
    ds.ReferringPhysicianName, ds.SeriesNumber, ds.InstanceNumber = "", 1, 1
    ds.BodyPartExamined, ds.BurnedInAnnotation, ds.LossyImageCompression = "BREAST", "NO", "00"
    ds.ImageLaterality, ds.ViewPosition = laterality, view
    side = {"CC": {"L": "R", "R": "L"}, "MLO": {"L": "FR", "R": "FL"}}[view][laterality]
    ds.PatientOrientation = ["A" if laterality == "L" else "P", side]
    ds.ImagerPixelSpacing = [_SPACING, _SPACING]
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelPaddingValue = 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 2048, 4096, "LINEAR"  # the full range
    ds.PresentationLUTShape = "IDENTITY"
    ds.add_new("PixelData", "OW", np.ascontiguousarray(stored, "<u2").tobytes())
    ds.save_as(path, enforce_file_format=True)
