"""Phantom mammograms: real DICOM files, and a label that only native resolution shows."""

import csv
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from sklearn.metrics import roc_auc_score
from torch.nn.functional import avg_pool2d

from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.splits import check_leaks
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.header import VIEW_CODES, read_info
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import PixelSource
from gigamorph.engine.mammography.phantom import PhantomImage, write_phantoms


def make(
    seed, *, cluster: bool, height: int = 1024, width: int = 768, view: str = "CC"
) -> tuple[PhantomImage, np.ndarray]:
    image = PhantomImage(height, width, seed=seed, view=view, lesions=("cluster",) if cluster else ())
    return image, image.read(0, height, 0, width)


def blocks(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor * factor for side in pixels.shape)
    shape = (height // factor, factor, width // factor, factor)
    return pixels[:height, :width].astype(np.float64).reshape(shape).mean((1, 3))


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_array(view: str) -> None:
    phantom, pixels = make(7, cluster=True, view=view, height=512, width=384)
    assert pixels.shape == (512, 384)
    assert pixels.dtype == np.uint16
    assert pixels.max() <= 4095
    assert 0.3 < (pixels > 0).mean() < 0.8  # breast on black
    assert np.all(pixels[:, -5:] == 0)  # the chest wall is left
    assert (pixels[:, 0] > 0).mean() > 0.6
    assert [lesion.kind for lesion in phantom.lesions] == ["cluster"]
    np.testing.assert_array_equal(make(7, cluster=True, view=view, height=512, width=384)[1], pixels)
    assert not np.array_equal(make(8, cluster=True, view=view, height=512, width=384)[1], pixels)


@pytest.mark.parametrize("seed", range(6))
def test_cluster_is_specks_and_vanishes_at_low_resolution(seed: int) -> None:
    (sharp, pixels), (soft, soft_pixels) = (make(seed, cluster=c, height=512, width=384) for c in (True, False))
    assert [lesion.kind for lesion in sharp.lesions] == ["cluster"]
    assert not soft.lesions
    assert sharp.normal_masses == soft.normal_masses
    top, bottom, left, right = sharp.lesions[0].box
    difference = pixels.astype(np.float64) - soft_pixels
    inside = difference[top:bottom, left:right].copy()
    difference[top:bottom, left:right] = 0
    assert not difference.any()  # the same breast around it
    assert abs(inside.sum()) < 0.02 * np.abs(inside).sum()  # the same brightness in total
    # At native resolution specks stand 400 grey levels or more above the tissue, over 8 times what noise and texture
    # do; averaged over 8 x 8 pixels they leave less than the texture has.
    specks = inside > 400
    assert 8 <= specks.sum() <= 20 * 9
    texture = blocks(soft_pixels[100:400, 20:200], 8).std()
    assert np.abs(blocks(inside, 8)).max() < 0.5 * texture


def test_tissue_has_a_power_law_spectrum() -> None:
    slopes = []
    for seed in range(4):
        pixels = make(seed, cluster=False)[1][300:684, 20:404].astype(np.float64)
        window = np.hanning(384)[:, None] * np.hanning(384)[None, :]
        power = np.abs(np.fft.fft2((pixels - pixels.mean()) * window)) ** 2
        frequency = np.hypot(np.fft.fftfreq(384)[:, None], np.fft.fftfreq(384)[None, :])
        band = (frequency > 0.03) & (frequency < 0.12)  # above the masses, below the noise
        slopes.append(np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0])
    assert -3.6 < np.mean(slopes) < -2.4


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=24, height=640, width=480, seed=3)


def test_files_are_mammograms_and_read_back(table: Path) -> None:
    records = read_table(table).records
    assert len(records) == 48
    assert {record.laterality for record in records} == {"L", "R"}
    with table.open(newline="") as file:
        columns = csv.DictReader(file).fieldnames
    assert columns is not None
    assert columns[:6] == ["image_path", "label", "patient_id", "split", "laterality", "view"]
    for number, record in enumerate(records[:12]):
        info = read_info(record.path)
        assert (info.laterality, info.view) == (record.laterality, record.view)
        assert info.patient_id == record.patient_id
        assert info.is_mammogram
        assert info.spacing == (0.1, 0.1)
        phantom, pixels = make(
            (3, 2, number // 2, number % 2),
            cluster=bool(record.label),
            height=640,
            width=480,
            view=str(record.view),
        )
        source = open_pixels(record.path)
        expected = (pixels / 4095).astype(np.float32)
        np.testing.assert_array_equal(source.read(0, 640, 0, 480)[0].numpy(), expected)
        ds = dcmread(record.path)
        # What dciodvfy of dicom3tools demands of a mammogram.
        assert ds.AnatomicRegionSequence[0].CodeValue == "76752008" and "DetectorType" in ds
        assert (ds.PositionerType, ds.OrganExposed) == ("MAMMOGRAPHIC", "BREAST")
        assert (ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign) == ("LOG", -1)
        assert VIEW_CODES[ds.ViewCodeSequence[0].CodeValue] == record.view
        assert ds.ViewCodeSequence[0].ViewModifierCodeSequence == ds.AcquisitionContextSequence == []
        assert "PatientIdentityRemoved" not in ds  # or it needs a DeidentificationMethod
        stored = ds.pixel_array
        np.testing.assert_array_equal(stored if record.laterality == "L" else stored[:, ::-1], pixels)
        box = record.extra["cluster"]
        assert box == " ".join(str(side) for lesion in phantom.lesions for side in lesion.box)


def test_table_is_split_by_patient_and_balanced(table: Path) -> None:
    records = read_table(table).records
    check_leaks(records)
    for split in ("train", "val", "test"):
        labels = [record.label for record in records if record.split == split]
        assert len(labels) >= 6
        assert sum(labels) * 2 == pytest.approx(len(labels), abs=2)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, third = (
        write_phantoms(tmp_path / name, patients=3, height=160, width=128, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_bytes() == second.read_bytes()
    for path in sorted((first.parent / "images").iterdir()):
        assert path.read_bytes() == (second.parent / "images" / path.name).read_bytes()
    assert {read_table(first).records[0].path.read_bytes()} != {read_table(third).records[0].path.read_bytes()}


def sharpest(source: PixelSource) -> tuple[float, float]:
    """The largest response to a point, and the brightest pixel: what a small network could use."""
    pixels = source.read(0, source.shape[1], 0, source.shape[2])
    return float((pixels[:, 1:-1, 1:-1] - avg_pool2d(pixels, 3, 1)).max()), float(pixels.max())


def test_label_shows_at_native_resolution_only(table: Path) -> None:
    records = read_table(table).records
    labels = [record.label for record in records]

    def auc(factor: int) -> np.ndarray:
        dataset = ImageDataset(records, downsample=factor)
        scores = np.array([sharpest(dataset[i]["image"]) for i in range(len(dataset))])
        return np.array([roc_auc_score(labels, score) for score in scores.T])

    assert auc(1).min() > 0.9
    assert np.all(np.abs(auc(8) - 0.5) < 0.2)


def test_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="100 x 96"):
        make(0, cluster=True, height=100, width=96)
    make(0, cluster=True, height=128, width=96)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_phantoms(tmp_path / "file", patients=2, height=128, width=96)
