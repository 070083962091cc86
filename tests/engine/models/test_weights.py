"""State dicts of others: found, never executed, and refused by name."""

import argparse
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gigamorph.engine.errors import DataError
from gigamorph.engine.models.weights import load_exactly, read_state, renamed, subtree


def network():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1)))


class Config:
    """Of a package that is not there when the checkpoint is read."""

    def __init__(self):
        self.depth = {"a": [1, 2]}


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_in_checkpoints(tmp_path, legacy):
    state, path = network().state_dict(), tmp_path / "w.tar"
    other = {name: value + 1 for name, value in state.items()}
    for place, stored in {
        "": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 1}},
        "state_dict_ema": {"state_dict": other, "state_dict_ema": state, "arch": "resnet18"},
    }.items():
        torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
        found = read_state(path)
        assert found.place == place and list(found.tensors) == list(state)
        assert all(torch.equal(found.tensors[name], value) for name, value in state.items())


def test_wrappers_of_ddp_and_compile_are_dropped(tmp_path):
    state = {f"_orig_mod.module.{name}": value for name, value in network().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert list(read_state(tmp_path / "w.pt").tensors) == list(network().state_dict())


def test_foreign_objects_in_a_checkpoint_are_inert(tmp_path):
    """timm keeps an argparse.Namespace, Hydra its configuration."""
    stored = {"state_dict": network().state_dict(), "args": argparse.Namespace(model="x"), "config": Config()}
    torch.save(stored, tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)
    found = read_state(tmp_path / "w.pth")
    assert list(found.tensors) == list(network().state_dict())
    assert not isinstance(found.rest["args"], argparse.Namespace) and not isinstance(found.rest["config"], Config)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickled_module_is_refused_and_nothing_in_it_runs(tmp_path, form):
    target, path = tmp_path / "ran", tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (target,))

    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"model": network(), "more": Evil()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(DataError, match=r"evil\.pt") as caught:
        read_state(path)
    assert not target.exists() and "--trust" in str(caught.value)


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(DataError, match="no such weights file"):
        read_state(tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(DataError, match=f"{re.escape(name)}: not a readable"):
            read_state(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds no state_dict"):
        read_state(tmp_path / "list.pt")


def test_missing_and_other_names_are_listed_with_the_nearest():
    state = network().state_dict()
    state = {name.replace("norm.", "bn."): value for name, value in state.items()}
    with pytest.raises(DataError) as caught:
        load_exactly(network(), state, Path("w.pt"))
    message = str(caught.value)
    assert "4 names are of the model missing in the file: norm.weight (nearest: bn.weight)" in message
    assert "5 names are of the file not in the model: bn.weight (nearest: norm.weight)" in message
    assert "\n" not in message


def test_at_most_ten_names_are_listed():
    state = network().state_dict() | {f"text.{i}": torch.zeros(1) for i in range(25)}
    with pytest.raises(DataError) as caught:
        load_exactly(network(), state, Path("w.pt"))
    listed = str(caught.value)
    assert listed.count("text.") == 10 and "and 15 more" in listed


def test_shapes_and_values_that_are_not_finite_are_named():
    state = network().state_dict()
    state["head.weight"] = torch.zeros(3, 4, 1, 1)
    state["conv.weight"][0, 0, 1] = torch.tensor([torch.nan, torch.inf, 1.0])
    with pytest.raises(DataError) as caught:
        load_exactly(network(), state, Path("w.pt"))
    assert "1 of other shape: head.weight is (3, 4, 1, 1), the model has (2, 4, 1, 1)" in str(caught.value)
    assert "2 values are NaN or infinite, in conv.weight" in str(caught.value)


def test_weights_in_half_precision_and_without_counters_load(tmp_path):
    state = {n: v.half() for n, v in network().state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    found = network()
    load_exactly(found, read_state(tmp_path / "w.safetensors").tensors, tmp_path)
    assert found.conv.weight.dtype == torch.float32 and torch.equal(found.conv.weight, state["conv.weight"].float())


def test_a_sub_tree_and_renamed_weights():
    state = {f"image_encoder.{n}": v for n, v in network().state_dict().items()} | {"text.weight": torch.zeros(2)}
    assert list(subtree(state, "image_encoder", Path("w"))) == list(network().state_dict())
    with pytest.raises(DataError, match=r"no weight begins with 'tower\.'; they begin with image_encoder\., text\."):
        subtree(state, "tower", Path("w"))
    found = renamed({"backbone.a": 1, "linear.b": 2, "c": 3}, (("backbone.", ""), ("linear.", "fc.")))
    assert found == {"a": 1, "fc.b": 2, "c": 3}
