"""Checkpoints in the forms in which others publish them."""

import json
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from published_networks import imported, network
from safetensors.torch import save_file

from gigamorph import create_model
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.checkpoints import read_state
from gigamorph.engine.models.folder import read_description
from gigamorph.engine.models.registry import load_weights


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_a_child_called_module_is_no_wrapper(here, wrapper):
    (here / "wrapping_nets.py").write_text(
        "import published_nets\nfrom torch import nn\n"
        "class Outer(nn.Module):\n"
        "    def __init__(self, num_classes=2, in_channels=1):\n"
        "        super().__init__()\n"
        "        self.module = published_nets.Net(num_classes, in_channels)\n"
        "    def forward(self, x):\n"
        "        return self.module(x)\n"
    )
    made = create_model("wrapping_nets:Outer", 3).eval()
    state = {wrapper + name: value for name, value in made.state_dict().items()}
    torch.save(state, here / "w.pt")
    image = torch.rand(1, 1, 60, 50)
    for name, source, prefix in (("a", "wrapping_nets:Outer", ""), ("b", "published_nets:Net", "module")):
        again = create_model(str(imported(here, name, source, prefix=prefix))).eval()
        with torch.no_grad():
            assert torch.equal(again(image), made(image))


@pytest.mark.parametrize("place", ["model_ema", "ema.shadow"])
def test_averaged_weights_are_taken_and_told(here, place):
    made = network()
    average = torch.optim.swa_utils.AveragedModel(network(seed=1))
    first, _, second = place.partition(".")
    averaged = {"decay": 0.99, second: average.state_dict()} if second else average.state_dict()
    torch.save({"model": made.state_dict(), first: averaged}, here / "w.pt")
    said = []
    folder = imported(here, quiet=said)
    assert said == [f"w.pt: uses the weights under {place}, not those under model"]
    assert read_description(folder).source["place"] == place
    torch.save(
        {"model": made.state_dict(), "smooth": average.state_dict(), "loss": {"a": torch.ones(1)}}, here / "w.pt"
    )
    imported(here, "unknown", quiet=said)
    assert said[1:] == ["w.pt: uses the weights under model, not those under smooth"]
    torch.save({"model": made.state_dict(), first: averaged}, here / "w.pt")
    plain = imported(here, "plain", prefix="model")
    image = torch.rand(1, 1, 60, 50)
    with torch.no_grad():
        assert torch.equal(create_model(str(folder)).eval()(image), network(seed=1)(image))
        assert torch.equal(create_model(str(plain)).eval()(image), made(image))


