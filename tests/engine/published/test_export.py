"""Networks for timm and ONNX Runtime: they give the logits of ordinary PyTorch, or nothing is written."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from gigamorph import create_model
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.folder import Description, Preprocessing, read_description
from gigamorph.engine.models.outputs import Outputs
from gigamorph.engine.published.export import ExportSource, export_hub, export_onnx, open_source
from gigamorph.engine.published.importing import Wishes, import_network

timm = pytest.importorskip("timm")
without_maximum = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="its torch.onnx has no adaptive_max_pool2d"
)


class Off(nn.Module):
    def forward(self, x):
        return x + 2.5e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of timm with padding that depends on the image's size, one sigmoid, and statistics that are not 0."""
    here = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=1, in_chans=1, global_pool="max")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), here / "w.pt")
    wanted = {"mean": (0.4,), "std": (0.2,), "size": (96, 80)}
    wishes = Wishes(str(here / "w.pt"), preprocessing=wanted, licence="mit", size=(96, 80))
    import_network("timm:test_efficientnet?in_chans=1&global_pool=max", here / "net", wishes, str)
    return here / "net"


def test_timm_loads_what_is_exported_and_import_takes_it_back(folder, tmp_path):
    assert export_hub(open_source(folder), tmp_path / "hub") <= 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    image = torch.rand(2, 1, 111, 90)
    with torch.no_grad():
        assert torch.equal(theirs(image), create_model(str(folder)).eval()(image))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.4] and config["pretrained_cfg"]["license"] == "mit"
    import_network(str(tmp_path / "hub"), tmp_path / "back", Wishes(size=(96, 80)), str)
    before, after = read_description(folder), read_description(tmp_path / "back")
    assert (after.outputs, after.preprocessing, after.licence) == (before.outputs, before.preprocessing, "mit")


@pytest.mark.usefixtures("untiled_imports")
def test_a_hugging_face_folder_of_others_is_read(tmp_path):
    """As timm's own repositories have it: no description of ours."""
    network = timm.create_model("test_convnext", num_classes=3, in_chans=3)
    timm.models.save_for_hf(network, tmp_path / "theirs", model_config={"label_names": ["a", "b", "c"]})
    (tmp_path / "theirs" / "README.md").write_text("---\ntags:\n- timm\nlicense: 'mit'\n---\nlicense: none\n")
    import_network(str(tmp_path / "theirs"), tmp_path / "net", Wishes(size=(96, 64)), str)
    found = read_description(tmp_path / "net")
    assert found.model.startswith("timm:test_convnext?") and found.preprocessing.channels == 3
    assert found.preprocessing.mean == tuple(network.pretrained_cfg["mean"])
    assert found.outputs.names == ["a", "b", "c"]
    assert found.licence == "mit"  # config.json has that of timm's own weights, apache-2.0
    # As timm wrote it once, and what it takes where nothing is said.
    path = tmp_path / "theirs" / "config.json"
    new = json.loads(path.read_text())
    about = {**new["pretrained_cfg"], "mean": [0.4, 0.5, 0.6]}
    cases = (
        ({"architecture": "test_convnext", "labels": ["x", "y", "z"], **about}, (0.4, 0.5, 0.6), ["x", "y", "z"]),
        (
            {"architecture": "test_convnext", "label_names": {"0": "x", "1": "y", "2": "z"}},
            (0.485, 0.456, 0.406),
            ["x", "y", "z"],
        ),
        ({**new, "label_names": ["x", "y", "z"]}, tuple(network.pretrained_cfg["mean"]), ["x", "y", "z"]),
    )
    for number, (config, mean, names) in enumerate(cases):
        path.write_text(json.dumps(config))
        import_network(str(path.parent), tmp_path / f"net{number}", Wishes(size=(96, 64)), str)
        found = read_description(tmp_path / f"net{number}")
        assert (found.preprocessing.mean, found.outputs.names) == (mean, names)
    for part in ({"pretrained_cfg": [1]}, {"model_args": "x"}, {"pretrained_cfg": {"mean": "0.5"}}):
        path.write_text(json.dumps({**new, **part}))
        with pytest.raises(DataError, match=r"config.json: is not in timm's format: \w+Error: .*") as caught:
            import_network(str(path.parent), tmp_path / "none", Wishes(size=(96, 64)), str)
        assert "\n" not in str(caught.value)


