"""Classifiers of whole images in checkpoints, of `gigamorph train` and of recipes, and the images that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..accelerate import Accelerated, accelerate
from ..datasets.tables import SPLITS, Record
from ..datasets.views import mirrorings
from ..errors import DataError, UntrustedError
from ..models.bounded import bounded
from ..models.folds import fold_checkpoints
from ..models.outputs import Outputs, outputs_of, set_outputs
from ..models.weights import first_line
from ..predict.predictor import Classifier
from ..published.ensemble import Ensemble, Member, Published
from ..published.folds import open_folds
from ..published.open import open_published
from ..train.checkpoint import load_checkpoint
from ..train.data import Images
from ..train.inputs import images
from ..train.network import restore_network, target_of
from ..train.splits import with_splits
from ..train.stored import REMEDY, preprocessing_of
from . import get_recipe


def open_classifier(
    path: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> tuple[Accelerated, list[str], Callable[[Sequence[Record]], Images]]:
    """The trained network of a checkpoint in a budget and on a device, its classes, and what opens images for it.

    Of a folder of `gigamorph import` likewise, or the ensemble in it; of one of `gigamorph train --folds` the
    mean of its networks.

    The images' records say which split of the training they were in, where that is known.

    Args:
        flips: of `gigamorph.engine.datasets.flips.FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: if it is no checkpoint, or what was trained classifies no whole images.
        GigamorphError: predictions of it cannot be averaged over mirror images.
    """
    found = open_predictor(path, memory_budget=memory_budget, device=device, flips=flips)
    return found.net, found.classes, found.open_images


def open_predictor(
    path: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> Classifier:
    """The same for `gigamorph.engine.predict`."""
    if Path(path).is_dir():
        if fold_checkpoints(path):
            return open_folds(path, memory_budget=memory_budget, device=device, flips=flips)
        return Classifier(*open_published(path, memory_budget=memory_budget, device=device, flips=flips))  # type: ignore[arg-type]
    found = _of_checkpoint(path, memory_budget, device)
    return _mirrored(found, flips) if flips else found


def _mirrored(found: Classifier, flips: Sequence[str]) -> Classifier:
    """The same, averaged over mirror images."""
    outputs = outputs_of(found.net) or Outputs.of("softmax", len(found.classes), tuple(found.classes))
    net = Ensemble([Member(found.net, None, outputs)], outputs, mirrorings(flips))
    return replace(found, net=net)  # type: ignore[arg-type]


def _of_checkpoint(path: str | Path, memory_budget: int | None, device: str) -> Classifier:
    stored = load_checkpoint(path)
    record = stored["gigamorph"]
    if "options" in record:
        if target_of(record).kind == "masks":
            raise DataError(
                f"{path}: is a network of masks, which tells no classes of images; gigamorph predict writes its masks, "
                "gigamorph view shows them"
            )
        prepared = preprocessing_of(record, path)
        return Classifier(
            Published(restore_network(stored, path, memory_budget=memory_budget, device=device), str(path)),  # type: ignore[arg-type]
            record["classes"],
            lambda records: images(with_splits(records, record), record["channels"], prepared),
            sum(record["split"].get(name, 0) for name in SPLITS),
        )
    restore = get_recipe(record["recipe"]).restore if "recipe" in record else None
    if restore is None:
        raise DataError(f"{path}: what was trained here is no classifier of whole images; name a checkpoint of one")
    try:
        with bounded(stored["state_dict"]):
            network, opened = restore(record)
        network.load_state_dict({key.removeprefix("net."): value for key, value in stored["state_dict"].items()})
    except UntrustedError:
        raise
    except Exception as error:  # each recipe reads its own keys
        raise DataError(f"{path}: its network cannot be built as recorded ({first_line(error)}); {REMEDY}") from error
    net, outputs = accelerate(network.to(device), memory_budget, fallback="whole"), target_of(record).outputs
    if outputs is not None:
        set_outputs(net, outputs)
    return Classifier(Published(net, str(path)), record["classes"], opened)  # type: ignore[arg-type]
