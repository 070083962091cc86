"""Predicts masks over an archive: a file of classes for each image, and a table of their areas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from torch import Tensor, nn

from ..accelerate import Accelerated, accelerate
from ..datasets.masks import IGNORED, Mask, mask_as_stored, masks_of, strips
from ..datasets.tables import SPLITS, Record
from ..datasets.tables.cells import write_csv
from ..dense import map_shape, write_map
from ..errors import DataError
from ..files import temporary_name
from ..images.dicom_results import highdicom_errors, own_code, segment, segmentation, source_header
from ..images.open import open_pixels
from ..images.pixels import PixelSource
from ..images.writers import grey_suffix, write_grey
from ..train.checkpoint import load_checkpoint, preprocessing_of
from ..train.data import Images
from ..train.inputs import images
from ..train.mask_target import MaskTarget, dice_cells, dice_scores
from ..train.network import restore_network, target_of
from ..train.record import with_splits
from .decoders import Opened
from .delivery import Document
from .index import RunDatabase
from .job import PredictJob, Result, Unit, texts
from .options import RunOptions, Scores, Summary, Watch
from .predictor import NetworkUnit, Wanted, naming
from .rows import Row
from .runner import run
from .tables import LEADING, leading_cells, prediction_of

MASKS = pa.schema(
    [
        *texts("key", "model", "image_path", "header_patient", "laterality", "view"),
        ("pixels", pa.int64()),
        *texts("name", "mask"),
        ("area", pa.list_(pa.int64())),
        ("counts", pa.list_(pa.int64())),
    ]
)
"""Schema of the parts: the mask's name and file, its pixels of each class, and if the table has a mask, the flattened
counts (3, classes) of `gigamorph.engine.train.mask_target.MaskLoss`."""


class MostProbableClass(nn.Module):
    """A network's most probable class at each position: (N, C, H, W) -> (N, H', W') uint8."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1).to(torch.uint8)


@dataclass(frozen=True)
class Segmenter:
    """A network of masks, ready to predict.

    Attributes:
        net: pixel source -> (1, H', W') classes.
        target: the classes.
        open_images: opens the images of records.
        trained_on: number of images in the training.
    """

    net: Accelerated
    target: MaskTarget
    open_images: Callable[[Sequence[Record]], Images]
    trained_on: int


class MaskOpener(Protocol):
    """Opens the network in the computing process; must be picklable if there are several."""

    def __call__(self, *, device: str) -> Segmenter: ...


