"""The networks of a cross-validation (`gigamorph train --folds`) as one network: the mean of their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..datasets.views import mirrorings
from ..errors import DataError
from ..images.pixels import Normalize
from ..models.folder import Preprocessing
from ..models.folds import fold_checkpoints
from ..models.outputs import Outputs
from ..predict.predictor import Classifier
from ..train.checkpoint import load_checkpoint, preprocessing_of
from ..train.inputs import images
from ..train.network import restore_network, target_of
from .ensemble import Ensemble, Member, Published
from .open import add_splits, image_count


def look_at_folds(folder: str | Path) -> str:
    """Describe the networks in a folder of folds in one line.

    Raises:
        DataError: see `open_folds`.
    """
    records: list[Mapping[str, Any]] = []
    for path in fold_checkpoints(folder):
        records.append(load_checkpoint(path)["gigamorph"])
        _require_alike(path, records)
    scales = [record["preprocessing"]["normalize"] for record in records]
    own = ", each with its own mean and std" if scales != scales[:1] * len(scales) else ""
    return f"{folder}: the mean of {len(records)} networks{own}"


def open_folds(folder: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()) -> Classifier:
    """Open the networks of all folds, with a budget and on a device, to predict as one network.

    Each normalises images with its own mean and standard deviation; with ``--mean auto``, they come from its training.

    Args:
        flips: names in `gigamorph.engine.datasets.flips.FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: a fold is not finished, the folds differ in classes or images, or they predict masks.
    """
    members: list[Member] = []
    records: list[Mapping[str, Any]] = []
    for path in fold_checkpoints(folder):
        stored = load_checkpoint(path)
        records.append(stored["gigamorph"])
        _require_alike(path, records)
        net = restore_network(stored, path, memory_budget=memory_budget, device=device)
        members.append(Member(Published(net, str(path)), _preprocessing(records[-1]), _outputs(records[-1])))
    first = records[0]
    grey = {**first["preprocessing"], "normalize": Normalize().to_dict()}
    return Classifier(
        Ensemble(members, members[0].outputs, mirrorings(flips)),  # type: ignore[arg-type]
        members[0].outputs.names,
        lambda found: images(add_splits(found, records), first["channels"], grey),
        image_count(records),
    )


def _outputs(record: Mapping[str, Any]) -> Outputs:
    target = target_of(record)
    return target.outputs or Outputs.of("softmax", len(target.names), target.names)


def _preprocessing(record: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that each network applies itself; everything else is done once for all."""
    scale = record["preprocessing"]["normalize"]
    return Preprocessing(record["channels"], tuple(scale["mean"]), tuple(scale["std"]))


def _target_name(record: Mapping[str, Any]) -> str:
    target = target_of(record)
    of_exams = f" of exams ({target.views} of their views)" if target.views else ""
    return f"{target.kind} {', '.join(record['classes'])}{of_exams}"


def _require_alike(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the last record, which is that of the checkpoint `path`, if it cannot be averaged with the first."""
    first, own = records[0], records[-1]
    one = "; use the checkpoint of one fold"
    if "options" not in own:
        raise DataError(f"{path}: is not a checkpoint of gigamorph train --folds{one}")
    preprocessing_of(own, path)
    if target_of(own).kind == "masks":
        raise DataError(f"{path}: predicts masks, which cannot be averaged over folds{one}")
    if _target_name(own) != _target_name(first):
        raise DataError(f"{path}: predicts {_target_name(own)}, not {_target_name(first)} like fold 1{one}")
    taken, wanted = ({**record["preprocessing"], "channels": record["channels"]} for record in (own, first))
    differs = [name for name in wanted if name != "normalize" and taken.get(name) != wanted[name]]
    if differs:
        raise DataError(f"{path}: takes images with another {differs[0]} than fold 1; they cannot be averaged{one}")
