"""Checkpoints of known layout: the description of their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..applications import layouts
from ..errors import GigamorphError
from ..models.checkpoints import WeightFile
from ..models.folder import Preprocessing
from ..models.outputs import Outputs
from ..train.checkpoint import preprocessing_of, record_of
from ..train.network import outputs_of_record


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint.

    Attributes:
        name: of its folder, if there are several.
        model: the spec that builds it.
        outputs, preprocessing: those of its authors' code.
        prefix: of its weights.
        key_map: pairs (beginning of their names, of ours).
        ignored: beginnings of names, after the prefix, that it does not use.
        licence: as its authors state it.
        size: of the image for the check.
        training: identifies the images of the training, for `gigamorph.engine.train.record.with_splits`.
    """

    name: str
    model: str
    outputs: Outputs
    preprocessing: Preprocessing
    prefix: str = ""
    key_map: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    licence: str = ""
    size: tuple[int, int] = (256, 192)
    training: Mapping[str, Any] = field(default_factory=dict)


def trained_preprocessing(record: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing in a record of `gigamorph train`, without resizing."""
    given, normalize = record["preprocessing"], record["preprocessing"]["normalize"]
    return Preprocessing(record["channels"], tuple(normalize["mean"]), tuple(normalize["std"]), given["voi"])


def part_of_training(state: WeightFile) -> Part | None:
    """Return the network of a checkpoint of `gigamorph train`; None for others.

    Raises:
        GigamorphError: it has grown, belongs to a recipe, or was trained on images that a folder cannot describe.
    """
    record = record_of(state)
    if record is None:
        return None
    if "options" not in record or "grown" in record:
        what = "has a network that has grown" if "grown" in record else "is a recipe's"
        raise GigamorphError(f"{state.path}: {what}; use the checkpoint itself, it cannot be imported")
    given = preprocessing_of(record, state.path)
    other = [n for n in ("for_processing", "white") if given.get(n)] + ["downsample"] * (given["downsample"] != 1)
    if other:
        raise GigamorphError(f"{state.path}: was trained with {', '.join(other)}, which a folder cannot describe")
    return Part(
        name="trained",
        model=record["options"]["model"],
        outputs=outputs_of_record(record),
        preprocessing=trained_preprocessing(record),
        prefix="net.",
        training={
            "split": record["split"],
            "options": {"seed": record["options"]["seed"]},
            **{name: record[name] for name in ("classes", "target") if name in record},
        },
    )


def parts_of(state: WeightFile, layout: str | None = None) -> tuple[str, Sequence[Part]]:
    """Return the name of a checkpoint's layout, and its networks.

    Raises:
        GigamorphError: its layout is unknown, or not the given one.
    """
    for name, module in layouts().items():
        if layout in (None, name) and module.recognises(state):
            return name, module.parts(state)
    if layout is not None:
        first = ", ".join(list(dict.fromkeys(name.split(".")[0] for name in state.tensors))[:10])
        raise GigamorphError(f"{state.path}: is not in layout {layout}; its names begin with {first}")
    raise GigamorphError(
        f"{state.path}: has none of the known layouts ({', '.join(layouts())}); pass it as --weights of the factory "
        "that builds its network, as in gigamorph import timm:resnet50 --weights FILE"
    )
