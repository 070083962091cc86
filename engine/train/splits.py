"""Which split of a training an image was in, as far as a checkpoint can tell: it knows the split, not who is in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..datasets.splits import assign_splits
from ..datasets.tables import SPLITS, Record
from ..errors import DataError
from .folds import draw_folds
from .network import target_of

_FOLDS = 10  # of larger cross-validations it is not known


def hash_of(parts: Mapping[str, Sequence[Record]]) -> str:
    """SHA-256 of which images, patients and labels are in which split."""
    # The last two parts of a path: the folder may have moved when a run is resumed.
    split = {name: [["/".join(r.path.parts[-2:]), r.patient_id, r.label] for r in part] for name, part in parts.items()}
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


def with_splits(records: Sequence[Record], trained: Mapping[str, Any]) -> list[Record]:
    """Records with the split that they had in a training, as far as it is known.

    The table of the training gives the splits of the training: drawn again by its seed, with the same hash; images that
    it left out, for they say nothing of what is learnt, have their patient's. Of other images it is the split that
    their table names, or None.

    Args:
        trained: what a checkpoint says of its network.
    """
    with contextlib.suppress(DataError, KeyError):  # other images; a recipe's checkpoint, which keeps no hash
        own, seed = trained["split"], trained["options"]["seed"]
        learnt = target_of(trained).known(records) if "target" in trained else records
        if len(learnt) != sum(own.get(name, 0) for name in SPLITS):
            return list(records)
        for drawn in _draws(learnt, seed):
            parts = {name: [record for record in drawn if record.split == name] for name in SPLITS}
            # Counts first, for the hash of a large table takes long.
            if all(len(part) == own.get(name, len(part)) for name, part in parts.items()) and (
                hash_of(parts) == own["sha256"]
            ):
                split_of = {record.patient_id: record.split for record in drawn}
                return [replace(record, split=split_of.get(record.patient_id, record.split)) for record in records]
    return list(records)


def _draws(records: Sequence[Record], seed: int) -> Iterator[list[Record]]:
    """The split of a run by itself, and those of cross-validations."""
    yield assign_splits(records, seed=seed)
    for count in range(2, _FOLDS + 1):
        yield from draw_folds(records, count, seed)
