"""The loss of validation images: with the weights of training, of the same truth, not smoothed and not focal."""

import numpy as np
import pytest
import torch
from masks import write_table

from gigamorph import accelerate
from gigamorph.engine.models.unet import UNet
from gigamorph.engine.train.classify import Classification
from gigamorph.engine.train.inputs import Labels, training_data
from gigamorph.engine.train.mask_target import Segmentation
from gigamorph.engine.train.metrics import Prediction
from gigamorph.engine.train.options import Loss
from gigamorph.engine.train.target import Target

SMOOTHED = Loss(label_smoothing=0.2, focal=2.0)
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
    task.target, task.weights, task.settings = target, weights, SMOOTHED
    logits = torch.from_numpy(LOGITS[None, : target.columns])
    expected = target.losses(logits, wanted[None], Loss(), weights)
    assert task.loss_of(found_of(target, wanted)) == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_of_a_validation_mask_likewise(tmp_path):
    data = training_data(write_table(tmp_path), labels=Labels("masks"))
    net = accelerate(UNet(3, 1, 3, 2).eval())
    task, plain = (
        Segmentation(net, data.train, data.val, {}, data.target, settings, weights=(3.0, 2.0, 0.5))
        for settings in (SMOOTHED, Loss())
    )
    with torch.no_grad():
        assert task.loss_of(task.find(data.val[0])) == task.loss_of(plain.find(data.val[0]))
        assert not torch.equal(task.loss([data.val[0]]), plain.loss([data.val[0]]))
