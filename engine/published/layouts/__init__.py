"""Checkpoints as others have published them, one file each: recognised by their names, and what to make of them."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import GigamorphError
from ...models.checkpoints import State
from . import gmic, mammo_clip, mammoscreen, rsna_2023
from .layout import Part

LAYOUTS = {"mammoscreen": mammoscreen, "rsna-2023": rsna_2023, "mammo-clip": mammo_clip, "gmic": gmic}


def parts_of(state: State, layout: str | None = None) -> tuple[str, Sequence[Part]]:
    """The name of a checkpoint's layout and its networks.

    Raises:
        GigamorphError: its layout is not known, or is not the one that was named.
    """
    for name, module in LAYOUTS.items():
        if layout in (None, name) and module.recognises(state):
            return name, module.parts(state)
    if layout is not None:
        raise GigamorphError(f"{state.path}: does not have the names of {layout}; its own begin with {_first(state)}")
    raise GigamorphError(
        f"{state.path}: is of none of the known layouts ({', '.join(LAYOUTS)}); name what builds its network and give "
        "it as --weights, as in gigamorph import timm:resnet50 --weights FILE"
    )


def _first(state: State) -> str:
    found = list(dict.fromkeys(name.split(".")[0] for name in state.tensors))
    return ", ".join(found[:10])
