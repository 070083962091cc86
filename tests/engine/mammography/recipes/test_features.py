"""Frozen features: equal to the network's, under keys that change with what they depend on, resumable."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.recipes import features
from gigamorph.engine.mammography.recipes.features import UpTo, fingerprint, frozen_features, image_digest
from gigamorph.engine.mammography.recipes.sized import Size, read_sized


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.unused = nn.Identity()
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x):
        x = self.body(x)
        self.calls += 1  # reached only where nothing stops before
        return self.head(x.mean((2, 3)))


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for index, shape in enumerate([(40, 30), (33, 47), (40, 30)]):
        path = tmp_path / f"{index}.npy"
        np.save(path, rng.integers(0, 65535, shape, dtype=np.uint16))
        records.append(Record(path, index % 2, f"P{index}"))
    return ImageDataset(records)


def test_up_to_stops_at_the_layer():
    net = Net().eval()
    x = torch.randn(2, 1, 9, 8)
    assert torch.equal(UpTo(net, "body")(x), net.body(x)) and net.calls == 0
    assert torch.equal(UpTo(net, "body.0")(x), net.body[0](x))
    assert torch.equal(UpTo(net, "")(x), net(x))
    assert net.calls == 2  # by itself the network goes on
    assert torch.equal(copy.deepcopy(UpTo(net, "body"))(x), net.body(x)) and net.calls == 2
    with pytest.raises(GigamorphError, match="unknown layer 'tail'; the network's modules are body, unused, head"):
        UpTo(net, "tail")
    with pytest.raises(GigamorphError, match="'unused' is not used"):
        UpTo(net, "unused")(x)


@pytest.mark.parametrize("size", [Size(), Size((16, 12)), Size((20,), 16)], ids=["native", "exact", "cropped"])
@pytest.mark.parametrize("layer", ["body", ""])
def test_features_are_those_of_the_network(images, tmp_path, size, layer):
    net = UpTo(Net(), layer)
    found = frozen_features(net, images, tmp_path / "cache", size=size, batch_size=2)
    assert net.training  # as it was
    net.eval()
    for feature, item in zip(found, images, strict=True):
        with torch.no_grad():
            want = net(read_sized(item["image"], size)[None])[0]
        torch.testing.assert_close(torch.from_numpy(feature), want, rtol=1e-5, atol=1e-5)


def test_what_is_there_is_not_computed_again(images, tmp_path, monkeypatch):
    net = UpTo(Net(), "body")
    first = frozen_features(net, images, tmp_path / "cache", size=Size((16, 16)))
    monkeypatch.setattr(features, "read_sized", None)
    again = frozen_features(net, images, tmp_path / "cache", size=Size((16, 16)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first.take([2, 0]), [again[2], again[0]], strict=True))


def test_goes_on_after_a_kill(images, tmp_path, monkeypatch):
    whole = list(frozen_features(Net(), images, tmp_path / "whole", size=Size((16, 16)), batch_size=1))
    calls = []

    def killed(source, size):
        calls.append(source.name)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return read_sized(source, size)

    monkeypatch.setattr(features, "read_sized", killed)
    with pytest.raises(RuntimeError, match="killed"):
        frozen_features(Net(), images, tmp_path / "cache", size=Size((16, 16)), batch_size=1)
    resumed = frozen_features(Net(), images, tmp_path / "cache", size=Size((16, 16)), batch_size=1)
    assert len(calls) == 4  # the third image alone was computed again
    assert all(np.array_equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".npy"]


def test_key_changes_with_weights_settings_and_image(images, tmp_path):
    def keys(net=None, data=images, **settings):
        found = frozen_features(net or Net(), data, tmp_path / "cache", **{"size": Size((16, 16)), **settings})
        return [path.name for path in found._paths]

    base = keys()
    assert keys() == base and len(set(base)) == 3
    other = Net()
    other.body[1].running_mean[0] += 1e-7  # a buffer, by the last bits
    changed = [
        keys(other),
        keys(Net(seed=1)),
        keys(size=Size((16, 15))),
        keys(size=Size((16,), 8)),
        keys(data=ImageDataset(images.records, normalize=Normalize((0.5,), (0.2,)))),
        keys(data=ImageDataset(images.records, voi="minmax")),
    ]
    assert all(not set(base) & set(names) for names in changed)
    # What the table says of how a file is to be read.
    for own in ({"white": 65535}, {"chest_wall": "right"}, {"laterality": "R"}, {"frame": 0}):
        told = [replace(images.records[0], **own), *images.records[1:]]
        assert [a == b for a, b in zip(base, keys(data=ImageDataset(told)), strict=True)] == [False, True, True]
    np.save(images.records[1].path, np.zeros((33, 47), np.uint16))
    assert [a == b for a, b in zip(base, keys(), strict=True)] == [True, False, True]


def test_fingerprint_sees_layers_that_have_no_weights():
    assert fingerprint(nn.MaxPool2d(2)) != fingerprint(nn.AvgPool2d(2))
    assert fingerprint(Net()) == fingerprint(Net()) != fingerprint(Net().double())


def test_a_folder_of_zarr_has_a_digest(tmp_path):
    folder = tmp_path / "a.zarr"
    (folder / "c").mkdir(parents=True)
    (folder / "c" / "0").write_bytes(b"one")
    before = image_digest(folder)
    (folder / "c" / "1").write_bytes(b"two")
    assert image_digest(folder) != before
    with pytest.raises(DataError, match="cannot be read"):
        image_digest(tmp_path / "none.npy")


def test_features_that_are_not_finite_are_refused_and_not_kept(images, tmp_path):
    net = Net()
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(GigamorphError, match="not finite"):
        frozen_features(net, images, tmp_path / "cache", size=Size((16, 16)))
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_large_images_are_averaged_before_they_are_resized():
    image = np.random.default_rng(1).random((64, 48), np.float32)
    source = open_pixels(image)
    exact = read_sized(source, Size((16, 12)))
    want = torch.from_numpy(image)[None].unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
    torch.testing.assert_close(exact, want, rtol=1e-5, atol=1e-6)
    assert read_sized(source, Size((12,))).shape == (1, 16, 12)
    assert torch.equal(read_sized(source, Size(crop=10)), torch.from_numpy(image)[None, 27:37, 19:29])
    with pytest.raises(GigamorphError, match="smaller than crop = 100"):
        read_sized(source, Size((60,), 100))
    with pytest.raises(GigamorphError, match="resize"):
        Size((1, 2, 3))
