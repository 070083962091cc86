"""SimCLR and BYOL beside their equations, and beside lightly where it is installed; what patches can start from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes.siamese.config import SiameseConfig
from gigamorph.engine.mammography.recipes.siamese.network import Embedding
from gigamorph.engine.mammography.recipes.siamese.patches import cropped, jittered, mirrored
from gigamorph.engine.mammography.recipes.siamese.starts import (
    BYOLTask,
    SimCLRTask,
    byol_loss,
    make_network,
    nt_xent,
    self_supervised,
    tau_at,
    update_target,
)
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.train.run import Run

SMALL = SiameseConfig(patch=8, dim=4, hidden=16, epochs=3, batch_size=8, lr=1e-2)
TASKS = {"simclr": SimCLRTask, "byol": BYOLTask}


def embedding(seed=0):
    torch.manual_seed(seed)
    return Embedding(nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()), "", 4, 1, 8)


def pairs(count=20, seed=0):
    return torch.randn(count, 2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def numbers(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# ------------------------------------------------------------------------------------------------------------ losses


def test_distances_and_losses_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    embedding = Embedding(nn.Conv2d(1, 6, 3, 2), "", 4, 1, 8)
    x = torch.randn(8, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        features, found = embedding.features(x), embedding(x)
        a, b = torch.randn(2, 5, 4).bfloat16()
        losses = nt_xent(a, b), byol_loss(a, b)
    wanted = F.normalize(embedding.project(features.float()), dim=1)
    assert features.dtype == torch.bfloat16 and torch.equal(found, wanted)
    for loss, whole in zip(losses, (nt_xent(a.double(), b.double()), byol_loss(a.double(), b.double())), strict=True):
        assert loss.dtype == torch.float32 and abs(float(loss) - float(whole)) < 1e-6


@given(st.integers(1, 9), st.integers(1, 6), st.floats(0.05, 5), st.integers(0, 99))
def test_nt_xent_is_its_equation(n, dim, temperature, seed):
    views = np.stack([numbers(seed, n, dim).numpy(), numbers(seed + 100, n, dim).numpy()], 1).reshape(2 * n, dim)

    def s(i, j):
        return views[i] @ views[j] / math.sqrt(views[i] @ views[i]) / math.sqrt(views[j] @ views[j])

    def term(i, j):  # as the paper counts: views 2k - 1 and 2k are of one patch
        others = [math.exp(s(i, k) / temperature) for k in range(2 * n) if k != i]
        return -math.log(math.exp(s(i, j) / temperature) / sum(others))

    wanted = sum(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)
    found = nt_xent(torch.from_numpy(views[::2].copy()), torch.from_numpy(views[1::2].copy()), temperature)
    assert float(found) == pytest.approx(wanted, rel=1e-11, abs=1e-11)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_byol_loss_is_its_equation(n, dim, seed):
    p, z = numbers(seed, n, dim).requires_grad_(), numbers(seed + 100, n, dim).requires_grad_()
    unit = [v.detach().numpy() / np.linalg.norm(v.detach().numpy(), axis=1, keepdims=True) for v in (p, z)]
    assert float(byol_loss(p, z).detach()) == pytest.approx(
        ((unit[0] - unit[1]) ** 2).sum(1).mean(), rel=1e-11, abs=1e-11
    )
    byol_loss(p, z).backward()
    assert z.grad is None and p.grad is not None


def test_gradients_of_the_losses():
    a, b = (numbers(seed, 4, 3).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (a, b))
    assert torch.autograd.gradcheck(lambda a: byol_loss(a, b.detach()), (a,))


def test_losses_and_momentum_are_those_of_lightly():
    make_torchvision_importable()
    loss = pytest.importorskip("lightly.loss")
    from lightly.models.utils import update_momentum

    a, b = numbers(0, 7, 5), numbers(1, 7, 5)
    for temperature in (0.1, 0.5):
        torch.testing.assert_close(nt_xent(a, b, temperature), loss.NTXentLoss(temperature)(a, b), rtol=1e-12, atol=0)
    torch.testing.assert_close(byol_loss(a, b), 2 + 2 * loss.NegativeCosineSimilarity()(a, b), rtol=1e-12, atol=1e-12)
    online, ours, theirs = (nn.Linear(3, 2).double() for _ in range(3))
    theirs.load_state_dict(ours.state_dict())
    update_target(ours, online, 0.9)
    update_momentum(online, theirs, 0.9)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- BYOL's two networks


def test_target_follows_parameters_and_keeps_its_own_statistics():
    online, target = (nn.BatchNorm1d(3).double() for _ in range(2))
    nn.init.normal_(online.weight)
    online.running_mean.fill_(5)
    before = target.weight.detach().clone()
    update_target(target, online, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * online.weight, rtol=1e-15, atol=0)
    assert not target.running_mean.any()
    found = [tau_at(step, 10, 0.9) for step in range(11)]
    assert found[0] == pytest.approx(0.9, abs=1e-15) and found[10] == 1 and found == sorted(found)
    assert found[5] == pytest.approx(0.95, abs=1e-15)


def test_target_is_the_mean_of_former_online_networks():
    task = BYOLTask(embedding(), pairs(), SMALL)
    torch.manual_seed(0)
    weight = task.projected.head[0].weight
    wanted = weight.detach().clone()
    learning = [p for name, p in task.module.named_parameters() if name.startswith(task.trainable)]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    assert task.steps == 9
    for step in range(4):
        task.loss(range(16 * (step % 2), 16 * (step % 2) + 16)).backward()
        if step:
            tau = tau_at(step - 1, 9, SMALL.momentum)
            wanted = tau * wanted + (1 - tau) * weight.detach()
        torch.testing.assert_close(task.target.head[0].weight, wanted, rtol=1e-6, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in task.target.parameters())
    assert not torch.equal(wanted, weight)


# ------------------------------------------------------------------------------------------------------------- views


def test_crops_are_squares_within_the_patch_and_resized_to_it():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    places = torch.stack([x, y]).expand(200, -1, -1, -1)
    assert torch.allclose(cropped(places, 1.0), places, atol=1e-5)
    torch.manual_seed(0)
    found = cropped(places, 0.25)
    # A ramp stays a ramp: its slope tells the side of the square, and it is the same in both directions.
    inner = found[:, :, 4:12, 4:12]
    slopes = torch.stack([inner[:, 0].diff(dim=2).mean((1, 2)), inner[:, 1].diff(dim=1).mean((1, 2))])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)
    assert 0.5 - 1e-4 <= slopes.min() < 0.55 and 0.95 < slopes.max() <= 1 + 1e-4
    assert found.min() >= 0 and found.max() <= 15
    assert found[:, 0].mean((1, 2)).std() > 0.5  # not all from the same place


def test_views_are_of_the_same_patches_and_all_different():
    x = torch.randn(3, 1, 8, 8)
    assert all(
        any(torch.equal(m, v) for v in (o, o.flip(1), o.flip(2), o.flip(1, 2)))
        for m, o in zip(mirrored(x), x, strict=True)
    )
    assert torch.equal(jittered(x, 0.0, 0.0), x)
    task = SimCLRTask(embedding(), pairs(), SMALL)
    patches = task.patches([0, 1, 7])
    assert torch.equal(patches, torch.stack([pairs()[0, 0], pairs()[0, 1], pairs()[3, 1]]))
    plain = SimCLRTask(embedding(), pairs(), SiameseConfig(patch=8, dim=4, crop=1.0, jitter=0.0, noise=0.0))
    for view, patch in zip(plain.views([0, 1, 7]), patches.repeat(2, 1, 1, 1), strict=True):
        assert min((view - patch.flip(axes)).abs().max() for axes in ((), 1, 2, (1, 2))) < 1e-4
    views = task.views([0, 1, 7])
    assert len({view.numpy().tobytes() for view in views}) == 6


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", TASKS)
def test_two_views_come_closer_than_patches_of_others(name, tmp_path):
    config = SiameseConfig(patch=8, dim=4, hidden=16, epochs=20, batch_size=8, lr=1e-2, noise=0.5)
    x = (torch.linspace(-3, 3, 40).reshape(20, 2, 1, 1, 1) + pairs() * 0.1).float()

    def spread(network):
        """Distance of two views of a patch, as a share of that of views of different patches."""
        torch.manual_seed(5)
        with torch.no_grad():
            first, second = network.eval().features(SimCLRTask(network, x, config).views(range(40))).chunk(2)
        d = torch.cdist(first, second)
        return float(d.diagonal().mean() / d.mean())

    learnt = embedding()
    before = spread(learnt)
    assert self_supervised(name, learnt, x, config, Run(tmp_path / name, seed=1)) is learnt
    assert spread(learnt) < 0.9 * before
    rows = [line.split(",") for line in (tmp_path / name / "log.csv").read_text().splitlines()[1:]]
    assert len(rows) == 20 and float(rows[-1][2]) < float(rows[0][2])


@pytest.mark.parametrize("name", TASKS)
def test_collapse_ends_the_training(name, tmp_path):
    task = TASKS[name](embedding(), pairs(), SMALL)
    task.module.eval()
    task.begin_epoch(0)
    assert task.check_collapse() > 1e-3
    with torch.no_grad():
        task.projected.head[-1].weight.zero_()
        task.projected.head[-1].bias.fill_(1)
    with pytest.raises(GigamorphError, match="projections have collapsed"):
        task.begin_epoch(1)


@pytest.mark.parametrize("name", TASKS)
def test_last_batch_of_one_patch_is_learnt_from(name):
    task = TASKS[name](embedding(), pairs(), SMALL)
    assert torch.isfinite(task.loss([3]))


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_of_timm_are_asked_for(monkeypatch, tmp_path):
    make_torchvision_importable()
    timm = pytest.importorskip("timm")
    config = SiameseConfig(model="timm:resnet18", weights="timm", patch=32)
    asked = []
    build = timm.create_model

    def published(name, *, pretrained=False, **given):
        asked.append((name, pretrained, given))
        if not pretrained:
            return build(name, **given)
        network = build(name, **given)
        nn.init.constant_(network.conv1.weight, 0.5)
        return network

    monkeypatch.setattr(timm, "create_model", published)
    found = make_network(config, Run(tmp_path), 0)
    assert asked[-1] == ("resnet18", True, {"num_classes": 2, "in_chans": 1})
    assert (found.maps.network.conv1.weight == 0.5).all()
    scratch = make_network(config, Run(tmp_path), 8, weights=False)
    assert not (scratch.maps.network.conv1.weight == 0.5).all()


def test_weights_that_are_not_there_are_told_in_one_line(monkeypatch, tmp_path):
    with pytest.raises(GigamorphError, match='starts contains "weights"'):
        SiameseConfig(starts=("weights",))
    with pytest.raises(GigamorphError, match="must not contain duplicates"):
        SiameseConfig(starts=("byol", "byol"))
    with pytest.raises(GigamorphError, match="0 < crop <= 1"):
        SiameseConfig(crop=0.0)
    with pytest.raises(GigamorphError, match='needs model = "timm:NAME'):
        make_network(SiameseConfig(weights="timm"), Run(tmp_path), 0)
    make_torchvision_importable()
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("resnet18", "test_byobnet"):
        with pytest.raises(GigamorphError, match=rf"timm cannot provide weights of '{name}'") as caught:
            make_network(SiameseConfig(model=f"timm:{name}", weights="timm", patch=32), Run(tmp_path), 0)
        assert "\n" not in str(caught.value)
