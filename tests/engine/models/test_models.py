import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models import MODELS, create_model, load_weights


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnet_has_torchvisions_names_shapes_and_function(name):
    torchvision_models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = getattr(torchvision_models, name)().double().eval()
    ours = create_model(name, 1000, 3).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 94, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_own_models_take_channels_and_classes_and_train(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, in_channels=2)
    out = model(torch.randn(2, 2, 70, 51))
    assert out.shape == ((2, 3, 70, 51) if name == "unet" else (2, 3))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_width_scales_every_stage():
    from gigamorph.engine.models import resnet50

    assert resnet50(width=16).layer4[0].conv1.weight.shape[0] == 128


def test_lesionnet_ignores_the_grey_level_and_sees_a_pixel_wherever_it_lies():
    torch.manual_seed(0)
    model = create_model("lesionnet", 2, 1).double()
    flat, brighter = torch.zeros(1, 1, 256, 256).double(), torch.ones(1, 1, 256, 256).double()
    inside = model.stem(brighter)[..., 4:-4, 4:-4]
    assert inside.abs().max() < 1e-6  # the weights were made in float32
    here, there = flat.clone(), flat.clone()
    here[..., 96, 96] = there[..., 160, 192] = 1
    assert not torch.allclose(model(here), model(flat))
    torch.testing.assert_close(model(here), model(there), rtol=0, atol=1e-12)


def test_unknown_model_names_the_choices():
    with pytest.raises(GigamorphError, match=r"unknown model 'resnet19'; .*resnet18.*timm:NAME"):
        create_model("resnet19")
    with pytest.raises(GigamorphError, match=r"; gigamorph import run/best\.ckpt --out FOLDER makes a model folder"):
        create_model("run/best.ckpt")  # of `gigamorph plan` and `bench`


@pytest.mark.parametrize("spec", ["", ".", "/", ":", "?width=2"])
def test_a_model_without_a_name_is_unknown(spec):
    with pytest.raises(GigamorphError, match=r"unknown model .*; use one of"):
        create_model(spec)


