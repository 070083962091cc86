"""h5 files of Keras: the same function as Keras' own, in float64; what does not fit is refused in one line."""

import builtins
import hashlib

import h5py
import keras_layout as keras
import numpy as np
import pytest
import torch
from torch import nn

from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.recipes.end2end.network import features
from gigamorph.engine.mammography.recipes.keras import read_keras
from gigamorph.engine.mammography.recipes.weights import PUBLISHED, find_weights, keras_weights, load_pretrained
from gigamorph.engine.models import create_model

OLD, NEW = "resnet50_v1?eps=0.001&pool_padding=0", "resnet50_v1"
RESNET = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"


def colours(height=70, width=90):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3))


def as_ours(rgb):
    """The same image as recipes see it: (x - mean) / std of values from 0 to 1, red, green, blue."""
    normalize = Normalize(keras_weights("").mean, keras_weights("").std)
    mean, std = (torch.tensor(own, dtype=torch.float64)[:, None, None] for own in (normalize.mean, normalize.std))
    return ((torch.from_numpy(rgb).permute(2, 0, 1).double() / 255 - mean) / std)[None]


def error(ours, theirs):
    theirs = theirs.permute(0, 3, 1, 2)
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("new", "form", "spec", "padding"),
    [
        (False, "keras1", OLD, 0),  # as of the published file of fchollet, in Keras 2.0
        (False, "model", OLD, 0),  # a checkpoint of end2end's patch network
        (False, "nested", OLD, 0),  # of its whole-image network
        (False, "keras2", "resnet50_v1?eps=0.001", 1),  # Keras 2.2
        (True, "keras2", NEW, 1),
    ],
)
def test_resnet50_computes_what_keras_computes(new, form, spec, padding, tmp_path):
    layers = keras.resnet50(8, new, classes=5)
    top = {
        "conv2d_1": {"kernel": np.zeros((1, 1, 256, 4), np.float32)},
        "dense_2": layers["probs" if new else "fc1000"],
    }
    path = keras.write(tmp_path / "w.h5", layers, form, top)
    # The file's numbers are float32, as are our network's; what folds biases into means rounds once.
    maps = features(f"{spec}{'&' if '?' in spec else '?'}width=8", 3, path).double().eval()
    with torch.no_grad():
        theirs = keras.resnet50_maps(layers, keras.preprocessed(colours()), new, padding)
        assert error(maps(as_ours(colours())), theirs) < 1e-6
        conv1 = maps.get_submodule("layer2.0.conv1")
        conv1.stride, maps.get_submodule("layer2.0.conv2").stride = (1, 1), (2, 2)
        assert error(maps(as_ours(colours())), theirs) > 0.01  # torchvision's place of the stride is another function


def test_without_rounding_the_function_is_exactly_that_of_keras(tmp_path):
    """Biases in the running means, in float64 from the start; also with the statistics of the batch."""
    layers = keras.resnet50(4, True)
    network = create_model("resnet50_v1?width=4", 2, 3).double().eval()
    doubled = {name: {k: v.astype(np.float64) for k, v in arrays.items()} for name, arrays in layers.items()}
    load_pretrained(network, keras.write(tmp_path / "w.h5", doubled))
    network.fc = network.avgpool = nn.Identity()
    with torch.no_grad():
        theirs = keras.resnet50_maps(layers, keras.preprocessed(colours()), True, 1)
        ours = network(as_ours(colours())).reshape(1, -1, *theirs.shape[1:3])
        assert error(ours, theirs) < 1e-13
        x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
        block, conv = network.layer1[1].train(), layers["conv2_block2_1_conv"]
        shifted = block.conv1(x) + torch.from_numpy(conv["bias"])[:, None, None]
        torch.testing.assert_close(block.bn1(shifted), block.bn1(block.conv1(x)), rtol=1e-12, atol=1e-12)


def test_vgg16_computes_what_keras_computes(tmp_path):
    pytest.importorskip("timm")
    layers = keras.vgg()
    maps = features("timm:vgg16", 3, keras.write(tmp_path / "w.h5", layers)).double().eval()
    with torch.no_grad():
        theirs = keras.vgg_maps(layers, keras.preprocessed(colours(40, 50)))
        assert error(maps(as_ours(colours(40, 50))), theirs) < 1e-12


