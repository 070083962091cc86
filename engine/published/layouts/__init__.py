"""Layouts of published checkpoints, one file each: how to recognise them, and the networks in them."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import GigamorphError
from ...models.checkpoints import State
from . import gmic, mammo_clip, mammoscreen, rsna_2023
from .layout import Part

LAYOUTS = {"mammoscreen": mammoscreen, "rsna-2023": rsna_2023, "mammo-clip": mammo_clip, "gmic": gmic}


def parts_of(state: State, layout: str | None = None) -> tuple[str, Sequence[Part]]:
    """Return the name of a checkpoint's layout, and its networks.

    Raises:
        GigamorphError: its layout is unknown, or not the given one.
    """
    for name, module in LAYOUTS.items():
        if layout in (None, name) and module.recognises(state):
            return name, module.parts(state)
    if layout is not None:
        raise GigamorphError(f"{state.path}: is not in layout {layout}; its names begin with {_first_names(state)}")
    raise GigamorphError(
        f"{state.path}: has none of the known layouts ({', '.join(LAYOUTS)}); pass it as --weights of the factory "
        "that builds its network, as in gigamorph import timm:resnet50 --weights FILE"
    )


def _first_names(state: State) -> str:
    found = list(dict.fromkeys(name.split(".")[0] for name in state.tensors))
    return ", ".join(found[:10])