def test_a_file_for_a_module_is_told(tmp_path, monkeypatch):
    (tmp_path / "my_file_nets.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for spec in ("my_file_nets", "my_file_nets.py"):
        with pytest.raises(
            GigamorphError, match=r"name the function or class in my_file_nets.py too, as in my_file_nets:"
        ):
            create_model(spec)
    with pytest.raises(GigamorphError, match=r"'my_file_nets.py' is a file; use its module, my_file_nets:tiny$"):
        create_model("my_file_nets.py:tiny")
    with pytest.raises(GigamorphError, match=r"'./my_file_nets.py' is a file; use its module, my_file_nets:tiny$"):
        create_model("./my_file_nets.py:tiny")
    with pytest.raises(GigamorphError, match=r"no module '\.nets' in .* or on Python's path"):
        create_model(".nets:tiny")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(
        GigamorphError, match=rf"is a file; use its module, my_file_nets:tiny, in its folder {tmp_path}$"
    ):
        create_model("../my_file_nets.py:tiny")
    with pytest.raises(
        GigamorphError, match=rf"is a file; use its module, my_file_nets:tiny, in its folder {tmp_path}$"
    ):
        create_model(f"{tmp_path}/my_file_nets.py:tiny")


def test_factory_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "def net(num_classes): return torch.nn.Linear(3, num_classes)\n"
        "def broken(): raise ValueError('no such depth')\n"
        "def other(): return 3\n"
        "def sized(width): return torch.nn.Linear(3, width)\n"
        "def passed_on(**kwargs): return torch.nn.Linear(3, kwargs.pop('num_classes'), **kwargs)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert create_model("my_nets:net", 5).out_features == 5
    with pytest.raises(GigamorphError, match=r"my_nets:broken.*no such depth"):
        create_model("my_nets:broken")
    with pytest.raises(GigamorphError, match="returns a int"):
        create_model("my_nets:other")
    assert create_model("my_nets:passed_on", 5).out_features == 5
    for name, message in FACTORIES.items():
        with pytest.raises(GigamorphError, match=message):
            create_model(name)


FACTORIES = {
    "my_nets:absent": r"my_nets:absent.*cannot be imported",
    "my_nets:number": "is a int, not a function or class",
    "my_nets:sized": "argument: 'width'; it is called with num_classes, in_channels if its signature names it",
    "no_such.nets:net": r"no module 'no_such' in \S+ or on Python's path; run this in the folder .* PYTHONPATH",
}


def test_torchvisions_functions_are_factories():
    """They hand keywords on to networks that know no in_channels."""
    pytest.importorskip("torchvision")
    network = create_model("torchvision.models:resnet18", 4, 1)
    assert network.fc.out_features == 4 and network.conv1.in_channels == 3


def test_timm_model_and_its_error():
    pytest.importorskip("timm")
    model = create_model("timm:resnet10t", num_classes=4, in_channels=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 4)
    with pytest.raises(GigamorphError, match="no_such_net"):
        create_model("timm:no_such_net")


def test_missing_timm_says_how_to_install_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(GigamorphError, match="pip install timm, with the torchvision"):
        create_model("timm:resnet10t")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_roundtrip(tmp_path, suffix):
    torch.manual_seed(0)
    model = create_model("lesionnet")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = create_model("lesionnet", weights=path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_only_a_classifier_of_another_shape_is_skipped(tmp_path, caplog):
    model = create_model("resnet18", 5, 1)
    path = tmp_path / "w.pt"
    torch.save(model.state_dict(), path)
    other = create_model("resnet18", 2, 1)
    with caplog.at_level("WARNING", logger="gigamorph"):
        assert load_weights(other, path) == ["fc.weight", "fc.bias"]
    assert "fc.weight, fc.bias" in caplog.text
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    with pytest.raises(DataError, match=r"w\.pt.*conv1\.weight is \(64, 1, 7, 7\), the model has \(64, 3, 7, 7\)$"):
        create_model("resnet18", 5, 3, weights=path)
    state = model.state_dict()
    del state["layer1.0.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(DataError, match=r"missing in the file: layer1\.0\.conv1\.weight"):
        create_model("resnet18", 5, 1, weights=path)


def test_weights_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"none\.pt: no such weights file"):
        create_model("lesionnet", weights=tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(DataError, match=f"{name}: not a readable (weights|safetensors) file"):
            create_model("lesionnet", weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="contains no state_dict"):
        create_model("lesionnet", weights=tmp_path / "list.pt")


def test_weights_are_found_where_trainers_keep_them(tmp_path, caplog):
    model, path = create_model("lesionnet"), tmp_path / "w.pt"
    state = model.state_dict()
    ddp = {f"module.{name}": value for name, value in state.items()}
    for stored in (
        {"model": {"state_dict": ddp}, "epoch": 3},
        {"state_dict": {f"model.{name}": value for name, value in state.items()}},  # a LightningModule's
        {"model": create_model("lesionnet").state_dict(), "model_ema": {**ddp, "n_averaged": torch.tensor(7)}},
    ):
        torch.save(stored, path)
        other = create_model("lesionnet", weights=path)
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert "uses the weights under model_ema, not those under model" in caplog.text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    target = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (target,))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"evil\.pt"):
        create_model("lesionnet", weights=tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_for_colour_see_the_same_in_grey_images(tmp_path, caplog):
    colour, grey = create_model("resnet18", 2, 3).eval(), torch.rand(1, 1, 40, 40)
    torch.save(colour.state_dict(), tmp_path / "colour.pt")
    one = create_model("resnet18", 2, 1, tmp_path / "colour.pt").eval()
    assert "its channels are summed for grey images" in caplog.text
    with torch.no_grad():
        assert torch.allclose(one(grey), colour(grey.expand(1, 3, 40, 40)), atol=1e-5)


def test_what_others_call_a_network_is_told(monkeypatch):
    """And a part that torchvision would fetch by default is left as it is made."""
    pytest.importorskip("timm")
    for spec, message in (
        ("timm:resnt18", r"cannot build 'resnt18': .*; nearest: resnet18, "),
        ("timm/resnet18", r"; for timm's write timm:resnet18$"),
        ("hf-hub:timm/resnet18", r"hf download timm/resnet18 --local-dir FOLDER yourself and pass the folder to"),
    ):
        with pytest.raises(GigamorphError, match=message):
            create_model(spec)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert create_model("torchvision.models.segmentation:lraspp_mobilenet_v3_large", 2) is not None
