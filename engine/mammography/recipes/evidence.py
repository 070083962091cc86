"""Evidence maps of a recipe's classifier on some test images, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...datasets.tables import Record
from ...errors import GigamorphError
from ...images.pixels import as_stored
from ...models.outputs import set_outputs
from ...train.data import Images
from ...train.explanation import caption, explain_class, log_odds_of
from ...train.heatmap import overlay_name, write_overlay
from ...train.run import Run
from ...train.target import Target

SHOWN = 4


def select_examples(records: Sequence[Record], target: Target, count: int = SHOWN) -> list[tuple[int, int]]:
    """Return the numbers of at most ``count`` evenly spread images, each with the class or label to show.

    The choice depends only on the truth, so that several networks are shown on the same images: those of the last
    class, or with labels those that have one.
    """
    truth = np.nan_to_num(target.truth(records))
    if target.kind != "labels":
        truth[:, :-1] = 0
    positive = [(number, int(row.argmax())) for number, row in enumerate(truth) if row.any()]
    return (
        [positive[n] for n in sorted({round(n) for n in np.linspace(0, len(positive) - 1, count)})] if positive else []
    )


def draw_evidence(net: Any, images: Images, target: Target, run: Run) -> list[str]:
    """Write ``evidence/NUMBER.png`` into the run's folder, drawn over the stored images; a collective of the group.

    Args:
        net: accelerated, in evaluation mode.
        images: images of the test split.

    Returns:
        A line for each picture, or the reason why there is none.
    """
    wanted, group, lines = select_examples(images.records, target), run.group, []
    if target.outputs is not None:
        set_outputs(net, target.outputs)
    for position in range(group.turn, len(wanted), group.at_once):
        number, which = wanted[position]
        try:
            with torch.no_grad():
                found, logits, _ = explain_class(net, images[number]["image"], which)
        except GigamorphError as error:
            lines.append(f"no evidence map: {error}")
            continue
        text = caption(target.names[which], float(log_odds_of(logits[None].double(), which, target.outputs)[0]))
        name = f"evidence/{overlay_name(str(position + 1), as_stored(found.source).shape)}"
        if group.speaks:
            (run.out / "evidence").mkdir(parents=True, exist_ok=True)
            write_overlay(found, run.out / name, stored=True, caption=text)
        lines.append(f"{name}: {text}")
    return list(dict.fromkeys(group.in_order(lines))) or ["no map: the test split has no image to show"]
