"""Published checkpoints: random weights under the published names are imported and predict as their formulas say.

No weights could be downloaded; names, shapes and formulas are those of the authors' code. Each formula is written here
a second time, from PyTorch's functions and the checkpoint's own names, or taken from timm where that is the network.
"""

import argparse
import csv
import re
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gigamorph import create_model, open_pixels
from gigamorph.cli.main import cli
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.layouts import mammo_clip
from gigamorph.engine.models import load_weights
from gigamorph.engine.models.checkpoints import WeightFile, read_state
from gigamorph.engine.models.folder import read_description
from gigamorph.engine.published.images import PreparedSource
from gigamorph.engine.published.importing import Wishes, import_network
from gigamorph.engine.published.layout import parts_of

timm = pytest.importorskip("timm")
from timm.models import _registry  # noqa: E402

SMALL = (128, 96)  # that the mammogram is brought to here, for the sake of time


# timm's networks of the layouts, narrow and shallow: their names and kinds of layers are the published ones.
SLIM = {
    "convnext_small": {"depths": (1, 1, 27, 1), "dims": (8, 8, 8, 768)},
    "tf_efficientnetv2_s": {"channel_multiplier": 0.25, "depth_multiplier": 0.05},
}


SHALLOW = (1, 1, 1, 2, 2, 2, 1)  # blocks of Mammo-CLIP's stages with the depth factor 0.5; B2's is 1.2


def _slim(entrypoint, sides, **options):
    network = entrypoint(**sides, **options)
    if "dims" in sides:  # the layout is recognised by the name of the last of these blocks
        for number in range(1, 26):
            network.stages[2].blocks[number] = nn.Identity()
    return network


@pytest.fixture(autouse=True)
def slim(monkeypatch):
    for name, sides in SLIM.items():
        monkeypatch.setitem(_registry._model_entrypoints, name, partial(_slim, timm.model_entrypoint(name), sides))


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(mammo_clip._SCALES, "b2", (1.1, 0.5, 260))


