"""The loss of validation images is that of training: with the same weights, of the same truth."""

import numpy as np
import pytest
import torch

from gigamorph.engine.train.classify import Classification
from gigamorph.engine.train.metrics import Prediction
from gigamorph.engine.train.options import Loss
from gigamorph.engine.train.target import Target

LOGITS = np.array([0.3, -0.2, 1.1])


def found_of(target: Target, truth: np.ndarray) -> Prediction:
    log_odds = target.log_odds(torch.from_numpy(LOGITS[None, : target.columns]))[0]
    exclusive = target.kind != "labels"
    return Prediction(
        image="1.png",
        log_odds=tuple(log_odds.tolist()),
        exclusive=exclusive,
        truth=None if exclusive else tuple(truth.tolist()),
        label=int(truth.argmax()) if exclusive else None,
        patient="p",
        laterality="",
        view="",
        exam="",
        split="val",
    )


@pytest.mark.parametrize("weights", [None, (3.0, 2.0, 0.5)])
@pytest.mark.parametrize(
    ("kind", "truth"),
    [("classes", [0.0, 1, 0]), ("ordinal", [0.0, 1, 0]), ("labels", [1.0, 0, np.nan]), ("labels", [0.0, np.nan, 1])],
)
def test_the_loss_of_a_validation_image_is_weighted_as_in_training(kind, truth, weights):
    target, wanted = Target(("a", "b", "c"), kind), np.array(truth)
    task = object.__new__(Classification)
    task.target, task.weights = target, weights
    logits = torch.from_numpy(LOGITS[None, : target.columns])
    expected = target.losses(logits, wanted[None], Loss(), weights)
    assert task.loss_of(found_of(target, wanted)) == pytest.approx(expected.item(), rel=1e-6)