def test_files_of_an_index_are_one_and_each_is_hashed(here):
    made = network()
    state, hub = made.state_dict(), here / "hub"
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    hub.mkdir()
    files = {name: f"model-0000{1 + (name > 'f')}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, hub / file)
    index = hub / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    image = torch.rand(1, 1, 60, 50)
    for name, weights in (("a", hub), ("b", index)):
        folder = imported(here, name, weights=str(weights))
        with torch.no_grad():
            assert torch.equal(create_model(str(folder)).eval()(image), made(image))
        assert sorted(read_description(folder).source["shards_sha256"]) == sorted(set(files.values()))
    index.write_text(json.dumps({"weight_map": {**files, "gone.weight": files["fc.weight"]}}))
    with pytest.raises(DataError, match=r"index.json: its files do not contain gone.weight; download them again"):
        imported(here, "c", weights=str(hub))
    (hub / files["fc.weight"]).unlink()
    with pytest.raises(DataError, match=r"model-0000.-of-00002.safetensors: no such weights file"):
        imported(here, "c", weights=str(hub))
    index.write_text("{}")
    with pytest.raises(DataError, match=r"index.json: not a readable index of weights: KeyError: 'weight_map'"):
        imported(here, "c", weights=str(hub))


def test_what_is_no_tensor_in_a_state_dict_is_left_out_or_refused(here):
    """A module's get_extra_state may give anything; a network that keeps such a thing is not its tensors alone."""
    (here / "extra_nets.py").write_text(
        "import published_nets\n"
        "class Extra(published_nets.Net):\n"
        "    calls = None\n"
        "    def get_extra_state(self):\n"
        "        return self.calls\n"
        "    def set_extra_state(self, state):\n"
        "        self.calls = state\n"
        "class Counting(Extra):\n"
        "    calls = {'calls': 3}\n"
    )
    made = network()
    torch.save(
        {"state_dict": {**made.state_dict(), "_extra_state": {"calls": 3}, "fc._extra_state": None}}, here / "w.pt"
    )
    said, image = [], torch.rand(1, 1, 60, 50)
    for name, source in (("a", "published_nets:Net"), ("b", "extra_nets:Extra")):
        again = create_model(str(imported(here, name, source, quiet=said))).eval()
        with torch.no_grad():
            assert torch.equal(again(image), made(image))
    assert said == ["w.pt: ignores values that are not tensors: _extra_state, fc._extra_state"] * 2
    with pytest.raises(GigamorphError, match=r"^Counting: stores a dict as _extra_state in .* get_extra"):
        imported(here, "c", "extra_nets:Counting")


def test_a_prefix_that_would_fit_is_named(here):
    state = {f"model.net.{name}": value for name, value in network().state_dict().items()}
    torch.save({**state, "loss.weight": torch.zeros(3)}, here / "w.pt")
    with pytest.raises(
        DataError, match=r"after 'model.net', and others \(loss.weight\); select .* --prefix model.net$"
    ):
        imported(here)
    assert read_description(imported(here, prefix="model.net")).key_map == ()


def test_channels_of_a_network_that_begins_with_a_depthwise_convolution(here):
    (here / "depthwise_nets.py").write_text(
        "import published_nets\nfrom torch import nn\n"
        "class First(nn.Module):\n"
        "    def __init__(self, num_classes=2, in_channels=1):\n"
        "        super().__init__()\n"
        "        self.first = nn.Conv2d(in_channels, in_channels, 3, groups=in_channels)\n"
        "        self.second, self.fc = nn.Conv2d(in_channels, 4, 1), nn.Linear(4, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.second(self.first(x)).mean((2, 3)))\n"
        "class Grouped(First):\n"
        "    def __init__(self, num_classes=2, in_channels=1):\n"
        "        super().__init__(num_classes, in_channels)\n"
        "        self.first = nn.Conv2d(in_channels, 3, 3, groups=3)\n"
    )
    for name, source, channels in (("a", "First", 3), ("b", "First", 1), ("c", "Grouped", 3)):
        torch.save(create_model(f"depthwise_nets:{source}", 2, channels).state_dict(), here / "w.pt")
        found = read_description(imported(here, name, f"depthwise_nets:{source}"))
        assert found.preprocessing.channels == channels


@pytest.mark.parametrize(
    "fetch",
    ["torch.hub.load_state_dict_from_url('https://x.invalid/none.pth')", "huggingface_hub.hf_hub_download('x/y', 'z')"],
)
def test_a_network_that_would_fetch_its_own_weights_fetches_nothing(here, monkeypatch, fetch):
    monkeypatch.delitem(sys.modules, "fetching_nets", raising=False)
    (here / "fetching_nets.py").write_text(f"import huggingface_hub, torch\ndef net(num_classes=2):\n    {fetch}\n")
    torch.save(network().state_dict(), here / "w.pt")
    with pytest.raises(
        GigamorphError, match=r"'fetching_nets:net' cannot be built: .*(is not allowed here|downloads nothing)"
    ):
        imported(here, source="fetching_nets:net")


def arrays_of(network, order="<"):
    """Its weights as NumPy has them: of either byte order, in either order of axes, with a scalar among them."""
    arrays = {name: value.numpy() for name, value in network.state_dict().items()}
    swapped = {name: np.asfortranarray(value.astype(value.dtype.newbyteorder(order))) for name, value in arrays.items()}
    return {**swapped, "norm.num_batches_tracked": np.int64(3)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_of_numpy_are_weights(here, zipped, order):
    made = network()
    beside = {"epoch": np.int64(7), "best": np.float32(0.9), "name": np.str_("fold"), "done": np.bool_(True)}
    saved = {"state_dict": arrays_of(made, order), **beside, "history": [np.float64(0.25), np.arange(3)]}
    torch.save(saved, here / "w.pt", _use_new_zipfile_serialization=zipped)
    image = torch.rand(1, 1, 60, 50)
    again = create_model(str(imported(here))).eval()
    start = create_model("published_nets:Net", 3).eval()
    load_weights(start, here / "w.pt")
    with torch.no_grad():
        assert torch.equal(again(image), made(image))
        assert torch.equal(start(image), made(image))
    rest = read_state(here / "w.pt").rest
    assert {name: rest[name] for name in beside} == {"epoch": 7, "best": np.float32(0.9), "name": "fold", "done": True}
    assert rest["history"][0] == 0.25 and rest["history"][1].tolist() == [0, 1, 2]


def test_numbers_of_numpy_stand_beside_tensors(here):
    made = network()
    torch.save({**made.state_dict(), "epoch.best": np.float64(0.5)}, here / "w.pt")
    said = []
    imported(here, quiet=said)
    assert said == ["w.pt: ignores values that are not tensors: epoch.best"]


class Runs:
    """An object whose unpickling would leave a file."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_arrays_of_objects_stay_refused(here):
    state = {**network().state_dict(), "fc.bias": np.array([1, None, Runs()], object)}
    torch.save(state, here / "w.pt")
    torch.save({"model": np.array([Runs()], object)}, here / "model.pt")
    for name in ("w.pt", "model.pt"):
        with pytest.raises(
            DataError, match=rf"{name}: holds a pickled module or other objects, and opening it executes"
        ):
            read_state(here / name)
    torch.save({"state_dict": network().state_dict(), "names": np.array(["a", None], object)}, here / "beside.pt")
    assert read_state(here / "beside.pt").place == "state_dict"
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    "state",
    [
        (1, (9,), np.dtype("f8"), False, b"short"),  # more than the bytes hold
        (1, (-1,), np.dtype("f8"), False, b""),
        (1, ("a",), np.dtype("f8"), False, b""),
        (1, (1,), np.dtype("O"), False, b"\0" * 8),  # an address
    ],
)
def test_damaged_arrays_are_refused(here, state):
    class Damaged:
        def __reduce__(self):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct, (np.ndarray, (0,), b"b"), state

    torch.save({"fc.weight": Damaged()}, here / "w.pt")
    with pytest.raises(DataError, match=r"w.pt: (not a readable weights file|holds a pickled module or other objects)"):
        read_state(here / "w.pt")


class _Runs:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_of_another_protocol_is_refused_in_one_line(tmp_path, capsys):
    """PyTorch warns of what it then refuses."""
    (tmp_path / "module.pkl").write_bytes(pickle.dumps({"state_dict": {}, "other": _Runs()}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="holds a pickled module or other objects"):
            read_state(tmp_path / "module.pkl")
    assert "it ran" not in capsys.readouterr().out
