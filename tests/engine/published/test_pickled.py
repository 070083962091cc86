"""Pickled modules: opened only if trusted, in a process of their own, for the one that is meant."""

import sys

import pytest
import torch
from published_networks import imported, network
from safetensors.torch import load_file
from torch import nn

from gigamorph import create_model
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.folder import read_description
from gigamorph.engine.models.reference import Reference
from gigamorph.engine.published import pickled
from gigamorph.engine.published.importing import Wishes, import_network
from gigamorph.engine.published.pickled import dump


@pytest.fixture
def in_this_process(monkeypatch):
    """Pickles open here, which has imported torch; the first test is of the process of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(pickled, "_run_child", lambda path, folder, prefix: dump(str(path), str(folder), prefix))


def test_a_pickled_module_opens_in_a_process_of_its_own_and_only_if_trusted(here):
    made = network()
    torch.save(made, here / "w.pt")
    with pytest.raises(DataError, match="--trust"):
        imported(here)
    opens_as(made, "published_nets.Net", here, "w")


def opens_as(made, kind, here, name):
    said = []
    folder = imported(here, name, weights=str(here / f"{name}.pt"), trust=True, quiet=said)
    assert said == [f"{name}.pt: a pickled {kind}, opened in a separate process"]
    image = Reference.read(folder).image
    with torch.no_grad():
        assert torch.equal(create_model(str(folder)).eval()(image), made(image))


def test_torchscript_opens_if_trusted_and_a_network_of_other_width_is_refused(here, in_this_process):
    made = network()
    torch.jit.script(made).save(here / "script.pt")
    with pytest.raises(DataError, match=r"script.pt: holds a TorchScript module, .* --trust"):
        imported(here, weights=str(here / "script.pt"))
    opens_as(made, "TorchScript module Net", here, "script")
    torch.save(made, here / "w.pt")
    with pytest.raises(GigamorphError, match=r"missing in the file|of other shape"):
        imported(here, "other", source="published_nets:Net?width=5", trust=True)


@pytest.mark.usefixtures("untiled_imports")
def test_a_pickled_module_of_timm_keeps_the_preprocessing_of_timm(here, in_this_process):
    """As its state dict does: mean, spread, the size where it is fixed; channels by its weights. Whose they are no file
    says: timm's licence is of those that timm fetches."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made = timm.create_model("test_efficientnet", num_classes=4).eval()
    torch.save(made, here / "module.pt")
    torch.save(made.state_dict(), here / "w.pt")
    whole = read_description(imported(here, "p", "timm:test_efficientnet", weights=str(here / "module.pt"), trust=True))
    plain = read_description(imported(here, "s", "timm:test_efficientnet"))
    assert whole.preprocessing == plain.preprocessing and whole.preprocessing.channels == 3
    assert whole.preprocessing.mean == made.pretrained_cfg["mean"] and whole.licence == plain.licence == ""
    grey = imported(here, "grey", "timm:test_efficientnet?in_chans=1", weights=str(here / "module.pt"), trust=True)
    assert read_description(grey).preprocessing.channels == 1
    fixed = "timm:vit_tiny_patch16_224?depth=1&embed_dim=24&num_heads=2"
    torch.save(create_model(fixed, 2, 3), here / "module.pt")
    import_network(fixed, here / "vit", Wishes(str(here / "module.pt"), trust=True), str)
    assert read_description(here / "vit").reference["image"] == [1, 3, 224, 224]
    small = f"{fixed}&img_size=64"
    torch.save(create_model(small, 2, 3).state_dict(), here / "w.pt")
    said, wishes = [], Wishes(str(here / "w.pt"), size=(64, 64))
    import_network(small, here / "untold", wishes, said.append)
    assert "does not accept images of every size, such as 128 x 128 (AssertionError: Input height (128)" in said[0]
    assert "; with --resize HxW, predict resizes" in said[0] and len(said) == 1
    import_network(small, here / "small", Wishes(str(here / "w.pt"), preprocessing={"size": (64, 64)}), said.append)
    assert len(said) == 1
    assert read_description(here / "small").reference["image"] == [1, 3, 64, 64]


def test_a_part_of_a_pickled_module_is_taken_by_its_prefix(here, in_this_process):
    torch.save(nn.Sequential(nn.Identity(), network()), here / "w.pt")
    folder = imported(here, trust=True, prefix="1")
    with torch.no_grad():
        image = torch.rand(1, 1, 60, 50)
        assert torch.equal(create_model(str(folder)).eval()(image), network()(image))


def test_of_several_modules_one_is_named(here, monkeypatch):
    """Loss functions have no weights and are none of them; a part of the one is named after its place."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    made, other, path = network(), network(seed=1), str(here / "w.pt")
    torch.save({"loss": nn.MSELoss(), "model": made, "ema": [nn.Sequential(other)]}, path)
    for wrong, message in (
        ("", r"it contains several modules: model \(Net\), ema.0 \(Sequential\); select one, as in --prefix model$"),
        ("ema.0.net", r"its Sequential has no sub-module 'net'; it has 0$"),
    ):
        with pytest.raises(SystemExit, match=message):
            dump(path, str(here), wrong)
    for prefix, wanted in (("model", made), ("ema.0.0", other)):
        dump(path, str(here), prefix)
        assert torch.equal(load_file(here / "state.safetensors")["conv.weight"], wanted.conv.weight)
