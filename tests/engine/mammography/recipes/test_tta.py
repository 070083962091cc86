"""Predictions averaged over mirrored images and over networks."""

import numpy as np
import pytest
import torch

from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.recipes.classify import averaged, mirrorings, predict
from gigamorph.engine.models import create_model


def test_mirrored_predictions_do_not_depend_on_mirroring():
    torch.manual_seed(0)
    net = create_model("resnet18", 2, 1).eval()
    image = torch.rand(1, 48, 64)

    class One:
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {"image": open_pixels(self.x)}

    call = lambda sources: net(torch.stack([s.read(0, 48, 0, 64) for s in sources]))  # noqa: E731
    found = [
        predict(call, One(x), [0], mirrorings("flip")) for x in (image, image.flip(2), image.flip(1), image.flip(1, 2))
    ]
    assert max(np.abs(f - found[0]).max() for f in found) < 1e-5
    with torch.no_grad():
        views = torch.stack([image, image.flip(2), image.flip(1), image.flip(1, 2)])
        p = net(views).double().softmax(1).mean(0).numpy()
    assert found[0][0] == pytest.approx(np.log(p / (1 - p)), abs=1e-5)


def test_ensemble_is_the_mean_probability():
    odds = np.random.default_rng(0).normal(size=(3, 5, 1))
    members = [Cases(("yes",), np.ones((5, 1)), o, ("a",) * 5, ("",) * 5, ("",) * 5, ("",) * 5) for o in odds]
    p = (1 / (1 + np.exp(-odds))).mean(0)
    assert averaged(members).scores == pytest.approx(np.log(p / (1 - p)), abs=1e-12)