def spread(state, seed=0):
    """Statistics of norms that are not 0 and 1, and weights that let a signal through."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=generator)
    return state


def efficientnet_names(size, repeats=None):
    """Names and shapes of EfficientNet-PyTorch's B2 or B5, whose classifier Mammo-CLIP leaves out."""
    stem, head = {"b2": (32, 1408), "b5": (48, 2048)}[size]
    channels = {"b2": (16, 24, 48, 88, 120, 208, 352), "b5": (24, 40, 64, 128, 176, 304, 512)}[size]
    repeats = repeats or {"b2": (2, 3, 3, 4, 4, 5, 2), "b5": (3, 5, 5, 7, 7, 9, 3)}[size]
    kernels = (3, 3, 5, 3, 5, 5, 3)
    shapes = {"_conv_stem.weight": (stem, 3, 3, 3)}

    def norm(name, count):
        shapes.update({f"{name}.{part}": (count,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("_bn0", stem)
    before, number = stem, 0
    for stage, (outputs, count, kernel) in enumerate(zip(channels, repeats, kernels, strict=True)):
        for _ in range(count):
            block, inner = f"_blocks.{number}.", before * (6 if stage else 1)
            if stage:
                shapes[block + "_expand_conv.weight"] = (inner, before, 1, 1)
                norm(block + "_bn0", inner)
            shapes[block + "_depthwise_conv.weight"] = (inner, 1, kernel, kernel)
            norm(block + "_bn1", inner)
            shapes[block + "_se_reduce.weight"] = (before // 4, inner, 1, 1)
            shapes[block + "_se_reduce.bias"] = (before // 4,)
            shapes[block + "_se_expand.weight"] = (inner, before // 4, 1, 1)
            shapes[block + "_se_expand.bias"] = (inner,)
            shapes[block + "_project_conv.weight"] = (outputs, inner, 1, 1)
            norm(block + "_bn2", outputs)
            before, number = outputs, number + 1
    shapes["_conv_head.weight"] = (head, before, 1, 1)
    norm("_bn1", head)
    return shapes


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif len(shape) > 1:
            fan = torch.Size(shape[1:]).numel()
            state[name] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        else:
            state[name] = torch.ones(shape)
    return spread(state, seed)


def mammo_clip_checkpoint(path, classes=1):
    shapes = efficientnet_names("b2", SHALLOW)
    tower = {f"image_encoder.{name}": value for name, value in random_state(shapes).items()}
    head = 1408
    if classes:  # Classifiers/experiments.py saves the whole BreastClipClassifier
        tower["classifier.classification_head.weight"] = torch.randn(classes, head) * 0.05
        tower["classifier.classification_head.bias"] = torch.zeros(classes)
    else:  # breastclip/trainer.py
        tower["text_encoder.text_encoder.embeddings.word_embeddings.weight"] = torch.zeros(4, 4)
        tower["image_projection.projection.weight"] = torch.zeros(4, head)
        tower["logit_scale"] = torch.tensor(1.0)
    torch.save({"model": tower, "config": argparse.Namespace(model="x"), "epoch": 7}, path)


def gmic_checkpoint(path):
    shapes = {"ds_net.first_conv.weight": (16, 1, 7, 7)}

    def norm(name, count):
        shapes.update({f"{name}.{part}": (count,) for part in ("weight", "bias", "running_mean", "running_var")})

    before = 16
    for layer in range(5):
        outputs = 16 * 2**layer
        for block in range(2):
            name, inputs = f"ds_net.layer_list.{layer}.{block}.", before if block == 0 else outputs
            norm(name + "bn1", inputs)
            shapes[name + "conv1.weight"] = (outputs, inputs, 3, 3)
            norm(name + "bn2", outputs)
            shapes[name + "conv2.weight"] = (outputs, outputs, 3, 3)
            if block == 0:
                shapes[name + "downsample.0.weight"] = (outputs, inputs, 1, 1)
        before = outputs
    norm("ds_net.final_bn", 256)
    shapes["left_postprocess_net.gn_conv_last.weight"] = (2, 256, 1, 1)
    state = random_state(shapes)
    state["left_postprocess_net.gn_conv_last.weight"] *= 0.1
    for name in ("dn_resnet.conv1.weight", "mil_attn_V.weight", "classifier_linear.weight", "fusion_network.bias"):
        state[name] = torch.zeros(2)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # they are older than torch 1.6


def mammoscreen_checkpoint(path, numbers):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = {}
    for number in numbers:
        own = spread(timm.create_model("tf_efficientnetv2_s", num_classes=5, in_chans=1).state_dict(), number)
        for name, value in own.items():
            name = re.sub(r"^classifier\.", "linear.", f"{name}" if "classifier" in name else f"backbone.{name}")
            state[f"net{number}.{name}"] = value.clone()
    save_file(state, path)


def rsna_checkpoint(path):
    torch.manual_seed(0)
    network = timm.create_model("convnext_small.fb_in22k_ft_in1k_384", num_classes=1, in_chans=3, global_pool="max")
    state = network.state_dict()
    old = {name: torch.zeros_like(value) for name, value in state.items()}
    args = argparse.Namespace(model="convnext_small")
    torch.save({"state_dict": old, "state_dict_ema": state, "arch": "convnext_small", "args": args}, path)


# What ordinary PyTorch makes of a checkpoint and an image: log-odds by the names of the outputs.


def gmic_formula(state, x):
    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.max_pool2d(F.conv2d(x, state["ds_net.first_conv.weight"], stride=2, padding=3), 3, 2)
    for layer in range(5):
        for block in range(2):
            name, stride = f"ds_net.layer_list.{layer}.{block}.", 2 if layer and not block else 1
            y = F.relu(norm(x, name + "bn1"))
            skip = F.conv2d(y, state[name + "downsample.0.weight"], stride=stride) if block == 0 else x
            y = F.conv2d(y, state[name + "conv1.weight"], stride=stride, padding=1)
            x = F.conv2d(F.relu(norm(y, name + "bn2")), state[name + "conv2.weight"], padding=1) + skip
    x = F.relu(norm(x, "ds_net.final_bn"))
    maps = F.conv2d(x, state["left_postprocess_net.gn_conv_last.weight"]).sigmoid().flatten(2)
    top = maps.topk(max(1, round(maps.shape[2] * 0.05)), dim=2)[0].mean(2)
    return {"benign": top[0, 0].logit(), "malignant": top[0, 1].logit()}


def tower_formula(state, x, repeats, side=260):
    """EfficientNet-PyTorch with padding for images of one side, whatever side they have."""
    state = {name.removeprefix("image_encoder."): value for name, value in state.items()}

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    def conv(x, name, side, stride=1, groups=1):
        weight = state[name + ".weight"]
        pad = max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, state.get(name + ".bias"), stride, groups=groups)

    x, side = F.silu(norm(conv(x, "_conv_stem", side, 2), "_bn0")), side // 2
    firsts = (0, *accumulate(repeats[:-1]))
    strides = dict(zip(firsts, (1, 2, 2, 2, 1, 2, 1), strict=True))
    for number in range(sum(repeats)):
        name, stride = f"_blocks.{number}.", strides.get(number, 1)
        y = x
        if number >= firsts[1]:
            y = F.silu(norm(conv(y, name + "_expand_conv", side), name + "_bn0"))
        y = F.silu(norm(conv(y, name + "_depthwise_conv", side, stride, y.shape[1]), name + "_bn1"))
        side = -(-side // stride)
        gate = F.silu(conv(F.adaptive_avg_pool2d(y, 1), name + "_se_reduce", 1))
        y = conv(gate, name + "_se_expand", 1).sigmoid() * y
        y = norm(conv(y, name + "_project_conv", side), name + "_bn2")
        x = x + y if number not in firsts else y
    return F.adaptive_avg_pool2d(F.silu(norm(conv(x, "_conv_head", side), "_bn1")), 1).flatten(1)


def mammo_clip_formula(state, x):
    head = "classifier.classification_head."
    s = F.linear(tower_formula(state, x, SHALLOW), state[head + "weight"], state[head + "bias"])[0, 0]
    return {"0": -s, "1": s}


def mammoscreen_formula(state, x):
    """Of one of its networks."""
    network = timm.create_model("tf_efficientnetv2_s", num_classes=0, in_chans=1, global_pool="").to(x.dtype).eval()
    backbone = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    network.load_state_dict(backbone)
    features = F.adaptive_avg_pool2d(network(x), 1).flatten(1)
    logits = F.linear(features, state["linear.weight"], state["linear.bias"])[0].double()  # 1 - p is not rounded away
    density = logits[1:].softmax(0)
    return {"cancer": logits[0], **{f"density_{n}": density[i].logit() for i, n in enumerate("ABCD")}}


def rsna_formula(state, x):
    network = timm.create_model("convnext_small", num_classes=1, in_chans=3, global_pool="max").to(x.dtype).eval()
    network.load_state_dict(state)
    s = network(x)[0, 0]
    return {"0": -s, "1": s}


LAYOUTS = {
    "gmic": ("sample_model_4.p", gmic_checkpoint, gmic_formula, (2944, 1920)),
    "mammo-clip": ("classifier.tar", mammo_clip_checkpoint, mammo_clip_formula, (1520, 912)),
    "rsna-2023": ("best_convnext_fold_0.pth.tar", rsna_checkpoint, rsna_formula, (2048, 1024)),
}


def command(*args):
    cli.main([str(a) for a in args], prog_name="gigamorph", standalone_mode=False)


def prepared(folder, path, dtype):
    wanted = read_description(folder).preprocessing
    source = PreparedSource(open_pixels(path, channels=wanted.channels, voi=wanted.voi), wanted)
    return source.read(0, source.shape[1], 0, source.shape[2])[None].to(dtype)


def predicted(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    found = {name[len("log_odds_") :]: float(value) for name, value in row.items() if name.startswith("log_odds_")}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def log_odds(folder, image):
    """What a folder's single network makes of an image in float64; the import has compared it by tiles."""
    network, outputs = create_model(str(folder)).double().eval(), read_description(folder).outputs
    return dict(zip(outputs.names, outputs.log_odds(network(image))[0], strict=True))


def assert_same_log_odds(given, wanted, limit):
    """Whether they differ by no more than a share of the largest, or of 1, as an import asks for."""
    assert list(given) == list(wanted)
    largest = max(1.0, *(abs(float(value)) for value in wanted.values()))
    for name, log_odds in given.items():
        assert abs(float(log_odds) - float(wanted[name])) <= limit * largest, name


def mean_of(each):
    """Log-odds of the mean of the probabilities."""
    return {name: (sum(one[name].sigmoid() for one in each) / len(each)).logit() for name in each[0]}


def converted(state, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("shallow")
def test_a_layout_is_imported_and_predicts_the_real_mammogram(layout, tmp_path, real_data):
    """Log-odds: through the commands in float32 to 1e-5, of the network in float64 to 1e-12.

    The import has compared the network by tiles with the network itself, in float64 and to 1e-12 as well.
    """
    name, write, formula, published = LAYOUTS[layout]
    write(tmp_path / name)
    image = real_data / "dicom" / "mg_ge_jpeg_lossless.dcm"
    recognised, (part,) = parts_of(read_state(tmp_path / name))
    assert recognised == layout and part.preprocessing.size == published
    folder = tmp_path / "net"
    command("import", tmp_path / name, "--resize", "x".join(map(str, SMALL)), "--size", "96x64", "--out", folder)
    assert read_description(folder).source["layout"] == layout and read_description(folder).licence
    command("predict", folder, image, "--memory-budget", "2GiB", "--out", tmp_path / "out")
    state = read_state(tmp_path / name).tensors
    with torch.no_grad():
        assert_same_log_odds(predicted(tmp_path / "out"), formula(state, prepared(folder, image, torch.float32)), 1e-5)
        wanted = formula(converted(state, torch.float64), prepared(folder, image, torch.float64))
        assert_same_log_odds(predicted(tmp_path / "out"), wanted, 1e-5)
        assert_same_log_odds(log_odds(folder, prepared(folder, image, torch.float64)), wanted, 1e-12)


def test_mammoscreens_three_networks_have_sizes_of_their_own():
    names = [f"net{i}.{name}.weight" for i in range(3) for name in ("backbone.conv_stem", "linear")]
    recognised, parts = parts_of(WeightFile(Path("model.safetensors"), dict.fromkeys(names, torch.zeros(1))))
    assert recognised == "mammoscreen" and [part.name for part in parts] == ["net0", "net1", "net2"]
    assert [part.preprocessing.size for part in parts] == [(2048, 1024), (1920, 1280), (1536, 1536)]
    assert [part.preprocessing.fit for part in parts] == ["widen", "widen", "pad"]


def test_mammoscreen_is_an_ensemble_of_its_networks(tmp_path, real_data):
    numbers = (0, 2)  # the second differs from the first in nothing but its size
    mammoscreen_checkpoint(tmp_path / "model.safetensors", numbers)
    folder = tmp_path / "net"
    command("import", tmp_path / "model.safetensors", "--resize", "96x64", "--size", "96x64", "--out", folder)
    image = real_data / "dicom" / "mg_ge_jpeg_lossless.dcm"
    command("predict", folder, image, "--memory-budget", "2GiB", "--out", tmp_path / "out")
    state = read_state(tmp_path / "model.safetensors").tensors
    plain, exact, found = [], [], []
    for number in numbers:
        own = {n.removeprefix(f"net{number}."): v for n, v in state.items() if n.startswith(f"net{number}.")}
        part = folder / f"net{number}"
        with torch.no_grad():
            plain.append(mammoscreen_formula(own, prepared(part, image, torch.float32)))
            exact.append(mammoscreen_formula(converted(own, torch.float64), prepared(part, image, torch.float64)))
            found.append(log_odds(part, prepared(part, image, torch.float64)))
        assert_same_log_odds(found[-1], exact[-1], 1e-12)
    given = predicted(tmp_path / "out")
    assert list(given) == ["cancer", "density_A", "density_B", "density_C", "density_D"]
    assert_same_log_odds(given, mean_of(plain), 1e-5)
    assert_same_log_odds(given, mean_of(exact), 1e-5)
    assert_same_log_odds(mean_of(found), mean_of(exact), 1e-12)


def test_the_tower_is_timms_efficientnet_where_their_padding_agrees(tmp_path):
    """At the nominal side of 260 pixels EfficientNet-PyTorch and timm pad alike, elsewhere they do not."""
    shapes = efficientnet_names("b2")
    state = random_state(shapes)
    network = mammo_clip.Tower("b2").double().eval()
    assert {n: tuple(v.shape) for n, v in network.state_dict().items()} == shapes
    network.load_state_dict(converted(state, torch.float64))
    theirs = timm.create_model("tf_efficientnet_b2", num_classes=0).double().eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), converted(state, torch.float64).values(), strict=True)))
    torch.manual_seed(0)
    nominal, other = (torch.randn(1, 3, side, side, dtype=torch.float64) for side in (260, 97))
    with torch.no_grad():
        torch.testing.assert_close(network(nominal), theirs(nominal), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(network(other), theirs(other), rtol=1e-3)
        wanted = tower_formula(converted(state, torch.float64), other, (2, 3, 3, 4, 4, 5, 2))
        torch.testing.assert_close(network(other), wanted, rtol=1e-12, atol=1e-12)


def test_b5_has_the_published_names():
    with torch.device("meta"):
        found = mammo_clip.Tower("b5").state_dict()
    assert {n: tuple(v.shape) for n, v in found.items()} == efficientnet_names("b5")


@pytest.mark.usefixtures("untiled_imports", "shallow")
def test_a_tower_alone_gives_features_to_fine_tune(tmp_path, capsys):
    mammo_clip_checkpoint(tmp_path / "b2-model-best-epoch-10.tar", classes=0)
    import_network(str(tmp_path / "b2-model-best-epoch-10.tar"), tmp_path / "net", Wishes(size=(64, 64)), str)
    network = create_model(str(tmp_path / "net")).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1408)
    started = create_model(read_description(tmp_path / "net").model, 4, 3)
    assert load_weights(started, tmp_path / "net") == [] and started.classifier.out_features == 4
    own = started.state_dict()
    assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())
    with pytest.raises(GigamorphError, match="outputs features, not predictions; run gigamorph train --init"):
        command("predict", tmp_path / "net", tmp_path / "net", "--out", tmp_path / "out")


def test_a_gmic_file_under_another_name_is_refused(tmp_path):
    gmic_checkpoint(tmp_path / "mine.p")
    with pytest.raises(GigamorphError, match=r"its name does not identify the t .*sample_model_4.p 0.05"):
        import_network(str(tmp_path / "mine.p"), tmp_path / "net", Wishes(), str)


@pytest.mark.parametrize(("wrapper", "prefix"), [("module.", ""), ("mine.", "mine"), ("module.mine.", "mine.")])
@pytest.mark.usefixtures("untiled_imports")
def test_a_layout_is_recognised_in_wrappers_and_under_a_prefix(tmp_path, wrapper, prefix):
    path = tmp_path / "sample_model_4.p"
    gmic_checkpoint(path)
    state = read_state(path).tensors
    torch.save({wrapper + name: value for name, value in state.items()}, path)
    import_network(str(path), tmp_path / "net", Wishes(prefix=prefix, size=(96, 64)), str)
    source = read_description(tmp_path / "net").source
    assert source["layout"] == "gmic" and source["prefix"] == ("mine." if prefix else "")
    loaded = create_model(str(tmp_path / "net")).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded.keys() & state)


def test_unknown_and_wrong_layouts_are_named(tmp_path):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(GigamorphError, match=r"has none of the known layouts \(mammoscreen, rsna-2023, mammo-clip, gm"):
        import_network(str(tmp_path / "w.pt"), tmp_path / "net", Wishes(), str)
    with pytest.raises(GigamorphError, match="is not in layout gmic; its names begin with a"):
        import_network(str(tmp_path / "w.pt"), tmp_path / "net", Wishes(layout="gmic"), str)
