"""Opens classifiers of whole images from checkpoints of `gigamorph train` and of recipes, with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..accelerate import accelerate
from ..applications import recipe_of
from ..datasets.dataset import ImageDataset
from ..datasets.flips import FLIPS
from ..datasets.tables import SPLITS, Record
from ..datasets.views import mirrorings
from ..errors import DataError, GigamorphError, UntrustedError
from ..images.pixels import Normalize
from ..models.folder import fold_checkpoints, read_description
from ..models.outputs import Outputs, outputs_of, set_outputs
from ..models.registry import open_checked
from ..models.weights import bounded, first_line
from ..predict.predictor import Classifier
from ..train.checkpoint import REMEDY, load_checkpoint, preprocessing_of
from ..train.inputs import images
from ..train.network import restore_network, target_of
from ..train.record import with_splits
from .ensemble import Ensemble, Member, Published
from .images import published_images
from .layout import trained_preprocessing


def open_published(
    folder: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> Classifier:
    """Open the network of a folder with a budget on a device.

    `trained_on` counts the images in `gigamorph train` trainings, as far as known; the records of the images have the
    split that they were in.

    Args:
        flips: names in `FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: the folder is damaged, or its logits differ from those of its import.
        GigamorphError: the network cannot be built, outputs features instead of predictions, or already averages
            over mirror images.
    """
    folder = Path(folder)
    about = read_description(folder)
    if not about.outputs.predicts:
        raise GigamorphError(
            f"{folder}: its network outputs features, not predictions; run gigamorph train --init {folder}"
        )
    wanted = about.preprocessing
    plain = about.flips == ((False, False),)
    if flips and not plain:
        already = ", ".join(name for name, pair in FLIPS.items() if pair in about.flips)
        raise GigamorphError(f"{folder}: already averages over mirrored images ({already}); remove --flip")
    seen = mirrorings(flips) if flips else about.flips
    paths = [folder / name for name in about.members] or [folder]
    each = [read_description(path) for path in paths]
    trainings = [one.source.get("training", {}) for one in each]
    nets = [accelerate(open_checked(path).to(device), memory_budget, fallback="untiled").eval() for path in paths]
    named = [Published(net, str(path)) for net, path in zip(nets, paths, strict=True)]
    if len(seen) == 1 and not about.members:
        net, prepared = named[0], wanted
    else:
        members = [Member(net, one.preprocessing, one.outputs) for net, one in zip(named, each, strict=True)]
        net, prepared = Ensemble(members, about.outputs, seen), None

    def opened(records: Sequence[Record]) -> ImageDataset:
        return published_images(add_splits(records, trainings), prepared, wanted)

    return Classifier(net, about.outputs.names, opened, image_count(trainings))  # type: ignore[arg-type]


def add_splits(records: Sequence[Record], trainings: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return records with their split in the trainings: train if any of the networks was trained on the image."""
    each = [with_splits(records, training) for training in trainings]
    of_image = ([record.split for record in records] for records in zip(*each, strict=True))
    splits = (next((name for name in SPLITS if name in own), None) for own in of_image)
    return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]


def image_count(trainings: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of images in the largest training."""
    return max(sum(training.get("split", {}).get(name, 0) for name in SPLITS) for training in trainings)


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
        members.append(Member(Published(net, str(path)), trained_preprocessing(records[-1]), _outputs(records[-1])))
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


def open_classifier(
    path: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> Classifier:
    """Open a trained network with a budget on a device.

    The path is a checkpoint, a folder of `gigamorph import` (also an ensemble), or a folder of `gigamorph train
    --folds`, whose networks are averaged. Records of the images have their split of the training, where it is known.

    Args:
        flips: names in `gigamorph.engine.datasets.flips.FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: it is not a checkpoint, or its network does not classify whole images.
        GigamorphError: its predictions cannot be averaged over mirror images.
    """
    if Path(path).is_dir():
        if fold_checkpoints(path):
            return open_folds(path, memory_budget=memory_budget, device=device, flips=flips)
        return open_published(path, memory_budget=memory_budget, device=device, flips=flips)
    found = _open_checkpoint(path, memory_budget, device)
    return _average_mirrored(found, flips) if flips else found


def _average_mirrored(found: Classifier, flips: Sequence[str]) -> Classifier:
    """Average a classifier's predictions over mirror images."""
    outputs = outputs_of(found.net) or Outputs.of("softmax", len(found.classes), tuple(found.classes))
    net = Ensemble([Member(found.net, None, outputs)], outputs, mirrorings(flips))
    return replace(found, net=net)  # type: ignore[arg-type]


def _open_checkpoint(path: str | Path, memory_budget: int | None, device: str) -> Classifier:
    stored = load_checkpoint(path)
    record = stored["gigamorph"]
    if "options" in record:
        if target_of(record).kind == "masks":
            raise DataError(
                f"{path}: predicts masks, not classes of images; gigamorph predict writes its masks, "
                "gigamorph view shows them"
            )
        prepared = preprocessing_of(record, path)
        return Classifier(
            Published(restore_network(stored, path, memory_budget=memory_budget, device=device), str(path)),  # type: ignore[arg-type]
            record["classes"],
            lambda records: images(with_splits(records, record), record["channels"], prepared),
            sum(record["split"].get(name, 0) for name in SPLITS),
        )
    restore = recipe_of(record["recipe"]).restore if "recipe" in record else None
    if restore is None:
        raise DataError(f"{path}: its network does not classify whole images; use the checkpoint of a classifier")
    try:
        with bounded(stored["state_dict"]):
            network, opened = restore(record)
        network.load_state_dict({key.removeprefix("net."): value for key, value in stored["state_dict"].items()})
    except UntrustedError:
        raise
    except Exception as error:  # recipes raise various errors for their keys
        raise DataError(f"{path}: its network cannot be built as recorded ({first_line(error)}); {REMEDY}") from error
    net, outputs = accelerate(network.to(device), memory_budget, fallback="untiled"), target_of(record).outputs
    if outputs is not None:
        set_outputs(net, outputs)
    return Classifier(Published(net, str(path)), record["classes"], opened)  # type: ignore[arg-type]
