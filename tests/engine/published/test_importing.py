"""Folders of networks: what is written, what is refused, and that what is opened again is what was imported."""

import argparse
import json
import shutil
import sys

import pytest
import torch
from published_networks import SIZE, imported, network
from torch import nn

from gigamorph import accelerate, create_model
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.folder import read_description
from gigamorph.engine.models.outputs import outputs_of
from gigamorph.engine.models.reference import Reference
from gigamorph.engine.morph.files import open_network, save_network
from gigamorph.engine.published import reference
from gigamorph.engine.published.classifier import open_published
from gigamorph.engine.published.export import open_source
from gigamorph.engine.published.importing import import_ensemble
from gigamorph.engine.train.config import make_config
from gigamorph.engine.train.network import start_from
from gigamorph.engine.train.target import Target


def test_a_folder_builds_the_network_again_with_its_logits(here):
    made = network()
    torch.save(made.state_dict(), here / "w.pt")
    folder = imported(here, classes=("a", "b", "c"), licence="MIT", preprocessing={"mean": (0.4,), "std": (0.2,)})
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors", "reference.safetensors"]
    again = create_model(str(folder), num_classes=7, in_channels=3).eval()  # what it has, it says itself
    stored = Reference.read(folder)
    with torch.no_grad():
        for dtype, wanted in ((torch.float32, stored.logits32), (torch.float64, stored.logits64)):
            image = stored.image.to(dtype)
            assert torch.equal(made.to(dtype)(image), wanted) and torch.equal(again.to(dtype)(image), wanted)
            torch.testing.assert_close(accelerate(again, tile=32)(image), wanted, rtol=0, atol=1e-6)
    assert outputs_of(again).names == ["a", "b", "c"]
    description = read_description(folder)
    assert description.licence == "MIT" and description.preprocessing.mean == (0.4,)
    assert description.reference["float64 difference"] <= 1e-12 and stored.image.shape == (1, 1, *SIZE)
    assert json.loads((folder / "model.json").read_text())["input"]["units"] == "grey, 0 black to 1 white"


def test_outputs_channels_and_prefix_follow_from_the_weights(here):
    state = {f"net.model.{name}": value for name, value in network(classes=1, channels=3).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(a=1)}, here / "w.pt")
    said = []
    description = read_description(imported(here, quiet=said))
    assert description.preprocessing.channels == 3 and description.outputs.names == ["0", "1"]
    assert description.outputs.heads[0].activation == "sigmoid" and description.key_map == (("net.model.", ""),)
    assert said == ["w.pt: removed the prefix net.model. from all names"]
    torch.save({"state_dict": {**state, "loss.weight": torch.zeros(1)}}, here / "w.pt")
    with pytest.raises(DataError, match=r"of the model after 'net.model', and others \(loss.weight\)"):
        imported(here, "other")
    assert read_description(imported(here, "third", prefix="net.model")).source["prefix"] == "net.model"


def test_arguments_of_the_constructor_are_kept(here):
    torch.save(network(width=6).state_dict(), here / "w.pt")
    folder = imported(here, source="published_nets:Net?width=6")
    assert read_description(folder).model == "published_nets:Net?width=6"
    assert create_model(str(folder)).conv.out_channels == 6


def test_several_heads(here):
    torch.save(network(classes=5).state_dict(), here / "w.pt")
    heads = (("cancer", "sigmoid"), ("density", "softmax:A,B,C,D"))
    description = read_description(imported(here, heads=heads))
    assert description.outputs.names == ["cancer", "density_A", "density_B", "density_C", "density_D"]
    with pytest.raises(GigamorphError, match="the network has 5 outputs, but the named heads have 2"):
        imported(here, "other", heads=(("density", "softmax:A,B"),))


@pytest.fixture
def two_heads(here):
    torch.manual_seed(0)
    made = create_model("published_nets:Heads", 4).eval()
    torch.save(made.state_dict(), here / "w.pt")
    return made


def test_tensors_in_containers_are_heads_side_by_side(here, two_heads):
    """A dictionary with a tuple, a map and None; num_classes of another head than the last."""
    said = []
    folder = imported(here, source="published_nets:Heads", quiet=said)
    description = read_description(folder)
    assert said == ["Heads: uses heads.0, heads.1 of its outputs, not map (1 x 4 x 35 x 33)"]
    assert description.model == "published_nets:Heads?num_classes=4#heads.0,heads.1"
    names = ["heads.0_0", "heads.0_1", "heads.0_2", "heads.0_3", "heads.1"]
    assert description.outputs.names == names
    assert [head.activation for head in description.outputs.heads] == ["softmax", "sigmoid"]
    again = create_model(str(folder)).eval()
    image = torch.randn(2, 1, 60, 50)
    with torch.no_grad():
        four, one = two_heads(image)["heads"]
        wanted = torch.cat([four, one[:, None]], 1)
        assert torch.equal(again(image), wanted)
        torch.testing.assert_close(accelerate(again, tile=32)(image), wanted)
    assert list(again.state_dict()) == list(two_heads.state_dict())


