"""Names in files that anybody may have made: nothing of their own is imported, called or read, by any command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run, train_and_import

import gigamorph
from gigamorph.cli.main import _COMMANDS
from gigamorph.engine.models import build_model, create_model, load_weights, registry
from gigamorph.engine.morph.activation import activation
from gigamorph.engine.trust import VARIABLE

EVIL = """
import pathlib
from torch import nn
pathlib.Path({mark!r}).write_text("imported")
class Net(nn.Module):
    def __init__(self, num_classes=2, **others):
        super().__init__()
        pathlib.Path({mark!r}).write_text("called")
def fit(*args, **kwargs):
    pathlib.Path({mark!r}).write_text("called")
"""
NAMES = {
    "a function of Python": "os:system?command=touch%20{mark}",
    "a builtin": "builtins:exec?source=open({mark!r},%20'w')",
    "a module of the folder": "evil:Net",
    "a package of the folder": "dl.evil:Net?num_classes=2",
    "what gigamorph imports": "gigamorph.engine.models.own_code:sys",
    "no network of a layout": "gigamorph.engine.mammography.layouts.gmic:evil",
    "no network of torchvision": "torchvision.models:evil",
    "beside torchvision's networks": "torchvision.models._utils:_get_torch_home",
    "a file for timm": "timm:resnet18?checkpoint_path={mark}.pth",
    "what timm fetches": "timm:resnet18?pretrained=true",
    "a relative module": ".evil:Net",
    "a path of a module": "./dl/evil:Net",
    "a folder for timm": "timm:local-dir:{mark}",
    "a repository of torch.hub": "torch.hub:load?repo_or_dir=dl&model=Net&source=local",
    "a line break": "evil\n:Net",
    "a zero byte": "evil\0:Net",
    "half a character": "lesionnet?width=\ud800",
    "a long name": "a" * 300,
    "a very long name": "timm:" + "a" * 10**5,
}


class Run:
    """What pickle calls."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.mark), "unpickled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a table of images, a checkpoint, and an imported network."""
    folder = tmp_path_factory.mktemp("trained")
    train_and_import(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory, in which the hostile modules lie."""
    mark = tmp_path / "mark"
    (tmp_path / "dl").mkdir()
    for file in (tmp_path / "evil.py", tmp_path / "dl" / "evil.py"):
        file.write_text(EVIL.format(mark=str(mark)))
    torch.save({"state_dict": Run(str(mark))}, f"{mark}.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield tmp_path
    for name in ("evil", "dl", "dl.evil"):
        sys.modules.pop(name, None)


def hostile(trained: Path, place: Path, name: str) -> tuple[Path, Path]:
    """A checkpoint and an imported folder that name it."""
    stored = torch.load(trained / "run" / "best.ckpt", weights_only=True)
    stored["gigamorph"]["options"]["model"] = name
    torch.save(stored, place / "best.ckpt")
    net = place / "net"
    net.mkdir()
    for file in (trained / "net").iterdir():
        (net / file.name).write_bytes(file.read_bytes())
    described = json.loads((net / "model.json").read_text())
    (net / "model.json").write_text(json.dumps({**described, "model": name}))
    return place / "best.ckpt", net


def calls(trained: Path, checkpoint: Path, net: Path) -> dict[str, list[list[object]]]:
    """By command, all ways in which it opens a checkpoint or folder."""
    table, out = trained / "phantoms.csv", checkpoint.parent / "out"
    size = ["--size", "128x96"]
    ensemble = checkpoint.parent / "ensemble"
    assert run("import", net, net, "--out", ensemble) == 0  # it opens none of them
    given = [checkpoint, net, ensemble]
    config = checkpoint.parent / "config.toml"
    model = json.loads((net / "model.json").read_text())["model"]
    config.write_text(f"model = {json.dumps(model)}\n")
    return {
        "predict": [["predict", one, table, "--out", out] for one in given],
        "explain": [["explain", one, table, "--out", out] for one in given],
        "export": [["export", one, "--to", to, "--out", out] for one in given for to in ("huggingface", "onnx")],
        "import": [
            ["import", checkpoint, "--out", out],
            ["import", "lesionnet", "--weights", f"{checkpoint.parent}/mark.pth", "--out", out],
        ],
        "view": [["view", trained / "predictions", "--evidence", one, "--out", out, "--static"] for one in given],
        "train": [
            ["train", table, "--model", net, "--out", out],
            ["train", table, "--init", net, "--out", out],
            ["train", table, "--config", config, "--out", out],
        ],
        "plan": [["plan", "--model", net, *size]],
        "morph": [
            ["morph", "spaces", "--model", net],
            ["morph", "widen", "--model", net, "--factor", "1.5", "--out", out / "a.safetensors"],
        ],
        "bench": [["bench", "step", "--model", net, *size, "--peer", "stock", "--rounds", "1"]],
    }


WITHOUT_NETWORKS = {"data", "demo", "doctor", "eval", "recipe"}


@pytest.mark.parametrize("kind", ["a function of Python", "a package of the folder"])  # of the others see the functions
def test_no_command_runs_what_a_file_names(kind: str, trained: Path, place: Path, capsys, request) -> None:
    if kind != "a package of the folder":  # where a new interpreter looks for modules plays no part
        request.getfixturevalue("forked_peers")
    mark = place / "mark"
    checkpoint, net = hostile(trained, place, NAMES[kind].format(mark=str(mark)))
    if not (trained / "predictions").exists():
        assert (
            run("predict", trained / "run" / "best.ckpt", trained / "phantoms.csv", "--out", trained / "predictions")
            == 0
        )
    tried = calls(trained, checkpoint, net)
    assert set(tried) == set(_COMMANDS) - WITHOUT_NETWORKS
    before = dict(os.environ)
    for command in [one for several in tried.values() for one in several]:
        capsys.readouterr()
        code, said = run(*command), capsys.readouterr().err
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        assert (code, len(lines)) == (2, 1) and lines[0].startswith("error: "), (command, said)
        assert not mark.exists(), command
        assert not any(name in sys.modules for name in ("evil", "dl.evil"))
    assert dict(os.environ) == before


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "load a checkpoint": lambda checkpoint, net: gigamorph.load(checkpoint),
    "load a folder": lambda checkpoint, net: gigamorph.load(net),
    "create_model of a folder": lambda checkpoint, net: create_model(str(net)),
    "load_weights of a folder": lambda checkpoint, net: load_weights(create_model("lesionnet"), net),
    "build_model": lambda checkpoint, net: build_model(json.loads((net / "model.json").read_text())["model"]),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", NAMES)
def test_no_function_runs_what_a_file_names(kind: str, loader: str, trained: Path, place: Path) -> None:
    mark = place / "mark"
    checkpoint, net = hostile(trained, place, NAMES[kind].format(mark=str(mark)))
    with pytest.raises(gigamorph.GigamorphError) as caught:
        LOADERS[loader](checkpoint, net)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000 and not mark.exists()


OWN = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes=2, in_channels=1):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_networks_of_ones_own(trained: Path, place: Path, monkeypatch, capsys) -> None:
    """They are trained by name; their checkpoints are opened again with one word of trust."""
    (place / "mine.py").write_text(OWN)
    table = trained / "phantoms.csv"
    command = ["train", table, "--model", "mine:Net", "--epochs", "1", "--out", place / "run"]
    assert run(*command) == 0
    best = place / "run" / "best.ckpt"

    def predicts(*extra: str) -> bool:
        capsys.readouterr()
        code = run("predict", best, table, "--out", place / "out", "--overwrite", *extra)
        said = capsys.readouterr().err
        if code:
            assert code == 2 and "--trust" in said and "'mine'" in said and said.count("\n") == 1, said
        return not code

    def without() -> None:
        monkeypatch.setenv(VARIABLE, "")
        assert not predicts()

    assert predicts()  # it was typed in this process
    without()
    assert predicts("--trust")
    without()
    monkeypatch.setenv(VARIABLE, "others, mine")
    assert predicts()
    without()
    own = place / "config" / "gigamorph" / "config.toml"
    own.parent.mkdir(parents=True)
    own.write_text('trust = ["mine"]\n')
    assert predicts()
    own.write_text('trust = "mine"\n')
    monkeypatch.setenv(VARIABLE, "")
    assert run("predict", best, table, "--out", place / "out", "--overwrite") == 2
    own.unlink()
    without()
    with pytest.raises(gigamorph.UntrustedError, match="trust=True"):
        gigamorph.load(best)
    assert gigamorph.load(best, trust=True).classes
    with pytest.raises(PermissionError):
        gigamorph.load(best)
    assert run(*command, "--resume") == 0  # it is typed again
    without()
    assert run("train", table, "--out", place / "run", "--resume") == 2
    assert run("train", table, "--out", place / "run", "--resume", "--trust") == 0