def gives_masks(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of `gigamorph train` predicts masks."""
    return not Path(checkpoint).is_dir() and target_or_none(load_checkpoint(checkpoint)) is not None


def target_or_none(stored: dict[str, Any]) -> MaskTarget | None:
    """The mask target of a checkpoint's network; None for networks that do not predict masks."""
    record = stored["gigamorph"]
    target = target_of(record) if "options" in record else None
    return target if isinstance(target, MaskTarget) else None


def open_segmenter(path: str | Path, *, memory_budget: int | None, device: str) -> Segmenter:
    """The trained network of a checkpoint, with the given memory budget and device.

    Raises:
        DataError: if it does not predict masks.
    """
    stored = load_checkpoint(path)
    record, target = stored["gigamorph"], target_or_none(stored)
    if target is None:
        raise DataError(f"{path}: does not predict masks; train a network with --task masks")
    prepared = preprocessing_of(record, path)
    trained = restore_network(stored, path, memory_budget=memory_budget, device=device)
    net = accelerate(MostProbableClass(trained._network), memory_budget, batch_norm=record["options"].get("batch_norm"))
    return Segmenter(
        net,
        target,
        lambda records: images(with_splits(records, record), record["channels"], prepared),
        sum(record["split"].get(name, 0) for name in SPLITS),
    )


class SegmentationUnit(NetworkUnit):
    """The unit of mask prediction."""

    def __call__(self, opened: Opened) -> Result:
        """Write an image's mask in the size and orientation of its file; returns a row of `MASKS`.

        Blocks of the map are first written to a temporary file next to the mask.

        Raises:
            DataError: naming the image, if it or the table's mask cannot be read, or its mask cannot be written.
            BudgetError: naming the image, if none of its tiles fits.
        """
        item, work, segmenter, wanted = opened.item, opened.work, self._network, self._wanted
        assert item is not None
        source, record = item["image"], work.row.record
        own = segmenter.target.stored(record, source) if masks_of(record) else None
        raw = temporary_name(wanted.out / "masks" / f"{work.name}.npy")
        try:
            with naming(work.row.name):
                write_map(segmenter.net, source, raw)
            mask = mask_as_stored(ArrayMask(np.load(raw, mmap_mode="r")), source)
            target = wanted.out / "masks" / (work.name + grey_suffix(mask.shape))
            write_grey(target, mask.shape, np.uint8, mask.read)
            area, counts = _pixel_counts(mask, own, len(segmenter.target.names))
        except OSError as error:
            raise DataError(f"{wanted.out / 'masks'}: cannot be written ({error.strerror or error})") from error
        finally:
            raw.unlink(missing_ok=True)
        return {
            **self._columns(source, work),
            "name": work.name,
            "mask": target.name,
            "area": area.tolist(),
            "counts": None if counts is None else counts.ravel().tolist(),
        }


class ArrayMask:
    """Classes (1, rows, columns), in memory or memory-mapped, read by region."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values[0]
        self.shape: tuple[int, int] = self._values.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return np.asarray(self._values[top:bottom, left:right])


def mask_of(net: Accelerated, source: PixelSource) -> np.ndarray:
    """The mask of an image in the size and orientation of its file, uint8 (rows, columns); uses a byte per cell.

    Args:
        net: of a `Segmenter`.
        source: the image.

    Raises:
        DataError: if the image cannot be read.
        BudgetError: if none of its tiles fits.
    """
    values = np.empty(map_shape(net, source), np.uint8)
    write_map(net, source, values)
    mask = mask_as_stored(ArrayMask(values), source)
    return mask.read(0, mask.shape[0], 0, mask.shape[1])


def _pixel_counts(found: Mask, own: Mask | None, classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of each class (classes,); and with a mask counts (3, classes): in both, in the prediction, in the mask."""
    area, counts = np.zeros(classes, np.int64), np.zeros((3, classes), np.int64)
    for top, bottom in strips(found.shape[0]):
        values = found.read(top, bottom, 0, found.shape[1])
        area += np.bincount(values.ravel(), minlength=classes)
        if own is not None:
            true = own.read(top, bottom, 0, found.shape[1])
            judged = true != IGNORED
            counts[0] += np.bincount(true[judged & (true == values)], minlength=classes)
            counts[1] += np.bincount(values[judged], minlength=classes)
            counts[2] += np.bincount(true[judged], minlength=classes)
    return area, None if own is None else counts


@dataclass(frozen=True)
class MaskOptions(RunOptions):
    """Options of a run that predicts masks; see also `RunOptions`.

    Attributes:
        identifiers: write patient names that only DICOM headers have; otherwise they are numbered.
    """

    identifiers: bool = False


def predict_masks(
    opener: MaskOpener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: MaskOptions,
    watch: Watch | None = None,
) -> Summary:
    """Predict the masks of images into ``out/masks``, and write ``predictions.csv``; see `runner.run`.

    The table has each image's mask, the fraction of pixels of each class, and if the images' table has a mask, the Dice
    of each class except the background, empty if undefined.

    Args:
        opener: opens the network.
        sources: tables, folders, images or records.
        out: folder of the results.
        options: of the run.
        watch: callbacks.

    Raises:
        DataError: naming a damaged image or mask, or for an invalid table.
        GigamorphError: if ``out`` has other results or is in use by another process, cannot be written, or too many
            images failed.
    """
    return run(_Masks(opener, options), sources, out, options, watch)


class _Masks(PredictJob):
    schema, named = MASKS, "name"

    _options: MaskOptions
    _network: Segmenter
    _wanted: Wanted

    def described(self) -> dict[str, Any]:
        own = self._options
        return {"identifiers": own.identifiers, "precision": own.precision, "white": own.white}

    def key(self, row: Row, model: str) -> str:
        # The result also depends on the table's masks.
        return row.key("\0".join([model, *map(str, masks_of(row.record))]))

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        try:
            (out / "masks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
        self._wanted = Wanted(self._options.model, out, secret=None if self._options.identifiers else secret())

    def compute(self) -> Callable[[Any], Unit]:
        return functools.partial(SegmentationUnit, wanted=self._wanted)

    def tables(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Scores:
        names = self._network.target.names
        counts: dict[str, list[np.ndarray]] = {}

        def rows() -> Iterator[list[object]]:
            for row, result in index.joined(results):
                shape = None if result["counts"] is None else np.reshape(result["counts"], (3, len(names)))
                if shape is not None:
                    of_split = counts.setdefault(row.record.split or "", [np.zeros_like(shape), np.zeros(1, int)])
                    of_split[0] += shape
                    of_split[1] += 1
                own = {"log_odds": (), "exclusive": True, **result}
                found = prediction_of(row, own, index, None, self._options.identifiers)
                cells = [*leading_cells(found, index.reading), f"masks/{result['mask']}"]
                yield [*cells, *_measures(result, shape, len(names))]

        keys = [LEADING[0], *index.reading, *LEADING[1:], "mask"]
        header = [*keys, *(f"share_{name}" for name in names), *(f"dice_{name}" for name in names[1:])]
        write_csv(out / "predictions.csv", header, rows())
        self.write_note(out, masks={"classes": list(names), "binary": self._network.target.binary})
        return {split: dice_scores(total, int(number[0]), names) for split, (total, number) in counts.items()}

    def documents(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """A DICOM SEG for each image."""
        for row, result in index.joined(results):
            make = functools.partial(mask_segmentation, row, out / "masks" / result["mask"], self._network.target.names)
            yield Document(f"{result['key']}\0segmentation", row.name, make)


def mask_segmentation(row: Row, mask: Path, names: Sequence[str], uid: str) -> Dataset:
    """A predicted mask as DICOM SEG, with a segment for each class except the background.

    Args:
        row: the image.
        mask: file of the predicted mask.
        names: of the classes; segments have private codes with these meanings.
        uid: of the instance.

    Raises:
        DataError: if the image is not a DICOM image of one frame, or its header lacks an attribute that a SEG must
            repeat.
    """
    header = source_header(row.place, "so its mask cannot be stored")
    pixels = open_pixels(mask).stored
    _, height, width = pixels.shape
    if int(header.get("NumberOfFrames") or 1) != 1 or (header.Rows, header.Columns) != (height, width):
        raise DataError(f"{row.name}: has {header.get('NumberOfFrames', 1)} frames; masks can be stored only for one")
    with highdicom_errors(row.name, "a DICOM SEG"):
        segments = [
            segment(number, name, codes.SCT.SpatialAndRelationalConcept, own_code(name))
            for number, name in enumerate(names)
            if number
        ]
    values = np.asarray(pixels.read(0, height, 0, width))[0]
    return segmentation(row.name, header, values, segments, content="Classes of pixels", uid=uid)


def _measures(result: Result, counts: np.ndarray | None, classes: int) -> list[str]:
    area = np.array(result["area"], np.float64)
    scores = [""] * (classes - 1) if counts is None else dice_cells(counts)
    return [*(repr(share) for share in (area / area.sum()).tolist()), *scores]