@without_maximum
def test_onnx_runtime_gives_the_logits_at_any_size(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    assert export_onnx(open_source(folder), path) <= 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = create_model(str(folder)).eval()
    for shape in ((1, 1, 96, 80), (3, 1, 111, 133)):
        image = torch.rand(shape)
        (given,) = session.run(["logits"], {"image": image.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(given, network(image).numpy(), rtol=0, atol=1e-5)
    (about,) = [p.value for p in onnx.load(str(path)).metadata_props if p.key == "gigamorph"]
    assert json.loads(about)["input"]["mean"] == [0.4]
    with pytest.raises(GigamorphError, match="already exists"):
        export_onnx(open_source(folder), path)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224?img_size=64", "flexivit_small?img_size=64"])
@pytest.mark.usefixtures("untiled_imports")
def test_a_network_of_one_size_is_written_for_the_size_that_its_images_are_brought_to(tmp_path, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = f"timm:{model}&depth=1&embed_dim=24&num_heads=2"
    torch.save(create_model(model, 3, 3).state_dict(), tmp_path / "w.pt")
    for name, taken in (("every", None), ("fixed", {"size": (64, 64)})):
        import_network(model, tmp_path / name, Wishes(str(tmp_path / "w.pt"), preprocessing=taken, size=(64, 64)), str)
    with pytest.raises(GigamorphError, match=r"every: its network .* use --size HxW, as in --size 64x64$") as caught:
        export_onnx(open_source(tmp_path / "every"), tmp_path / "no.onnx")
    assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["every", "fixed", "w.pt"]
    sizes = {"every": (64, 64), "fixed": None}
    for name, size in sizes.items() if model.startswith("timm:vit") else [("fixed", None)]:
        assert export_onnx(open_source(tmp_path / name), tmp_path / f"{name}.onnx", size) <= 1e-5
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == [1, 3, 64, 64]


def test_what_onnx_runtime_cannot_run_is_told_in_one_line(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fails(*_, **__):
        raise RuntimeError("Got invalid dimensions\n index: 2")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    model = "lesionnet?stages=1"
    description = Description(model, Outputs.of("softmax", 2), Preprocessing(1), reference={"image": [1, 1, 64, 96]})
    source = ExportSource(tmp_path, create_model(model, 2, 1).eval(), description)
    with pytest.raises(GigamorphError, match=r"ONNX Runtime cannot run .*: RuntimeError: Got .*; try --size"):
        export_onnx(source, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_what_others_compute_otherwise_is_refused(folder, tmp_path, monkeypatch):
    source, plain = open_source(folder), create_model(str(folder))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Sequential(plain, Off()))
    with pytest.raises(GigamorphError, match=r"logits by timm differ by 2.\de-05 .* nothing was written"):
        export_hub(source, tmp_path / "hub")
    assert os.listdir(tmp_path) == []


def test_our_resnets_are_timms(tmp_path):
    torch.manual_seed(0)
    network = create_model("resnet18", 2, 1).eval()
    taken = Preprocessing(1, (0.3,), (0.1,))
    description = Description("resnet18", Outputs.of("softmax", 2), taken, reference={"image": [1, 1, 64, 96]})
    assert export_hub(ExportSource(tmp_path, network, description), tmp_path / "hub") <= 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    image = torch.rand(1, 1, 70, 66)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), network(image), rtol=0, atol=1e-5)


def test_networks_that_timm_has_not_are_refused_for_it(tmp_path):
    torch.save(create_model("lesionnet", 2, 1).state_dict(), tmp_path / "w.pt")
    import_network("lesionnet", tmp_path / "net", Wishes(str(tmp_path / "w.pt"), size=(64, 64)), str)
    with pytest.raises(GigamorphError, match=r"'lesionnet'.* is not one of timm's; export it with --to onnx"):
        export_hub(open_source(tmp_path / "net"), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