def test_a_package_is_trusted_with_its_parts_and_not_with_its_namesakes(place: Path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "dl")
    assert isinstance(build_model("dl.evil:Net"), torch.nn.Module)
    with pytest.raises(gigamorph.UntrustedError):
        build_model("dlx:Net")


def test_networks_of_torchvision_need_no_trust_and_import_nothing_of_the_folder(place: Path, monkeypatch) -> None:
    paths: list[list[str]] = []
    imported = registry.imported
    monkeypatch.setattr(registry, "imported", lambda *given: paths.append(list(sys.path)) or imported(*given))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert isinstance(build_model("torchvision.models:resnet18"), torch.nn.Module)
    assert isinstance(create_model("evil:Net"), torch.nn.Module)
    assert [str(place) in path for path in paths] == [False, True]


def test_settings_that_are_typed_are_trusted(trained: Path, place: Path, capsys) -> None:
    command = ["train", trained / "phantoms.csv", "--print-config", "-o"]
    assert run(*command, "model=mine:Net") == 0 and os.environ[VARIABLE] == "mine"
    assert run(*command, 'log=["others:Log"]') == 0 and os.environ[VARIABLE] == "mine,others"
    capsys.readouterr()
    assert run(*command, "model=3") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_activation_that_is_nested_too_deeply() -> None:
    with pytest.raises(gigamorph.MorphError):
        activation("(" * 100_000)
