"""Records in checkpoints, and descriptions of folders, of which anything is missing or something else."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run, train_and_import

import gigamorph
from gigamorph.cli.main import _COMMANDS
from gigamorph.engine.errors import DataError
from gigamorph.engine.models import build_model, create_model
from gigamorph.engine.models.checkpoints import read_state
from gigamorph.engine.morph.files import Origin
from gigamorph.engine.published.layout import part_of_training as imported
from gigamorph.engine.train.checkpoint import load_checkpoint, stored_state
from gigamorph.engine.train.network import start_from
from gigamorph.engine.train.record import scale_warning
from gigamorph.engine.train.target import Target

MODEL = "lesionnet?stages=1"  # two layers: what is read is the record
GONE = object()
JUNK: dict[str, Any] = {
    "missing": GONE,
    "none": None,
    "empty": "",
    "negative": -1,
    "huge": 10**30,
    "list": [],
    "table": {},
    "nan": math.nan,
    "nested": {"a": [{"b": [None, {"c": -1}]}]},
    "nested list": [[["a"], None], {"b": 2}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, a run, its predictions, an imported network."""
    folder = tmp_path_factory.mktemp("stored")
    table = train_and_import(folder, MODEL)
    assert run("predict", folder / "run" / "best.ckpt", table, "--out", folder / "predictions") == 0
    return folder


