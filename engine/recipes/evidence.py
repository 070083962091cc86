"""Pictures of what a recipe's classifier goes by, on some test images: the visual results of its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..datasets.tables import Record
from ..errors import GigamorphError
from ..images.pixels import as_stored
from ..models.outputs import set_outputs
from ..train.data import Images
from ..train.explanation import caption, explain_class, log_odds_of
from ..train.heatmap import overlay_name, write_overlay
from ..train.run import Run
from ..train.target import Target

SHOWN = 4


def chosen(records: Sequence[Record], target: Target, count: int = SHOWN) -> list[tuple[int, int]]:
    """Numbers of images and of the class or label that is shown on each, at most ``count``, spread over the images.

    They are chosen by the truth alone, so that several networks are shown on the same: images of the last class that
    there is, and of labels those that have one.
    """
    truth = np.nan_to_num(target.truth(records))
    if target.kind != "labels":
        truth[:, :-1] = 0
    positive = [(number, int(row.argmax())) for number, row in enumerate(truth) if row.any()]
    return (
        [positive[n] for n in sorted({round(n) for n in np.linspace(0, len(positive) - 1, count)})] if positive else []
    )


def draw_evidence(net: Any, images: Images, target: Target, run: Run) -> list[str]:
    """Write ``evidence/NUMBER.png`` into the run's folder, over the files as stored; a collective of the process group.

    Args:
        net: accelerated, in evaluation mode.
        images: of the test split.

    Returns:
        A line for each picture, or why there are none.
    """
    wanted, group, lines = chosen(images.records, target), run.group, []
    writes = group.leads if group.at_once == 1 else group.rank % group.together == 0
    if target.outputs is not None:
        set_outputs(net, target.outputs)
    for place in range(group.turn, len(wanted), group.at_once):
        number, which = wanted[place]
        try:
            with torch.no_grad():
                found, logits, _ = explain_class(net, images[number]["image"], which)
        except GigamorphError as error:
            lines.append(f"no map of what the network goes by: {error}")
            continue
        told = caption(target.names[which], float(log_odds_of(logits[None].double(), which, target.outputs)[0]))
        name = f"evidence/{overlay_name(str(place + 1), as_stored(found.source).shape)}"
        if writes:
            (run.out / "evidence").mkdir(parents=True, exist_ok=True)
            write_overlay(found, run.out / name, stored=True, caption=told)
        lines.append(f"{name}: {told}")
    return list(dict.fromkeys(group.in_order(lines))) or ["no map: the test split has no image to show"]