@pytest.mark.parametrize(
    ("last", "classes", "activations"),
    [("softmax", 3, ["probability"]), ("sigmoid", 1, ["probability"]), ("heads", 2, ["probability", "sigmoid"] * 2)],
)
def test_outputs_that_are_probabilities_already_are_taken_as_such(here, last, classes, activations):
    """A second softmax of them would give other probabilities; that it was asked for is told."""
    made = network(classes=classes)
    torch.save(made.state_dict(), here / "w.pt")
    source, said = f"published_nets:Sure?last={last}", []
    folder = imported(here, source=source, quiet=said)
    description, again = read_description(folder), create_model(str(folder)).eval()
    assert [head.activation for head in description.outputs.heads] == activations[: 3 if last == "heads" else 1]
    assert any("ends in a " in line and "probabilities" in line for line in said)
    image = torch.randn(1, 1, 60, 50)
    with torch.no_grad():
        logits, found = made(image), description.outputs.log_odds(again(image)).sigmoid()
    if last == "heads":
        wanted = torch.cat([logits.softmax(1), logits[:, :1].sigmoid(), logits[:, 1:].sigmoid()], 1)
    else:
        p = logits.sigmoid() if last == "sigmoid" else logits.softmax(1)
        wanted = torch.cat([1 - p, p], 1) if last == "sigmoid" else p
    torch.testing.assert_close(found, wanted)
    if last == "softmax":
        said.clear()
        imported(here, "asked", source=source, activation="softmax", quiet=said)
        assert said == [
            "Sure: ends in a softmax; its outputs are probabilities, to which a softmax is applied; "
            "--activation probability applies none"
        ]


def test_one_of_several_outputs_is_named(here, two_heads):
    """After #, or by the heads' names; the spec builds it wherever a network is named, without a folder too."""
    density = read_description(imported(here, source="published_nets:Heads#heads.0", classes=tuple("ABCD")))
    assert density.model == "published_nets:Heads#heads.0" and density.outputs.names == list("ABCD")
    first = imported(here, "other", source="published_nets:Heads", heads=(("heads.1", "sigmoid"),))
    assert create_model(str(first)).eval()(torch.zeros(3, 1, 40, 40)).shape == (3, 1)
    assert create_model("published_nets:Heads#heads.0", 5)(torch.zeros(3, 1, 40, 40)).shape == (3, 5)
    with pytest.raises(GigamorphError, match=r"2 outputs \(heads.0, heads.1\) of 5 numbers, but --classes has 2 names"):
        imported(here, "third", source="published_nets:Heads", classes=("density", "cancer"))


def test_a_network_whose_logits_by_tiles_are_others_is_refused(here, monkeypatch):
    torch.save(network().state_dict(), here / "w.pt")

    def off(twin, **options):
        net = accelerate(twin, **options)
        return lambda image: net(image) + 3e-5 * (image.dtype == torch.float32)

    monkeypatch.setattr(reference, "accelerate", off)
    with pytest.raises(GigamorphError, match=r"differ by 3.0e-05 in float32 .* nothing was written"):
        imported(here)
    assert sorted(p.name for p in here.iterdir() if p.name != "__pycache__") == ["published_nets.py", "w.pt"]


@pytest.mark.parametrize("cast", ["y.float()", "y.to(torch.float32)", "y.to(dtype=torch.float32)"])
def test_a_network_that_casts_to_float32_is_compared_in_float64_without_that(here, cast):
    """EfficientViT's attention and CLIP's norms round in float64 too, by tiles in another order."""
    (here / "casting_nets.py").write_text(
        "import torch\nimport published_nets\n"
        "class Casting(published_nets.Net):\n"
        "    def forward(self, x):\n"
        "        y = self.norm(self.conv(x)).relu()\n"
        f"        return self.fc({cast}.mean((2, 3)).to(x.dtype) * 9)\n"
    )
    torch.save(network().state_dict(), here / "w.pt")
    found = read_description(imported(here, source="casting_nets:Casting")).reference
    assert found["float64 difference"] <= 1e-12 and "to float64" in found["casts"]


