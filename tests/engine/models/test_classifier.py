"""What cannot be trained as a classifier is refused before any work, in one line."""

import pytest
import torch
from torch import Tensor, nn

from gigamorph import GigamorphError, UnsupportedError
from gigamorph.engine.models.classifier import check_classifier, record


def network(channels: int = 1, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    )


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.mean((2, 3))}


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 224, f"Input height ({x.shape[2]}) doesn't match model (224).\nMore.")
        return x.mean((2, 3))


REFUSED = {
    r"'net' outputs 1 x 1 for 1 image and 2 classes; .* 1 x 2$": network(outputs=1),
    r"'net' outputs 1 x 3 for 1 image and 2 classes": network(outputs=3),
    r"'net' outputs 1 x 4 x 38 x 28 for": network()[:1],
    r"'net' outputs several tensors or a container": Named(),
    r"take an image of 1 x 40 x 30 .*RuntimeError: Given groups=1.* takes 3 channels.*\(--channels\)$": network(3),
    r"AssertionError: Input height \(40\) doesn't match model.*test_classifier.py:.*size, .*--resize": Sized(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(GigamorphError, match=message) as caught:
        check_classifier(REFUSED[message], "net", (1, 1, 40, 30), 2)
    assert "\n" not in str(caught.value)


def test_a_classifier_passes_and_stays_as_it_was():
    model = network()
    check_classifier(model, "net", (1, 1, 40, 30), 2)
    assert model[1].num_batches_tracked == 0 and model[0].weight.grad is None


def test_our_own_refusals_stay_themselves():
    with pytest.raises(UnsupportedError, match="lazy"):
        record(nn.Sequential(nn.LazyConv2d(2, 3)), "net", (1, 1, 40, 30), "cpu")
