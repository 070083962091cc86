"""What a layout says of a network in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import GigamorphError
from ...models.checkpoints import State
from ...models.folder import Preprocessing
from ...models.outputs import Outputs
from ...train.network import outputs_of_record
from ...train.stored import preprocessing_of, record_of


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint.

    Attributes:
        name: of its folder, where there are several.
        model: the spec that builds it.
        outputs, preprocessing: as its authors' code has them.
        prefix: of its weights.
        key_map: pairs (beginning of their names, of ours).
        ignored: beginnings of names, after the prefix, that are of no use to it.
        licence: as its authors state it.
        size: of an image to check it by.
        training: by which `gigamorph.engine.train.splits.with_splits` knows the images of the training.
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


def trained(state: State) -> Part | None:
    """The network of a checkpoint of `gigamorph train`; None for others.

    Raises:
        GigamorphError: it has grown, is a recipe's, or was trained on images that a folder cannot describe.
    """
    record = record_of(state)
    if record is None:
        return None
    if "options" not in record or "grown" in record:
        what = "has a network that has grown" if "grown" in record else "is a recipe's"
        raise GigamorphError(f"{state.path}: {what}, which is used as it is and not imported")
    given = preprocessing_of(record, state.path)
    other = [n for n in ("for_processing", "white") if given.get(n)] + ["downsample"] * (given["downsample"] != 1)
    if other:
        raise GigamorphError(f"{state.path}: was trained with {', '.join(other)}, which a folder cannot say")
    normalize = given["normalize"]
    return Part(
        name="trained",
        model=record["options"]["model"],
        outputs=outputs_of_record(record),
        preprocessing=Preprocessing(
            record["channels"], tuple(normalize["mean"]), tuple(normalize["std"]), given["voi"]
        ),
        prefix="net.",
        training={
            "split": record["split"],
            "options": {"seed": record["options"]["seed"]},
            **{name: record[name] for name in ("classes", "target") if name in record},
        },
    )