def test_bad_input_is_one_line_and_writes_nothing(here):
    state = network().state_dict()
    torch.save(state, here / "w.pt")
    torch.save({**state, "conv.weight": state["conv.weight"] * torch.nan}, here / "nan.pt")
    cases = {
        "nan.pt: weights do not fit the model: 36 values are NaN": {"weights": str(here / "nan.pt")},
        "none.pt: no such weights file": {"weights": str(here / "none.pt")},
        "cannot take an image of 1 x 2 x 2": {"size": (2, 2)},
        "needs its weights: --weights FILE": {"weights": None},
        "outputs no row of numbers for an image, but maps: 0 (1 x 4 x 35 x 33), 1 (); in Python, write_map writes them "
        "and dense_loss trains on them; gigamorph train --task masks": {"source": "published_nets:Maps"},
        "outputs no row of numbers for an image, but boxes: 0.boxes (1 x 4), 0.scores (1); an import cannot contain a "
        "detector: in Python, accelerate(its backbone)": {"source": "published_nets:Boxes"},
        "has no row of numbers '1' for an image": {"source": "published_nets:Pair#1"},
        "outputs different logits at every call of ordinary PyTorch, by ": {"source": "published_nets:Random"},
        "names of outputs must follow #": {"source": "published_nets:Pair#"},
        "'published_nets:Gone' cannot be imported": {"source": "published_nets:Gone"},
        "2 names (a, b) do not fit 3 outputs": {"classes": ("a", "b")},
        "downloads/gone.safetensors: no such file or folder": {"source": "downloads/gone.safetensors", "weights": None},
        "in_channels must be a number of channels, not 'two'": {"source": "published_nets:Net?in_channels=two"},
    }
    for message, wishes in cases.items():
        with pytest.raises(GigamorphError) as caught:
            imported(here, **wishes)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (here / "net").exists()
    (here / "net").mkdir()
    (here / "net" / "mine").touch()
    with pytest.raises(GigamorphError, match="net: already exists"):
        imported(here)


def test_a_folder_that_was_changed_is_refused(here):
    torch.save(network().state_dict(), here / "w.pt")
    folder = imported(here)
    kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(DataError, match="not the file that was checked"):
        create_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no such weights file"):
        create_model(str(folder))
    text = (folder / "model.json").read_text()
    for changed, message in ((text.replace('"format": 1', '"format": 9'), "format 9"), (text[:-9], "cannot be read")):
        (folder / "model.json").write_text(changed)
        with pytest.raises(DataError, match=message):
            create_model(str(folder))
    (folder / "model.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"model\.json: key 'outputs' is missing"):
        create_model(str(folder))


def test_a_network_of_probabilities_is_not_trained_as_if_they_were_logits(here):
    torch.save(network(classes=2).state_dict(), here / "w.pt")
    folder = imported(here, source="published_nets:Sure")
    message = f"{folder}: its network outputs probabilities, but training needs logits; import it from a factory"
    for named in (folder, folder / "model.safetensors"):
        with pytest.raises(DataError, match=message):
            make_config({"init": str(named)}, "options", print)
        with pytest.raises(DataError, match=message):
            start_from(create_model("published_nets:Sure"), named, Target(("0", "1")))


def test_the_file_of_weights_of_a_folder_stands_for_the_folder(here):
    torch.save(network(classes=2).state_dict(), here / "w.pt")
    folder = imported(here)
    found = [make_config({"init": str(named)}, "options", print) for named in (folder, folder / "model.safetensors")]
    assert found[0] == found[1] and found[0].weights == str(folder)
    own = make_config({"init": str(folder / "model.safetensors"), "model": "resnet18"}, "options", print)
    assert (own.model, own.weights) == ("resnet18", str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (
            {"heads": (("density", "softmax:A,B"), ("malignant", "sigmoid"))},
            "'density' would contain columns of cancer and",
        ),
        (
            {"heads": (("malignant", "sigmoid"), ("cancer", "softmax:A,B"))},
            r"'cancer' would .* of density: the network",
        ),
        (
            {"classes": ("density", "cancer")},
            r"are cancer \(1\), density \(1\); use these names for all heads, or list",
        ),
    ],
)
def test_heads_that_would_take_the_numbers_of_another_output_are_refused(here, wishes, message):
    torch.save(network(classes=3 if "heads" in wishes else 2).state_dict(), here / "w.pt")
    with pytest.raises(GigamorphError, match=message):
        imported(here, source="published_nets:Named", **wishes)


