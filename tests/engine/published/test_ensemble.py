"""What an ensemble says of an image is one map: that of the log-odds of the mean of its probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gigamorph import create_model
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.explain.write import METHODS
from gigamorph.engine.published.classifier import open_published
from gigamorph.engine.published.ensemble import mean_log_odds
from gigamorph.engine.published.images import PreparedSource
from gigamorph.engine.published.importing import Wishes, import_ensemble, import_network

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=2, in_channels=1):
        super().__init__()
        convs = nn.Conv2d(in_channels, 6, 5, 2, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        self.features, self.fc = nn.Sequential(*convs), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))
"""
SCALES = {"a": ((0.3,), (0.1,)), "b": ((0.5,), (0.3,))}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with two networks of the same outputs in folders, the second once more for images of half the size."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "mean_nets.py").write_text(CODE)
    # Of 4 m + 1 pixels a side: the cells of a mirrored image lie on those of the image.
    grey = np.random.default_rng(0).integers(0, 255, (97, 65), np.uint8)
    Image.fromarray(grey).save(folder / "image.png")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, (name, (mean, std)) in enumerate(SCALES.items()):
            torch.manual_seed(seed)
            found.append(create_model("mean_nets:Net", 2, 1).eval())
            nn.init.normal_(found[-1].fc.weight, std=8.0)
            torch.save(found[-1].state_dict(), f"{name}.pt")
            wishes = Wishes(f"{name}.pt", preprocessing={"mean": mean, "std": std}, size=(72, 68))
            import_network("mean_nets:Net", name, wishes, str)
        half = {**wishes.preprocessing, "size": (48, 32), "fit": "stretch"}
        import_network("mean_nets:Net", "half", replace(wishes, preprocessing=half), str)
        import_ensemble(["a", "b"], "both", [(True, False)])
        import_ensemble(["a", "half"], "sizes", [])
        yield folder, found


def opened(folder, name):
    found = open_published(folder / name, memory_budget=None, device="cpu")
    return found.net.eval(), found.open_images([Record(folder / "image.png", -1, "p")])[0]["image"]


def seen_by(made, grey):
    """Each network's image of grey values, as it is and mirrored."""
    for network, (mean, std) in zip(made, SCALES.values(), strict=True):
        for mirrored in (False, True):
            seen = (grey - mean[0]) / std[0]
            yield network, seen.flip(3) if mirrored else seen, mirrored


def test_the_gradient_is_that_of_the_mean(networks):
    folder, made = networks
    net, source = opened(folder, "both")
    grey = source.read(0, 97, 0, 65)[None].requires_grad_()
    each = [network(seen).double() for network, seen, _ in seen_by(made, grey)]
    z = mean_log_odds(torch.stack([logits[:, 1] - logits[:, 0] for logits in each]))[0]
    wanted = torch.autograd.grad(z, grey)[0][0].abs().amax(0)
    found, logits, which = METHODS["gradient"](net, source, None)
    assert which == 1 and float(logits[1]) == pytest.approx(float(z.detach()), abs=1e-5) and float(wanted.max()) > 1e-3
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_the_map_is_that_of_the_mean(networks):
    """d log-odds of the mean / d channel x channel of each network's last map, mirrored ones turned back."""
    folder, made = networks
    net, source = opened(folder, "both")
    grey = source.read(0, 97, 0, 65)[None]
    maps, each = [], []
    for network, seen, mirrored in seen_by(made, grey):
        last = network.features(seen)
        logits = network.fc(last.mean((2, 3))).double()
        each.append(logits[:, 1] - logits[:, 0])
        maps.append((last, mirrored))
    z = mean_log_odds(torch.stack(each))[0]
    gradients = torch.autograd.grad(z, [one for one, _ in maps])
    parts = [(by * one).sum(1)[0].detach() for by, (one, _) in zip(gradients, maps, strict=True)]
    wanted = sum(part.flip(1) if mirrored else part for part, (_, mirrored) in zip(parts, maps, strict=True))
    found, _, _ = METHODS["activation"](net, source, None)
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert found.log_odds == pytest.approx(float(z.detach()), abs=1e-5) and found.size == (97, 65)


def test_members_of_other_sizes_add_up_on_the_finest_cells(networks):
    """Evidence that adds up in each network does so in the ensemble, where one sees the image at half its size."""
    net, source = opened(networks[0], "sizes")
    found, log_odds, _ = METHODS["activation"](net, source, 1)
    each = [METHODS["activation"](m.net, PreparedSource(source, m.preprocessing), 1)[0] for m in net.members]
    assert each[0].values.shape != each[1].values.shape and found.values.shape == each[0].values.shape
    p = torch.tensor([one.log_odds for one in each], dtype=torch.float64).sigmoid()
    slopes = p * (1 - p) / (2 * p.mean() * (1 - p.mean()))
    wanted = sum(s * one.values.double().sum() for s, one in zip(slopes, each, strict=True))
    assert float(found.values.double().sum()) == pytest.approx(float(wanted), rel=0.1)
    assert float(log_odds[1]) == pytest.approx(float(p.mean().logit()), abs=1e-4)
