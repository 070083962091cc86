"""Scores of full images: the largest difference of both breasts, for each pair of the test split.

Soft labels are defined for pairs of patches, and so is an image's score: the largest label over overlapping patches,
and a quantile near it, which a single outlier does not determine. Both images of a pair have the same scores, because
a distance says that two patches differ, but not which is abnormal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....accelerate import accelerate
from ....datasets.masks import read_inside
from ....datasets.tables import Record, read_table
from ....datasets.tables.cells import write_csv
from ....dense import write_map
from ....errors import DataError
from ....evaluate.roc import auc
from ....images.pixels import PixelSource
from ....morph.running import eval_mode
from ....train.run import Run
from .config import SiameseConfig
from .mixture import Judge
from .network import AsymmetryMap, Embedding, distance
from .pairs import Pair, StackedSource
from .patches import cells_of, original_boxes, sources_of

Array = NDArray[np.float64]
Place = dict[str, float]
"""Result of `localised` for a pair."""


def centres(record: Record) -> list[tuple[float, float]]:
    """Return row and column of each finding's centre: of its box, or of the extent of its outline or mask."""
    found = []
    for finding in record.findings:
        if finding.box is not None:
            found.append(((finding.box[0] + finding.box[1]) / 2, (finding.box[2] + finding.box[3]) / 2))
        elif finding.outline:
            rows, columns = zip(*finding.outline, strict=True)
            found.append(((min(rows) + max(rows)) / 2, (min(columns) + max(columns)) / 2))
        elif finding.mask is not None:
            rows, columns = np.nonzero(read_inside(finding.mask))
            if len(rows):
                found.append(((rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2))
    return found


def holds(boxes: Array, places: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Return which boxes (n, 4: left, top, right, bottom) contain at least one of the places (row, column)."""
    left, top, right, bottom = boxes.T
    found = np.zeros(len(boxes), bool)
    for y, x in places:
        found |= (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return found


def localised(pair: Pair, boxes: Sequence[Array], distances: Array) -> Place | None:
    """Measure how well distances of patches locate a pair's findings; None if no patch has one, or all have.

    Args:
        boxes: of the patches, in the files of the left and of the right image.
        distances: of the patches.

    Returns:
        hit: whether the patch with the largest distance contains the centre of a finding of either breast; with ties,
        the share that do. by_chance: the share of all patches that do. auc: of the patches.
    """
    sides = zip(boxes, (pair.left, pair.right), strict=True)
    positive = np.any([holds(own, centres(record)) for own, record in sides], 0)
    if not 0 < positive.sum() < len(positive):
        return None
    return {
        "hit": float(positive[distances == distances.max()].mean()),
        "by_chance": float(positive.mean()),
        "auc": auc(positive.astype(np.int64), distances) or 0.0,
    }


def localisation(found: Sequence[Place | None]) -> Any:
    """Return the means over the pairs with a result, and their number; a text if there are none."""
    known = [one for one in found if one is not None]
    if not known:
        return "no pair of the test split has a finding in some of its patches"
    return {"pairs": len(known), **{name: float(np.mean([one[name] for one in known])) for name in known[0]}}


def localisation_line(found: Any) -> str:
    """Format the result of `localisation` as a line of the model card."""
    if isinstance(found, str):
        return f"- Locations of findings were not measured: {found}."
    return (
        f"- Locations of findings by the distances, means over {found['pairs']} pairs of the test split with one: the "
        f"patch with the largest distance contains the centre of one in {found['hit']:.0%} ({found['by_chance']:.0%} "
        f"of all patches do); AUC of patches {found['auc']:.3f}."
    )


SCORES = ("largest_soft_label", "upper_soft_label", "largest_distance", "upper_distance")
_UPPER = 0.95  # the quantile
_BATCH = 64  # pairs of patches

Key = tuple[Path, int | str | None]
"""Key of an image: its file and frame."""


def label_pairs(
    pairs: Sequence[Pair], networks: Sequence[Embedding], judges: Sequence[Judge], config: SiameseConfig, run: Run
) -> list[dict[str, Any]]:
    """Return the scores of each pair, and write the maps of distances. A collective of the process group.

    The networks must be in evaluation mode.
    """
    group, found = run.group, []
    for number in range(group.turn, len(pairs), group.at_once):
        path = run.out / "maps" / f"{number}.tif"
        wanted = config.maps and group.speaks and not path.exists()
        sources = sources_of(pairs[number], config) if wanted or config.scores else None
        if sources is not None and wanted:
            _write_map(networks[0], sources, run, path)
        own = _scores(pairs[number], sources, networks, judges, config, run.device) if sources and config.scores else {}
        found.append(own)
    return group.in_order(found)


def _write_map(network: Embedding, sources: tuple[PixelSource, PixelSource], run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = AsymmetryMap(network)
    with eval_mode(module):
        write_map(accelerate(module, run.memory_budget), StackedSource(*sources), path)


@torch.no_grad()
def _scores(
    pair: Pair,
    sources: tuple[PixelSource, PixelSource],
    networks: Sequence[Embedding],
    judges: Sequence[Judge],
    config: SiameseConfig,
    device: str,
) -> dict[str, Any]:
    """Return scores over patches half a patch apart, like the map's cells; None if the breasts share none.

    ``places`` is the accuracy of localisation, see `localised`."""
    side = config.patch
    grid = cells_of(*sources, replace(config, stride=max(1, side // 2)))
    cells = grid.tolist()
    if not cells:
        return {"patches": 0, **dict.fromkeys(SCORES), "places": None}
    distances: list[list[np.ndarray[Any, Any]]] = [[] for _ in networks]
    for first in range(0, len(cells), _BATCH):
        places = cells[first : first + _BATCH]
        x = torch.stack([source.read(top, top + side, x, x + side) for top, x in places for source in sources])
        for network, own in zip(networks, distances, strict=True):
            left, right = network(x.to(device)).unflatten(0, (-1, 2)).unbind(1)
            own.append(distance(left, right).double().cpu().numpy())
    d = [np.concatenate(own) for own in distances]
    labels = np.mean([judge.labels(own) for judge, own in zip(judges, d, strict=True)], 0)
    values = [value for of in (labels, np.mean(d, 0)) for value in (of.max(), np.quantile(of, _UPPER))]
    boxes = [original_boxes(source, grid, side) for source in sources]
    places = localised(pair, boxes, np.mean(d, 0))
    return {"patches": len(cells), **dict(zip(SCORES, map(float, values), strict=True)), "places": places}


def classes_of(table: Path) -> dict[Key, int]:
    """Return the table's label of each image; empty for a table without labels or with other than two classes."""
    try:
        read = read_table(table)
    except DataError:  # the recipe needs no labels, and the rest was read before
        return {}
    return {(r.path, r.frame): r.label for r in read.records if r.label >= 0} if len(read.classes) == 2 else {}


def write_images(
    pairs: Sequence[Pair], scores: Sequence[Mapping[str, Any]], classes: Mapping[Key, int], findings: bool, run: Run
) -> Any:
    """Write ``images.csv`` with a row per image; return areas under the ROC curves, or why there are none.

    Args:
        scores: of each pair, see `label_pairs`.
        classes: see `classes_of`.
        findings: whether the table has findings, so that images without one are negative.
    """
    rows = []
    for number, (pair, own) in enumerate(zip(pairs, scores, strict=True)):
        for record in (pair.left, pair.right):
            rows.append(
                {
                    "image": record.path.name,
                    "patient_id": record.patient_id,
                    "exam_id": record.exam_id or "",
                    "laterality": record.laterality,
                    "view": record.view,
                    "pair": number,
                    **{name: own[name] for name in ("patches", *SCORES)},
                    "finding": int(bool(record.findings)) if findings else None,
                    "label": classes.get((record.path, record.frame)),
                }
            )

    if not rows:
        return "the table has no pair in the test split"
    write_csv(run.out / "images.csv", list(rows[0]), (list(row.values()) for row in rows))
    return _areas(rows) or "the test split does not have both kinds of images, by findings or by labels of two classes"


def _areas(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each truth, "finding" and "label", of pairs (either image) and of images."""
    scored, found = [row for row in rows if row["patches"]], []
    for truth in ("finding", "label"):
        pairs = zip(scored[::2], scored[1::2], strict=True)  # both images of a pair have patches, or none
        both = [(left, _either([left[truth], right[truth]])) for left, right in pairs]
        for level, cases in (("pair", both), ("image", [(row, row[truth]) for row in scored])):
            known = [(row, value) for row, value in cases if value is not None]
            positive = sum(value for _, value in known)
            if 0 < positive < len(known):
                y = np.array([value for _, value in known])
                areas = {name: auc(y, np.array([row[name] for row, _ in known])) for name in SCORES}
                found.append({"truth": truth, "level": level, "count": len(known), "positive": positive, **areas})
    return found


def _either(values: Sequence[int | None]) -> int | None:
    """Return 1 if either value is 1; None if either is unknown."""
    return 1 if 1 in values else None if None in values else 0