def test_what_a_file_says_of_a_tied_tensor_or_of_whole_numbers_is_not_lost(here):
    state = create_model("published_nets:Tied").state_dict()
    torch.save({name: value for name, value in state.items() if name != "again.weight"}, here / "w.pt")
    loaded = create_model(str(imported(here, source="published_nets:Tied")))
    assert torch.equal(loaded.again.weight, state["fc.weight"])
    for name, value, message in (
        ("again.weight", state["fc.weight"] + 1, "fc.weight and again.weight are one tensor of the model, but differ"),
        ("order", state["order"] + 0.5, "1 of another kind, .*order is float32, the model has int64"),
    ):
        torch.save({**state, name: value}, here / "w.pt")
        with pytest.raises(DataError, match=message):
            imported(here, name, source="published_nets:Tied")
    torch.save({**state, "order": state["order"].half()}, here / "w.pt")
    imported(here, "half", source="published_nets:Tied")


def test_a_factory_of_a_network_in_float64_makes_one_in_float32(here):
    torch.save(network().state_dict(), here / "w.pt")
    folder = imported(here, source="published_nets:Double")
    net = open_published(folder, memory_budget=None, device="cpu").net
    image = Reference.read(folder).image
    with torch.no_grad():
        torch.testing.assert_close(net(image), Reference.read(folder).logits32, rtol=0, atol=1e-5)


def test_code_that_has_changed_since_the_import_is_refused(here, monkeypatch):
    """Its weights still fit, and what it gives are other numbers."""
    torch.save(network().state_dict(), here / "w.pt")
    folder, grown = imported(here), here / "grown.safetensors"
    save_network(grown, open_network(str(folder), None))
    import_ensemble([folder, folder], here / "both", [])
    text = (folder / "model.json").read_text().replace('"torch": "', '"torch": "0.')
    (folder / "model.json").write_text(text)
    openers = (
        lambda: open_published(folder, memory_budget=None, device="cpu"),
        lambda: open_source(folder),
        lambda: open_network(str(folder), None),  # gigamorph morph
        lambda: make_config({"init": str(folder)}, "options", print),  # gigamorph train
        lambda: make_config({"model": str(folder)}, "options", print),
        lambda: make_config({"model": str(folder), "init": str(grown)}, "options", print),
        lambda: create_model("published_nets:Net", 3, 1, folder),
    )
    for opened in openers:
        opened()  # another version that gives the same is none of its business
    forward = sys.modules["published_nets"].Net.forward
    monkeypatch.setattr(sys.modules["published_nets"].Net, "forward", lambda self, x: forward(self, x) + 1e-4)
    for opened in (*openers, lambda: open_published(here / "both", memory_budget=None, device="cpu")):
        with pytest.raises(DataError, match=r"1e-04\), so the code that builds it has changed") as caught:
            opened()
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"\(torch 0\.\S+ then, \S+ now\); import it again"):
        openers[0]()
    (folder / "reference.safetensors").unlink()
    with pytest.raises(DataError, match=r"reference.safetensors: cannot be read .*; import the network again"):
        openers[0]()


def test_a_folder_calls_nothing_that_makes_no_network(here):
    """It may come from anybody, and what is installed can do more than build networks."""
    torch.save(network().state_dict(), here / "w.pt")
    folder, target = imported(here), here / "ran"
    text = (folder / "model.json").read_text()
    for spec in (f"os:system?command=touch {target}", f"os:mkdir?path={target}", f"torch:load?f={target}"):
        (folder / "model.json").write_text(text.replace("published_nets:Net", spec))
        with pytest.raises(GigamorphError, match=r"it is not called|cannot be imported"):
            create_model(str(folder))
        assert not target.exists()
    (here / "plain_nets.py").write_text("from published_nets import Net\ndef net(): return Net(3)\n")
    with pytest.raises(GigamorphError, match="nor a function that takes num_classes; it is not called"):
        imported(here, "other", source="plain_nets:net")


@pytest.mark.usefixtures("untiled_imports")
def test_timm_with_arguments_from_a_file_for_colour_images(here):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=4, in_chans=3, global_pool="max").eval()
    torch.save({"state_dict": theirs.state_dict(), "arch": "test_resnet"}, here / "w.pt")
    said = []
    folder = imported(here, source="timm:test_resnet?in_chans=1&global_pool=max", quiet=said)
    again = create_model(str(folder)).eval()
    grey = torch.rand(1, 1, 80, 72)
    with torch.no_grad():
        torch.testing.assert_close(again(grey), theirs(grey.repeat(1, 3, 1, 1)), rtol=0, atol=1e-5)
    assert "converted from 3 channels" in said[0] and outputs_of(again).columns == 4
    mean = timm.get_pretrained_cfg("test_resnet").mean
    assert read_description(folder).preprocessing.mean == pytest.approx((sum(mean) / 3,))


