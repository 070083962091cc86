"""What a layout says of a network in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.folder import Preprocessing
from ...models.outputs import Outputs


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
