import functools
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import commands
import pytest
import torch

import gigamorph
from gigamorph.cli.morph import morph
from gigamorph.engine.models.resnet import BasicBlock, ResNet
from gigamorph.engine.morph.operations import GIVEN, OPERATIONS
from gigamorph.engine.morph.store import read_state, write_state

run = functools.partial(commands.run, "morph")


def tiny(num_classes, in_channels):
    """Two residual blocks: what a morph takes grows with the layers."""
    return ResNet(BasicBlock, (1, 0, 0, 1), num_classes, in_channels, width=4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the weights of a small network, whose factory is found in it."""
    (tmp_path / "tiny_net.py").write_text(
        "from gigamorph.engine.models.resnet import BasicBlock, ResNet\n"
        "def tiny(num_classes, in_channels):\n"
        "    return ResNet(BasicBlock, (1, 0, 0, 1), num_classes, in_channels, width=4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_net", raising=False)
    torch.manual_seed(0)
    write_state("a.safetensors", tiny(2, 1).state_dict())
    write_state("rgb.safetensors", tiny(2, 3).state_dict())
    return tmp_path


NET = ("--model", "tiny_net:tiny")


def grow(command, source, target, *more):
    return run(command, "--in", f"{source}.safetensors", "--out", f"{target}.safetensors", *NET, *more)


def lines(text):
    return text.strip().splitlines()


def test_widen_deepen_front_verify(folder, capsys):
    assert grow("widen", "a", "b", "--factor", 1.5) == 0
    out, err = capsys.readouterr()
    assert "certificate: 0 of" in out and "written: b.safetensors, b.recipe.json" in out and err == ""
    assert grow("deepen", "b", "c", "--at", "layer1.0", "--act", "GELU") == 0
    assert grow("front", "c", "d", "--factor", 2) == 0
    assert "image sides must be multiples of 2" in capsys.readouterr().out
    assert sorted(p.name for p in folder.glob("[a-d].*")) == sorted(
        ["a.safetensors"] + [f"{n}.{e}" for n in "bcd" for e in ("safetensors", "recipe.json")]
    )
    steps = [m["step"]["op"] for m in json.loads((folder / "d.recipe.json").read_text())["morphs"]]
    assert steps == ["widen", "residual", "front"]
    for first, second in (("a", "d"), ("b", "d"), ("a", "c"), ("d", "d")):
        assert run("verify", f"{first}.safetensors", f"{second}.recipe.json", *NET) == 0
        assert lines(capsys.readouterr().out)[0] == "equal"

    state = dict(read_state("d.safetensors"))
    state["fc.bias"] = state["fc.bias"] + 1e-3
    write_state("d.safetensors", state)  # without a header: the recipe beside it is found
    assert run("verify", "a.safetensors", "d.safetensors", *NET) == 1
    assert lines(capsys.readouterr().out)[0].startswith("different: by ")
    assert run("verify", "d.safetensors", "a.safetensors", *NET) == 2
    assert "in that order" in capsys.readouterr().err


def test_the_grown_weights_load_into_the_rebuilt_network(folder):
    from gigamorph.engine.morph.recipe import Recipe, apply

    assert grow("widen", "a", "b", "--space", "conv1.weight:0=7", "--free", "1=2", "--split", "kraft") == 0
    net = apply(Recipe.load("b.recipe.json"), tiny(2, 1))
    net.load_state_dict(read_state("b.safetensors"), strict=True)
    assert net.conv1.out_channels == 7  # type: ignore[union-attr]
    old = tiny(2, 1)
    old.load_state_dict(read_state("a.safetensors"))
    x = torch.randn(1, 1, 64, 64)
    assert torch.allclose(net.eval()(x), old.eval()(x), atol=1e-5)


def test_groups_get_wider(folder):
    net = "nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 1))"
    factory = f"from torch import nn\ndef tiny(num_classes, in_channels):\n    return {net}\n"
    (folder / "tiny_net.py").write_text(factory)
    write_state("a.safetensors", eval(net, {"nn": torch.nn}).state_dict())
    for groups, shape in (("more", (16, 2, 3, 3)), ("wider", (16, 4, 3, 3))):
        assert grow("widen", "a", "b", "--factor", 2, "--groups", groups) == 0
        assert read_state("b.safetensors")["1.weight"].shape == shape
    assert run("verify", "a.safetensors", "b.safetensors", *NET) == 0


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("deepen", ["--at", "layer4.0", "--how", "pair"]),
        ("deepen", ["--at", "layer4.0", "--how", "identity", "--act", "SiLU"]),
        ("kernel", ["--at", "conv1", "--kernel", 9]),
        ("kernel", ["--at", "layer1.0.conv1", "--at", "layer1.0.conv2", "--kernel", 5]),
        ("front", ["--factor", 3, "--mode", "fold"]),
        ("front", ["--factor", 2, "--mode", "residual", "--downsample", "antialias"]),
        ("input", ["--to", "rgb"]),
        ("input", ["--planes", 2]),
        ("head", ["--outputs", 4]),
        ("head", ["--outputs", 4, "--kind", "softmax", "--at", "fc"]),
        ("head", ["--split", 1, "--into", 3, "--shares", "0.5,0.25,0.25"]),
        ("head", ["--outputs", 3, "--kind", "softmax", "--prior", 0.05]),
        ("widen", ["--factor", "layer1.*=2", "--factor", "conv1=1.5", "--round-to", 4, "--ignore", "layer1.0.conv1"]),
        ("widen", ["--factor", 1.5, "--noise", 0.1, "--no-train"]),
        ("deepen", ["--at", "layer4.0", "--hidden", 3, "--kernel", "1x3"]),
        ("deepen", ["--at", "layer4.0", "--how", "module", "--between", "pair"]),
        ("deepen", ["--at", "layer4.0", "--how", "activation", "--act", "GELU"]),
        ("decompose", ["--at", "layer1.0.conv1", "--kernels", "1,3", "--act", "ReLU"]),
        ("decompose", ["--at", "conv1", "--kernels", "3x1,5x7"]),
        ("split", ["--at", "layer1.0.conv1", "--seed", 3]),
    ],
)
def test_every_command_keeps_the_function(command, more, folder, capsys):
    assert grow(command, "a", "b", *more) == 0
    assert run("verify", "a.safetensors", "b.safetensors", *NET) == 0
    assert lines(capsys.readouterr().out)[-2].startswith("equal")


def test_grey_from_rgb_and_growth_of_a_grown_head(folder, capsys):
    colour = ("--channels", 3)
    assert grow("input", "rgb", "b", "--to", "grey", *colour) == 0
    assert grow("head", "b", "c", "--outputs", 4, "--kind", "softmax", *colour) == 0
    assert grow("head", "c", "d", "--split", 0, *colour) == 0
    assert run("verify", "rgb.safetensors", "d.safetensors", *NET, *colour) == 0
    assert lines(capsys.readouterr().out)[-2] == "equal up to the rounding of the stored weights"
    assert grow("head", "d", "e", "--outputs", 9, *colour) == 0
    assert run("verify", "rgb.safetensors", "e.safetensors", *NET, *colour) == 0
    assert lines(capsys.readouterr().out)[-2] == "equal up to the rounding of the stored weights"


def test_identity_with_batch_norm_is_said_to_differ_in_train_mode(folder, capsys):
    assert grow("deepen", "a", "b", "--at", "layer1.0", "--how", "identity", "--norm") == 0
    assert run("verify", "a.safetensors", "b.safetensors", *NET) == 0
    assert "in train mode they differ by" in capsys.readouterr().out


def test_the_table_has_every_argument_of_every_public_morph(capsys):
    """What a function takes, its command takes, with a help; what grows a network is in the table."""
    in_table = {}
    for operation in OPERATIONS:
        options = {o: p.help for p in morph.commands[operation.name].params for o in (*p.opts, *p.secondary_opts)}
        for key in operation.functions:
            function = operation.function(key)
            in_table[function.__name__] = function
            for name, parameter in inspect.signature(function).parameters.items():
                if name in GIVEN:
                    continue
                option = next(o for o, p in operation.parameters(key).items() if p.name == name)
                assert options[f"--{option.replace('_', '-')}"], f"{operation.name} {key}: {name} has no help"
                assert parameter.kind is not parameter.VAR_KEYWORD
    grows = {
        name
        for name in gigamorph.__all__
        if "Report]" in str(getattr(getattr(gigamorph, name), "__annotations__", {}).get("return", ""))
    }
    assert grows - {"deepen"} <= set(in_table)  # which calls three that are in it
    assert {f.__module__.rpartition(".")[2] for f in in_table.values()} >= {"decompose", "activation", "merge"}


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("widen", ["--factor", 2, "--seed", -3], "seed must be an integer from 0 to 4294967295, not -3"),
        ("widen", ["--factor", 2, "--seed", 2**40], "seed must be an integer from 0 to 4294967295, not 1099511627776"),
        ("widen", ["--factor", 1], "every space already has the requested width"),
        ("widen", ["--factor", "a=b"], "write FACTOR or PATTERN=FACTOR"),
        ("deepen", ["--at", "layer1.0", "--seed", -3], "seed must be an integer from 0 to 4294967295, not -3"),
        ("deepen", ["--how", "pair"], "deepen pair needs --at"),
        ("deepen", ["--at", "layer1.0", "--how", "pair", "--norm"], "deepen pair has no --norm"),
        ("decompose", ["--at", "conv1", "--kernels", "a"], "write K,K"),
        ("head", ["--outputs", 4, "--split", 1], "options are missing or ambiguous"),
        ("kernel", ["--at", "conv1"], "kernel needs --kernel"),
    ],
)
def test_what_an_option_cannot_be_is_one_line(command, more, message, folder, capsys):
    assert grow(command, "a", "b", *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "b.safetensors").exists()


def one_error(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_damaged_file_is_one_line_and_nothing_is_written(folder, capsys):
    good = (folder / "a.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(b"present")
    (folder / "a.safetensors").write_bytes(good[: len(good) // 2])
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert grow("widen", "a", "b", "--factor", 2) == 2
    assert "a.safetensors: not a readable safetensors file" in one_error(capsys)
    assert run("verify", "a.safetensors", "rgb.safetensors", *NET) == 2
    assert "a.safetensors" in one_error(capsys)
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("command", "source", "target", "more", "message"),
    [
        ("widen", "none", "b.safetensors", ["--factor", 2], "none.safetensors: no such file"),
        ("widen", "rgb", "b.safetensors", ["--factor", 2], "give the model, classes and channels"),
        ("widen", "a", "b.onnx", ["--factor", 2], "the name must end in one of .safetensors"),
        ("widen", "a", "none/b.safetensors", ["--factor", 2], "the folder none does not exist"),
        ("widen", "a", "b.safetensors", ["--factor", 0.5], "narrower"),
        ("widen", "a", "b.safetensors", ["--space", "0=2"], "narrower"),
        ("widen", "a", "b.safetensors", ["--space", "fc.weight:0=9"], "cannot be widened: an output of the network"),
        ("widen", "a", "b.safetensors", ["--space", "77=9"], "no channel space '77'"),
        ("deepen", "a", "b.safetensors", ["--at", "layer9"], "no module 'layer9'"),
        ("deepen", "a", "b.safetensors", ["--at", "layer1", "--kernel", 2], "so that it has a centre tap"),
        ("kernel", "a", "b.safetensors", ["--at", "conv1", "--kernel", 5], "conv1"),
        ("front", "a", "b.safetensors", ["--factor", 2, "--downsample", "antialias"], "cannot be exact"),
        ("head", "a", "b.safetensors", ["--outputs", 2], "already has 2 outputs"),
        ("head", "a", "b.safetensors", ["--outputs", 9, "--at", "layer9"], "no module 'layer9'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(command, source, target, more, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert run(command, "--in", f"{source}.safetensors", "--out", target, *NET, *more) == 2
    assert message in one_error(capsys)
    assert [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"] == before


def test_a_disk_that_fails_leaves_both_files_as_they_were(folder, capsys, monkeypatch):
    assert grow("widen", "a", "b", "--factor", 2) == 0
    before = {p.name: p.read_bytes() for p in folder.glob("b.*")}
    from gigamorph.engine.morph import store

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(store, "_write_safetensors", full)
    capsys.readouterr()
    assert grow("deepen", "b", "b", "--at", "layer1.0") == 2
    assert "no space left" in one_error(capsys)
    assert {p.name: p.read_bytes() for p in folder.glob("b.*")} == before and not list(folder.glob(".*"))


def test_random_weights_only_on_request(folder, capsys):
    target = ("--out", "b.safetensors", *NET, "--factor", 2)
    assert run("widen", *target) == 2
    assert "--random-weights" in one_error(capsys) and not (folder / "b.safetensors").exists()
    assert run("widen", *target, "--random-weights") == 0
    assert (folder / "b.safetensors").exists()


def test_what_is_asked_must_be_said(folder, capsys):
    assert grow("widen", "a", "b") == 2
    assert grow("head", "a", "b") == 2
    assert grow("input", "a", "b") == 2
    assert grow("input", "a", "b", "--to", "rgb", "--planes", 1) == 2
    assert grow("widen", "a", "b", "--space", "0") == 2
    assert not (folder / "b.safetensors").exists()


def test_predict_names_what_a_grown_file_does_not_hold(folder, capsys):
    assert grow("widen", "a", "b", "--factor", 2) == 0
    assert run("widen", "--in", "a.safetensors", "--out", "b.pt", *NET, "--factor", 2) == 0
    capsys.readouterr()
    for name in ("b.safetensors", "b.recipe.json", "b.pt"):
        assert commands.run("predict", name, "image.png", "--out", "out") == 2
        assert lines(capsys.readouterr().err) == [
            f"error: {name}: is a file of gigamorph morph, without the original model, classes and preprocessing; "
            "train it with gigamorph train --init, and use the run's best.ckpt here"
        ]
    assert not (folder / "out").exists()


def test_torch_files(folder, capsys):
    torch.save({"state_dict": {f"net.{k}": v for k, v in read_state("a.safetensors").items()}}, "a.ckpt")
    assert run("widen", "--in", "a.ckpt", "--out", "b.pth", *NET, "--factor", 2) == 0
    assert run("verify", "a.ckpt", "b.pth", *NET) == 0
    assert "equal" in capsys.readouterr().out


def test_spaces_are_listed_and_drawn(folder, capsys):
    assert run("spaces", *NET, "--image", "512x384", "--picture", "s.png") == 0
    out = capsys.readouterr().out
    assert "on images of 512 x 384" in out and "conv1.weight:0" in out and "[an output of the network]" in out
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    grow("widen", "a", "b", "--factor", 2)
    capsys.readouterr()
    assert run("spaces", *NET, "--in", "b.safetensors") == 0
    assert re.search(r"^ +0 +8 ", capsys.readouterr().out, re.M)  # twice as wide


def test_merge_gives_the_narrow_weights_back(folder, capsys):
    assert grow("merge", "a", "c") == 2
    assert "no two channels are exact copies" in one_error(capsys) and not (folder / "c.safetensors").exists()
    assert grow("widen", "a", "b", "--factor", 1.5) == 0
    assert grow("merge", "b", "c") == 0
    old, new = read_state("a.safetensors"), read_state("c.safetensors")
    assert set(old) == set(new) and all(torch.equal(old[n], new[n]) for n in old)
    assert grow("widen", "c", "d", "--factor", 2) == 0
    assert run("verify", "b.safetensors", "d.safetensors", *NET) == 0


@pytest.mark.parametrize("command", sorted(morph.commands))
def test_every_help_has_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"Example: gigamorph morph {command}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_every_example_in_a_help_runs(operation, folder):
    source = "rgb" if "--channels 3" in operation.example else "a"
    if operation.name == "merge":
        assert grow("widen", "a", "w", "--factor", 2) == 0
        source = "w"
    assert grow(operation.name, source, "b", *operation.example.split()) == 0


def test_every_line_of_the_documentation_runs(folder, named_rates, capsys):
    text = (Path(__file__).parents[2] / "docs" / "morph.md").read_text()
    names: dict[str, object] = {}
    verdicts = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S):
        if kind == "python":
            exec(block, names)
            continue
        for line in block.strip().splitlines():
            program, group, *arguments = shlex.split(line)
            capsys.readouterr()
            assert program == "gigamorph" and commands.run(group, *arguments) == 0, line
            out = capsys.readouterr().out
            if group != "morph":
                continue
            if arguments[0] == "spaces":
                assert all(f"    {row}\n" in text for row in out.splitlines())
            if arguments[0] == "verify":
                verdicts.append(lines(out)[0])
    assert verdicts == ["equal", "equal up to the rounding of the stored weights"]
    assert lines(capsys.readouterr().out)[-1] == "(True, 'equal')"


def test_half_precision_files_stay_that(folder, capsys):
    write_state(
        "a.safetensors",
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in read_state("a.safetensors").items()},
    )
    for command, source, target, more in (
        ("widen", "a", "b", ["--factor", 2]),
        ("deepen", "b", "c", ["--at", "layer1.0"]),
        ("front", "c", "d", ["--factor", 2]),
        ("kernel", "d", "e", ["--at", "layer4.0.conv1", "--kernel", 5]),
        ("input", "e", "f", ["--to", "rgb"]),
        ("head", "f", "g", ["--outputs", 3]),
    ):
        assert grow(command, source, target, *more) == 0, command
    assert {t.dtype for t in read_state("g.safetensors").values() if t.is_floating_point()} == {torch.bfloat16}
    capsys.readouterr()
    assert run("verify", "a.safetensors", "g.safetensors", *NET) == 0
    assert lines(capsys.readouterr().out)[0] == "equal"


def test_a_grown_network_is_planned_by_its_file(folder, named_rates, capsys):
    assert grow("widen", "a", "b", "--factor", 2) == 0
    capsys.readouterr()
    assert commands.run("plan", "--model", f"{NET[1]}+b.safetensors", "--size", "256x256", "--channels", 1) == 0
    assert "256" in capsys.readouterr().out