@pytest.mark.usefixtures("untiled_imports")
def test_weights_in_caches_are_found_and_never_fetched(here, monkeypatch):
    timm = pytest.importorskip("timm")
    import huggingface_hub
    from safetensors.torch import save_file

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "torch"))
    with pytest.raises(
        GigamorphError, match=r"its weights are not in a cache; searched timm/test_resnet.* hf download"
    ):
        imported(here, source="timm:test_resnet", weights="cache")
    config = timm.get_pretrained_cfg("test_resnet")
    snapshot = here / "hub" / f"models--{config.hf_hub_id.replace('/', '--')}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    save_file(timm.create_model("test_resnet").state_dict(), snapshot / "model.safetensors")
    from functools import partial

    found = partial(huggingface_hub.try_to_load_from_cache, cache_dir=str(here / "hub"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    folder = imported(here, source="timm:test_resnet", weights="cache")
    assert read_description(folder).outputs.columns == config.num_classes
    assert read_description(folder).licence == config.license != ""


def test_channels_are_those_of_the_sub_tree_that_is_taken(here):
    """Whatever comes before it in the file."""
    state = {f"colour.{n}": v for n, v in network(channels=3).state_dict().items()}
    state |= {f"grey.{n}": v for n, v in network(channels=1).state_dict().items()}
    torch.save(state, here / "w.pt")
    for prefix, channels in (("grey", 1), ("colour", 3)):
        assert read_description(imported(here, prefix, prefix=prefix)).preprocessing.channels == channels


@pytest.mark.usefixtures("untiled_imports")
def test_channels_do_not_depend_on_how_a_file_sorts_its_names(here):
    """safetensors has a depthwise convolution of one channel before the stem."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("test_convnext", num_classes=2).state_dict(), here / "w.safetensors")
    found = read_description(imported(here, source="timm:test_convnext", weights=str(here / "w.safetensors")))
    assert found.preprocessing.channels == 3


def test_channels_are_those_of_the_convolution_that_sees_the_image(here):
    """Not of one that the network names before it."""
    (here / "gated_nets.py").write_text(
        "import published_nets\nfrom torch import nn\n"
        "class Gated(nn.Module):\n"
        "    def __init__(self, num_classes=2, in_channels=1):\n"
        "        super().__init__()\n"
        "        self.gate = nn.Conv2d(3, 3, 1)\n"
        "        self.scale = nn.Conv2d(1, 1, 1)\n"
        "        self.stem = nn.Conv2d(in_channels, 3, 3)\n"
        "        self.fc = nn.Linear(3, num_classes)\n"
        "    def forward(self, x):\n"
        "        x = self.stem(x)\n"
        "        return self.fc((x * self.gate(x) * self.scale(x[:, :1])).mean((2, 3)))\n"
    )
    for channels in (1, 3):
        torch.save(create_model("gated_nets:Gated", 2, channels).state_dict(), here / "w.pt")
        folder = imported(here, str(channels), source="gated_nets:Gated")
        assert read_description(folder).preprocessing.channels == channels


def test_an_ensemble_holds_its_members_and_refuses_strangers(here):
    for name, classes in (("a", 2), ("b", 2), ("c", 3)):
        torch.save(network(classes=classes, seed=len(name)).state_dict(), here / "w.pt")
        imported(here, name)
    both = import_ensemble([here / "a", here / "b"], here / "both", [(True, False)])
    description = read_description(both)
    assert description.members == ("member0", "member1") and description.flips == ((False, False), (True, False))
    shutil.rmtree(here / "a")
    assert isinstance(create_model(str(both / "member0")), nn.Module)
    with pytest.raises(
        GigamorphError, match="is an ensemble of 2 networks, which can only predict; use one of its members"
    ):
        create_model(str(both))
    with pytest.raises(GigamorphError, match="predicts 0, 1, 2, not 0, 1 like"):
        import_ensemble([here / "b", here / "c"], here / "other", [])
    torch.save(network(classes=2).state_dict(), here / "w.pt")
    imported(here, "labels", activation="sigmoid")
    with pytest.raises(GigamorphError, match="labels any of which may apply, not exclusive classes like"):
        import_ensemble([here / "b", here / "labels"], here / "other", [])
    with pytest.raises(GigamorphError, match="is already an ensemble"):
        import_ensemble([both, here / "b"], here / "other", [])
    assert not (here / "other").exists()
