"""The networks of a cross-validation (`gigamorph train --folds`) as one: the mean of their predictions."""

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
from ..train.checkpoint import load_checkpoint
from ..train.inputs import images
from ..train.network import restore_network, target_of
from ..train.stored import preprocessing_of
from .ensemble import Ensemble, Member, Published
from .open import count_of, learnt


def look_at_folds(folder: str | Path) -> str:
    """What there is to say of the networks in a folder of folds.

    Raises:
        DataError: as `open_folds`.
    """
    records: list[Mapping[str, Any]] = []
    for path in fold_checkpoints(folder):
        records.append(load_checkpoint(path)["gigamorph"])
        _require_alike(path, records)
    scales = [record["preprocessing"]["normalize"] for record in records]
    own = ", each with mean and std of its own" if scales != scales[:1] * len(scales) else ""
    return f"{folder}: the mean of {len(records)} networks{own}"


def open_folds(folder: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()) -> Classifier:
    """The networks of all folds in a budget and on a device, ready to predict as one.

    Each takes images with its own mean and standard deviation, which of ``--mean auto`` are those of its training.

    Args:
        flips: of `gigamorph.engine.datasets.flips.FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: a fold is not finished; their classes or their images differ; they are of masks.
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
        lambda found: images(learnt(found, records), first["channels"], grey),
        count_of(records),
    )


def _outputs(record: Mapping[str, Any]) -> Outputs:
    target = target_of(record)
    return target.outputs or Outputs.of("softmax", len(target.names), target.names)


def _preprocessing(record: Mapping[str, Any]) -> Preprocessing:
    """What a network does to grey values itself; all else is done once for all."""
    scale = record["preprocessing"]["normalize"]
    return Preprocessing(record["channels"], tuple(scale["mean"]), tuple(scale["std"]))


def _learnt(record: Mapping[str, Any]) -> str:
    target = target_of(record)
    of_exams = f" of exams ({target.views} of their views)" if target.views else ""
    return f"{target.kind} {', '.join(record['classes'])}{of_exams}"


def _require_alike(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """That the last of the records, which is a checkpoint's, can be averaged with the first."""
    first, own = records[0], records[-1]
    one = "; name the checkpoint of one fold"
    if "options" not in own:
        raise DataError(f"{path}: is no checkpoint of gigamorph train --folds{one}")
    preprocessing_of(own, path)
    if target_of(own).kind == "masks":
        raise DataError(f"{path}: is a network of masks, which are not averaged over folds{one}")
    if _learnt(own) != _learnt(first):
        raise DataError(f"{path}: learnt {_learnt(own)}, fold 1 {_learnt(first)}; they are not averaged{one}")
    taken, wanted = ({**record["preprocessing"], "channels": record["channels"]} for record in (own, first))
    differs = [name for name in wanted if name != "normalize" and taken.get(name) != wanted[name]]
    if differs:
        raise DataError(f"{path}: takes images with another {differs[0]} than fold 1; they are not averaged{one}")
