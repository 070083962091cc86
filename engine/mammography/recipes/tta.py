"""Averaged predictions: over mirrored images (test-time augmentation) and over networks (ensembles)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...datasets.augment import Augment
from ...datasets.flips import FLIPS
from ...datasets.views import MirroredSource
from ...evaluate import odds
from ...evaluate.cases import Array, Cases
from ...train.data import Images

PLAIN = ((False, False),)


def mirrorings(augment: str) -> tuple[tuple[bool, bool], ...]:
    """Return the flips that an augmentation draws in training, including none; averaging over others would not be
    valid."""
    left_right, up_down = FLIPS.get(Augment.parse(augment).flip, (False, False))
    return *PLAIN, *((across, down) for across, down in FLIPS.values() if across <= left_right and down <= up_down)


def predict(
    net: Callable[[Any], Any],
    images: Images,
    numbers: Sequence[int],
    flips: Sequence[tuple[bool, bool]] = PLAIN,
    *,
    labels: bool = False,
    batch: int = 1,
) -> Array:
    """Return log-odds (images, outputs) of each output's mean probability over mirrored images.

    Args:
        net: a list of pixel sources -> logits (images, outputs); in evaluation mode.
        numbers: numbers of the images to predict.
        labels: outputs are labels with a sigmoid each; otherwise classes with a softmax.
        batch: number of images per step.
    """
    found = []
    with torch.no_grad():
        for first in range(0, len(numbers), batch):
            sources = [images[i]["image"] for i in numbers[first : first + batch]]
            seen = []
            for left_right, up_down in flips:
                mirrored = left_right or up_down
                views = [MirroredSource(s, left_right=left_right, up_down=up_down) if mirrored else s for s in sources]
                seen.append(net(views).double().cpu().numpy())
            logits = np.stack(seen)
            found.append(odds.mean(logits if labels else odds.of_logits(logits)))
    return np.concatenate(found) if found else np.empty((0, 0))


def averaged(members: Sequence[Cases]) -> Cases:
    """Return the ensemble of networks that predicted the same images: the mean of their probabilities."""
    return replace(members[0], scores=odds.mean(np.stack([member.scores for member in members])))