def places(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in tables and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


def changed(values: Any, place: tuple[Any, ...], junk: Any) -> Any:
    found = copy.deepcopy(values)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    if junk is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = junk
    return found


def stored_with(checkpoint: dict[str, Any], place: tuple[Any, ...], junk: Any, path: Path) -> Path:
    torch.save({**checkpoint, "gigamorph": changed(checkpoint["gigamorph"], place, junk)}, path)
    return path


def _begin(path: Path) -> None:
    Origin.of_file(MODEL, path, 1)
    scale_warning(path, {"normalize": {"mean": [0.5], "std": [0.2]}})
    start_from(create_model(MODEL), path, Target(("0", "1")))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load": gigamorph.load,
    "import": lambda path: imported(read_state(path)),
    "begin": _begin,
    "resume": lambda path: stored_state(load_checkpoint(path), build_model(MODEL), str(path)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_record_with_anything_else_in_it_is_opened_or_refused_in_one_line(loader, folder, tmp_path) -> None:
    """Anything at any place is read by two of the loaders."""
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    if loader != "resume":  # the others read no state of an optimizer, which is most of the file
        checkpoint = {key: checkpoint[key] for key in ("gigamorph", "state_dict")}
    refused, first = 0, list(LOADERS).index(loader)
    for number, place in enumerate((*places(checkpoint["gigamorph"]), ("grown",), ("average",), ("recipe",))):
        for name, junk in list(JUNK.items())[(first + number) % 2 :: 2]:
            if junk is GONE and place[0] not in checkpoint["gigamorph"]:
                continue
            path = stored_with(checkpoint, place, junk, tmp_path / "a.ckpt")
            try:
                LOADERS[loader](path)
            except gigamorph.GigamorphError as error:
                refused += 1
                assert "\n" not in str(error) and str(path) in str(error), (place, name, str(error))
            except Exception as error:
                raise AssertionError((place, name)) from error
    assert refused > 100


def test_a_description_with_anything_else_in_it_is_opened_or_refused_in_one_line(folder, tmp_path) -> None:
    net = shutil.copytree(folder / "net", tmp_path / "net")
    description = json.loads((net / "model.json").read_text())
    refused = 0
    for place in places(description):
        for name, junk in JUNK.items():
            (net / "model.json").write_text(json.dumps(changed(description, place, junk)))
            try:
                gigamorph.load(net)
            except gigamorph.GigamorphError as error:
                refused += 1
                assert "\n" not in str(error) and str(net) in str(error), (place, name, str(error))
            except Exception as error:
                raise AssertionError((place, name)) from error
    assert refused > 100


@pytest.mark.parametrize("argument", ["width=1000000000", "width=100000", "width=-1", "width=1" + "0" * 30])
def test_a_network_that_is_far_larger_than_its_weights_takes_no_memory(argument, folder, tmp_path) -> None:
    checkpoint = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    for model in (f"lesionnet?{argument}", f"resnet18?{argument}"):
        path = stored_with(checkpoint, ("options", "model"), model, tmp_path / "a.ckpt")
        with pytest.raises(DataError) as caught:
            gigamorph.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    net = shutil.copytree(folder / "net", tmp_path / "net")
    description = json.loads((net / "model.json").read_text())
    (net / "model.json").write_text(json.dumps({**description, "model": f"lesionnet?{argument}"}))
    with pytest.raises(gigamorph.GigamorphError) as caught:
        gigamorph.load(net)
    assert "\n" not in str(caught.value)


def test_a_key_is_named(folder, tmp_path) -> None:
    checkpoint = torch.load(folder / "run" / "best.ckpt", weights_only=True)
    for place, junk, told in (
        (("preprocessing", "normalize", "mean"), GONE, "key 'preprocessing.normalize.mean' is missing"),
        (("channels",), "1", "key 'channels' is '1', not a whole number"),
        (("target", "kind"), "x", "key 'target.kind' is 'x'; choose from classes"),
        (("classes",), ["a"], "key 'classes' is"),
    ):
        path = stored_with(checkpoint, place, junk, tmp_path / "a.ckpt")
        with pytest.raises(DataError, match=told) as caught:
            gigamorph.load(path)
        assert str(caught.value).startswith(f"{path}: ")


def calls(folder: Path, bad: Path, out: Path) -> dict[str, list[list[object]]]:
    """By command, the ways in which it opens a checkpoint."""
    table = folder / "phantoms.csv"
    train = ["train", table, "--model", MODEL, "--epochs", "1", "--accumulate", "4"]
    return {
        "predict": [["predict", bad, table, "--out", out]],
        "explain": [["explain", bad, table, "--out", out]],
        "export": [["export", bad, "--to", "huggingface", "--out", out]],
        "import": [["import", bad, "--out", out]],
        "view": [["view", folder / "predictions", "--evidence", bad, "--out", out, "--static"]],
        "train": [[*train, "--init", bad, "--out", out], [*train, "--resume", "--out", bad.parent]],
    }


OTHERS = {"bench", "data", "demo", "doctor", "eval", "morph", "plan", "recipe"}  # they take no checkpoint as a model


@pytest.mark.parametrize(
    "place", [("options",), ("preprocessing", "normalize"), ("split",), ("channels",), ("target",)]
)
def test_every_command_refuses_a_damaged_record_in_one_line(place, folder, tmp_path, capsys) -> None:
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    (tmp_path / "run").mkdir()
    bad = stored_with(checkpoint, place, [], tmp_path / "run" / "last.ckpt")
    tried = calls(folder, bad, tmp_path / "out")
    assert set(tried) == set(_COMMANDS) - OTHERS
    for command in [one for several in tried.values() for one in several]:
        capsys.readouterr()
        code, said = run(*command), capsys.readouterr().err
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        assert (code, len(lines)) == (2, 1) and lines[0].startswith("error: "), (command, said)
        assert str(bad) in lines[0]
        assert place[0] in lines[0] or command[0] == "view"  # it is not the network of the predictions


@pytest.mark.parametrize(
    ("key", "first"),
    [("loops", 0), ("optimizer_states", 1), ("lr_schedulers", 0), ("epoch", 1), ("state_dict", 0), ("callbacks", 1)],
)
def test_a_run_does_not_go_on_with_what_lightning_cannot_restore(key, first, folder, tmp_path, capsys) -> None:
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    command = ["train", folder / "phantoms.csv", "--model", MODEL, "--epochs", "2", "--accumulate", "4"]
    for number, junk in enumerate(list(JUNK.values())[first::2]):
        out = tmp_path / str(number)
        out.mkdir()
        torch.save(changed(checkpoint, (key,), junk), out / "last.ckpt")
        code, said = run(*command, "--resume", "--out", out), capsys.readouterr().err
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        assert code == 0 or (code == 2 and len(lines) == 1 and str(out) in lines[0]), (junk, said)
