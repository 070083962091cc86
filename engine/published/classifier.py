"""Opens classifiers of whole images from checkpoints of `gigamorph train` and of recipes, with their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..accelerate import Accelerated, accelerate
from ..applications import recipe_of
from ..datasets.tables import SPLITS, Record
from ..datasets.views import mirrorings
from ..errors import DataError, UntrustedError
from ..models.bounded import bounded
from ..models.folds import fold_checkpoints
from ..models.outputs import Outputs, outputs_of, set_outputs
from ..models.weights import first_line
from ..predict.predictor import Classifier
from ..train.checkpoint import REMEDY, load_checkpoint, preprocessing_of
from ..train.data import Images
from ..train.inputs import images
from ..train.network import restore_network, target_of
from ..train.record import with_splits
from .ensemble import Ensemble, Member, Published
from .folds import open_folds
from .open import open_published


def open_classifier(
    path: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> tuple[Accelerated, list[str], Callable[[Sequence[Record]], Images]]:
    """Open a trained network with a budget on a device; return it, its classes, and an opener of images.

    The path is a checkpoint, a folder of `gigamorph import` (also an ensemble), or a folder of `gigamorph train
    --folds`, whose networks are averaged. Records of the images have their split of the training, where it is known.


    Args:
        flips: names in `gigamorph.engine.datasets.flips.FLIPS`; predictions are averaged over these mirror images too.

    Raises:
        DataError: it is not a checkpoint, or its network does not classify whole images.
        GigamorphError: its predictions cannot be averaged over mirror images.
    """
    found = open_predictor(path, memory_budget=memory_budget, device=device, flips=flips)
    return found.net, found.classes, found.open_images


def open_predictor(
    path: str | Path, *, memory_budget: int | None, device: str, flips: Sequence[str] = ()
) -> Classifier:
    """Open a trained network for `gigamorph.engine.predict`; see `open_classifier`."""
    if Path(path).is_dir():
        if fold_checkpoints(path):
            return open_folds(path, memory_budget=memory_budget, device=device, flips=flips)
        return Classifier(*open_published(path, memory_budget=memory_budget, device=device, flips=flips))  # type: ignore[arg-type]
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
