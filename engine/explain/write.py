"""Explanations of many images, as files beside a table of marks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..accelerate import Accelerated
from ..errors import BudgetError, DataError, GigamorphError
from ..files import write_atomically
from ..images.pixels import as_stored
from ..images.writers import write_tiff
from ..models.outputs import outputs_of
from ..train.data import Images
from ..train.explanation import Explanation, caption, explain_class, log_odds_of
from ..train.heatmap import overlay_name, write_overlay
from ..train.progress import Meter
from .maps import explain_gradient
from .marks import Mark, find_marks
from .seg import write_segmentation

Method = Literal["activation", "gradient"]
Format = Literal["png", "tif", "seg", "binary-seg"]
METHODS = {"activation": explain_class, "gradient": explain_gradient}


def explain(
    net: Accelerated,
    images: Images,
    out: str | Path,
    classes: Sequence[str],
    *,
    method: Method = "activation",
    output: int | None = None,
    formats: Sequence[Format] = ("png",),
    skip_bad: bool = False,
    meter: Meter | None = None,
) -> tuple[int, list[str]]:
    """Write the maps of images into ``out``, on the pixels of their files as stored, and ``marks.csv``.

    For an image called NAME: ``NAME.png`` (``.tif`` where it is very large), the map drawn over it with the class and
    its probability; ``NAME.map.tif``, its values in float32; ``NAME.seg.dcm``, a fractional, or
    ``NAME.binary.seg.dcm``, a binary DICOM SEG. marks.csv has the peaks of class activation maps, for `gigamorph eval
    --marks`.

    Args:
        classes: names of the outputs.
        output: whose map; None takes the second of two classes, else the most probable one.
        formats: of png, tif, seg and binary-seg.
        skip_bad: note an image that cannot be read or written so and go on; otherwise it ends the run.

    Returns:
        How many images were explained, and for each skipped one the message.

    Raises:
        GigamorphError: if ``out`` already holds marks, or cannot be written. DataError: a damaged image, named.
    """
    out, meter = Path(out), meter or Meter(None)
    if (out / "marks.csv").exists():
        raise GigamorphError(f"{out}: already holds explanations; name another --out")
    net.eval()
    rows: list[tuple[str, str, Mark]] = []
    skipped: list[str] = []
    names: set[str] = set()
    done = 0
    meter.start("explain", len(images))
    for index in range(len(images)):
        path = images.records[index].path
        try:
            source = images[index]["image"]
            meter.image(source.shape[-2] * source.shape[-1])
            found, logits, which = METHODS[method](net, source, output)
            outputs = outputs_of(net)
            log_odds = float(log_odds_of(logits.double().cpu()[None], which, outputs)[0])
            told = caption(classes[which], log_odds, outputs is not None and outputs.numbers)
            stem = unique_name(path.stem, names)
            for one in formats:
                _write(found, path, out, stem, one, classes[which], told)
        except BudgetError as error:  # the larger images of a set may not fit
            raise BudgetError(f"{path}: {error}") from error
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            meter.note(f"skipped: {error}")
        else:
            done += 1
            if method == "activation":
                rows += [(str(path), classes[which], mark) for mark in find_marks(found)]
        meter.image_done()
    if method == "activation":
        write_atomically(out / "marks.csv", lambda p: _write_marks(p, rows), "table")
    return done, skipped


def unique_name(stem: str, taken: set[str]) -> str:
    """``stem``, or ``stem-2`` and so on: files of several folders may share a name."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def _write(found: Explanation, image: Path, out: Path, stem: str, one: Format, label: str, told: str) -> None:
    if one == "png":
        name = overlay_name(stem, as_stored(found.source).shape)
        write_overlay(found, out / name, stored=True, caption=told)
    elif one == "tif":
        dtype = np.dtype(np.float32)
        path = out / f"{stem}.map.tif"
        write_atomically(path, lambda p: write_tiff(p, found.size, dtype, found.read), "map")
    elif one == "seg":
        write_segmentation(found, image, out / f"{stem}.seg.dcm", label=label, kind="fractional")
    else:
        write_segmentation(found, image, out / f"{stem}.binary.seg.dcm", label=label, kind="binary")


def _write_marks(path: Path, rows: Sequence[tuple[str, str, Mark]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_path", "class", "row", "column", "score"])
        for image, label, mark in rows:
            writer.writerow([image, label, f"{mark.row:.2f}", f"{mark.column:.2f}", repr(mark.score)])