class SmallVgg(nn.Module):
    """VGG's modules by the names of timm, or of torchvision."""

    def __init__(self, timm: bool, depths=keras.VGG16) -> None:
        super().__init__()
        widths, layers, inputs = (4, 4, 4, 6, 6), [], 3
        for width, depth in zip(widths, depths, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if timm:
            self.pre_logits = nn.Sequential()
            self.pre_logits.fc1, self.pre_logits.fc2 = nn.Conv2d(6, 20, 7), nn.Conv2d(20, 10, 1)
            self.head = nn.Sequential()
            self.head.fc = nn.Linear(10, 3)
        else:
            parts = nn.Linear(294, 20), nn.ReLU(), nn.Identity(), nn.Linear(20, 10), nn.ReLU(), nn.Identity()
            self.classifier = nn.Sequential(*parts, nn.Linear(10, 3))

    def forward(self, x):
        x = self.features(x)
        if hasattr(self, "classifier"):
            return self.classifier(x.flatten(1))
        return self.head.fc(self.pre_logits.fc2(self.pre_logits.fc1(x).relu()).relu().flatten(1))


@pytest.mark.parametrize(("timm", "depths"), [(True, keras.VGG16), (False, keras.VGG16), (True, keras.VGG19)])
def test_dense_layers_of_vgg(timm, depths, tmp_path):
    layers = keras.vgg((4, 4, 4, 6, 6), (20, 10, 3), depths)
    network = SmallVgg(timm, depths).double()
    assert load_pretrained(network, keras.write(tmp_path / "w.h5", layers)) == []
    x = keras.vgg_maps(layers, keras.preprocessed(colours(224, 224)), depths).flatten(1)
    for name in ("fc1", "fc2", "predictions"):
        kernel, bias = (torch.from_numpy(layers[name][part]).double() for part in ("kernel", "bias"))
        x = x @ kernel + bias
        x = x if name == "predictions" else x.relu()
    with torch.no_grad():
        torch.testing.assert_close(network(as_ours(colours(224, 224))), x, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("new", "spec", "told"),
    [
        (True, "resnet50", "stride in the first convolution of a block.* use the network resnet50_v1$"),
        (False, "resnet50", r"stride in the first convolution of a block.* use the network resnet50_v1\?eps=0.001$"),
        (True, OLD, r"eps 1.001e-05, the network's 0.001; use the network resnet50_v1$"),
        (False, NEW, r"eps 0.001, the network's 1.001e-05; use the network resnet50_v1\?eps=0.001$"),
    ],
)
def test_a_network_of_another_function_is_refused(new, spec, told, tmp_path):
    path = keras.write(tmp_path / "w.h5", keras.resnet50(4, new))
    network = create_model(f"{spec}{'&' if '?' in spec else '?'}width=4", 2, 3)
    with pytest.raises(DataError, match=told) as caught:
        load_pretrained(network, path)
    assert "\n" not in str(caught.value)


def test_timms_resnet_is_refused_for_its_stride(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(DataError, match="stride in the first convolution of a block"):
        features("timm:resnet50", 3, keras.write(tmp_path / "w.h5", keras.resnet50(4, True)))


def test_at_most_ten_names_are_told(tmp_path):
    network = create_model("resnet50_v1?width=4", 2, 3)
    layers = keras.resnet50(4, True)
    few = {name: arrays for name, arrays in layers.items() if not name.startswith("conv4")}
    few["separable_conv"] = {"kernel": np.zeros((3, 3, 1, 1), np.float32)}
    with pytest.raises(DataError, match=r"layer3.0.conv1.weight is missing; .* \(and \d+ more\)$") as caught:
        load_pretrained(network, keras.write(tmp_path / "few.h5", few))
    assert str(caught.value).count("is missing") == 10
    only = {**layers, "separable_conv": few["separable_conv"]}
    with pytest.raises(DataError, match=r"network: separable_conv.weight is not in the network$"):
        load_pretrained(network, keras.write(tmp_path / "more.h5", only))
    wide = create_model("resnet50_v1?width=6", 2, 3)
    with pytest.raises(DataError, match=r"conv1.weight is \(4, 3, 7, 7\), the network has \(6, 3, 7, 7\); "):
        load_pretrained(wide, keras.write(tmp_path / "w.h5", layers))


def test_files_that_are_no_weights_of_keras(tmp_path):
    network = create_model("resnet50_v1?width=4", 2, 3)

    def refused(name, told):
        with pytest.raises(DataError, match=told) as caught:
            load_pretrained(network, tmp_path / name)
        assert "\n" not in str(caught.value)

    refused("none.h5", "no such weights file")
    (tmp_path / "text.h5").write_text("something else")
    refused("text.h5", "not a readable h5 file")
    with h5py.File(tmp_path / "keras3.h5", "w") as file:
        file["layers/conv1_conv/vars/0"] = np.zeros(3)
    refused("keras3.h5", "has no layer_names; write it with model.save_weights")
    path = keras.write(tmp_path / "theano.h5", keras.resnet50(4, False))
    with h5py.File(path, "a") as file:
        file.attrs["backend"] = b"theano"
    refused("theano.h5", "Keras on Theano")
    keras.write(tmp_path / "odd.h5", {"lstm": {"recurrent_kernel_of_mine": np.zeros(2)}})
    refused("odd.h5", "weight 'lstm/recurrent_kernel_of_mine:0' of layer 'lstm' does not occur in")
    with h5py.File(path, "a") as file:
        file.attrs["backend"] = b"tensorflow"
        del file["res2a_branch2a"]
    refused("theano.h5", "not a readable h5 file")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    path = keras.write(tmp_path / "w.h5", keras.vgg((4,) * 5))
    importing = builtins.__import__

    def without(name, *args):
        if name == "h5py":
            raise ImportError(name)
        return importing(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GigamorphError, match=r"h5 files need h5py; pip install 'gigamorph\[keras\]'$"):
        load_pretrained(SmallVgg(True), path)


# ------------------------------------------------------------------------------------------------ inputs and provenance


def test_the_normalisation_is_bound_to_the_file(tmp_path, monkeypatch):
    """From 0 to 255 less the mean, for files that are known and for others of Keras' layout."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    path = keras.write(tmp_path / "mine.h5", keras.vgg((4,) * 5))
    mean, std = keras_weights("").mean, keras_weights("").std
    assert mean == pytest.approx((123.68 / 255, 116.779 / 255, 103.939 / 255)) and std == (1 / 255,) * 3
    assert find_weights("mine.h5", mean, std).name == path.name
    assert find_weights("mine.h5", (52.18 / 255,), (1 / 255,)).name == path.name  # end2end's own
    for others in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((103.939, 116.779, 123.68), (1.0,) * 3)):
        with pytest.raises(GigamorphError, match=r"make inputs .* that mine\.h5, SHA-256 .* was trained on"):
            find_weights("mine.h5", *others)
    with pytest.raises(GigamorphError, match=r"download it from https://.*/resnet/resnet50_weights_.*v0.2/resnet50"):
        find_weights(RESNET, mean, std)
    fetched = tmp_path / "keras" / "models" / RESNET
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"MD5 begins with .{8}, not with 4d473c1d.* or a268eb85.* as that of https"):
        find_weights(RESNET, mean, std)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, RESNET, keras_weights("there", digest))
    assert find_weights(RESNET, mean, std) == fetched


def test_weights_of_an_account_without_a_home(tmp_path, monkeypatch):
    """As in a container whose user has no entry."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "KERAS_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GigamorphError, match="no such file; use another"):
        find_weights("mine.h5", (0.0,), (1.0,))


@pytest.mark.parametrize("how", ["external", "link", "virtual"])
def test_values_of_other_files_are_not_read(how, tmp_path):
    """A dataset of HDF5 may be the bytes of any file of the disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(16))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(2)
    path = keras.write(tmp_path / "w.h5", {"conv": {"bias": np.zeros(2)}})
    with h5py.File(path, "a") as file:
        name = str(file["conv"].attrs["weight_names"][0], "ascii")
        group = file["conv"]
        del group[name]
        if how == "external":
            group.create_dataset(name, (2,), "f8", external=[(str(secret), 0, 16)])
        elif how == "link":
            group[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        else:
            layout = h5py.VirtualLayout((2,), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (2,))
            group.create_virtual_dataset(name, layout)
    with pytest.raises(DataError, match=r"w\.h5: weight 'conv/bias:0' is in another file; save all weights in one"):
        read_keras(path)
