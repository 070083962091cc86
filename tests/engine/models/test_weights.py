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

from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.models.checkpoints import read_state
from gigamorph.engine.models.weights import load_exactly, renamed, subtree, unwrapped


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


def test_weights_are_found_in_nested_checkpoints(tmp_path):
    state, path = network().state_dict(), tmp_path / "w.pt"
    other = {name: value + 1 for name, value in state.items()}
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1}]}
    for place, stored in {
        "model.state_dict": {"model": {"state_dict": state, "args": {"width": 4}}, "optimizer": optimizer},
        "checkpoint": {"checkpoint": state, "epoch": 3},
        "weights": {"weights": state},
        "params_ema": {"params": other, "params_ema": state},
        "ema": {"net": other, "ema": state},
        "params": {"params": state},
        "module": {"module": state, "optimizer": optimizer, "ds_version": "0.9"},
        "state_dict": {"weights": {"malignant": torch.ones(1)}, "state_dict": state},
        "state_dict.model_ema": {"state_dict": {"model": other, "model_ema": state}},
    }.items():
        torch.save(stored, path)
        found = read_state(path)
        assert found.place == place and torch.equal(found.tensors["conv.weight"], state["conv.weight"])
        others = {
            "params_ema": "params",
            "ema": "net",
            "state_dict.model_ema": "state_dict.model",
            "state_dict": "weights",
        }
        assert found.others == ((others[place],) if place in others else ())


def test_weights_in_several_places_are_named_and_the_prefix_chooses(tmp_path):
    state, path = network().state_dict(), tmp_path / "w.pt"
    other = {f"encoder.{name}": value + 1 for name, value in state.items()}
    cases = (
        ({"net": state, "model": other}, "net", "model.encoder"),
        ({"generator": state, "discriminator": other, "epoch": 3}, "generator", "discriminator.encoder"),
        ({"model_ema": state, "model": other}, "conv", "model.encoder"),
        ({"model_ema": other, "other": state}, "other", "encoder"),
    )
    for stored, _, _ in cases[:2]:
        torch.save(stored, path)
        with pytest.raises(
            DataError, match=r"w\.pt: contains weights under \w+, \w+; select one of these keys, .* --prefix \w+$"
        ):
            read_state(path)
    for stored, one, two in cases:
        torch.save(stored, path)
        assert read_state(path, one).tensors.keys() <= {*state, "weight", "bias"}
        names = list(read_state(path, two).tensors)
        assert names == list(state) and not any(name.startswith("encoder.") for name in names)
    torch.save({"mine": state, "epoch": 3}, path)
    with pytest.raises(DataError, match=r"w\.pt: contains weights under mine; .* --prefix mine$"):
        read_state(path)
    assert list(read_state(path, "mine").tensors) == list(state)
    torch.save({"model": state, "model_ema": state}, path)
    with pytest.raises(DataError, match=r"no weight begins with 'gone\.'"):
        read_state(path, "gone")
    assert read_state(path, "model").place == "model"  # which is not averaged


@pytest.mark.parametrize("wrappers", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "_orig_mod."])
def test_wrappers_of_ddp_and_compile_are_dropped(wrappers):
    own = network().state_dict()
    state = {f"{wrappers}{name}": value for name, value in own.items()}
    assert list(unwrapped(state)) == list(unwrapped(state, own)) == list(own)


def test_a_compiled_part_loses_its_wrapper():
    own = network().state_dict()
    state = {f"conv._orig_mod.{n}" if (n := name.removeprefix("conv.")) != name else name: v for name, v in own.items()}
    assert list(unwrapped(state, own)) == list(own)


def test_an_averaged_model_counts_nothing(tmp_path):
    made = network()
    average = torch.optim.swa_utils.AveragedModel(made)
    torch.save({"model": made.state_dict(), "model_ema": average.state_dict()}, tmp_path / "w.pt")
    found = read_state(tmp_path / "w.pt")
    assert found.place == "model_ema" and found.others == ("model",) and "n_averaged" in found.tensors
    assert list(unwrapped(found.tensors, made.state_dict())) == list(made.state_dict())


def test_what_the_networks_own_names_have_is_no_wrapper():
    """A network whose child is called module, plain and in wrappers; one of which not every name has the wrapper."""
    own = {"module.weight": torch.zeros(1), "module.bias": torch.zeros(1)}
    for wrapper in ("", "module.", "_orig_mod.", "module._orig_mod."):
        assert list(unwrapped({wrapper + name: value for name, value in own.items()}, own)) == list(own)
    own = {"module.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert list(unwrapped(own)) == list(own)
    assert list(unwrapped({f"module.{name}": value for name, value in own.items()}, own)) == list(own)


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
    for name in ("pointer.safetensors", "pointer.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match=f"{re.escape(name)}: is a Git LFS pointer, not the weights"):
            read_state(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="contains no state_dict"):
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


def test_parts_of_one_tensor_are_weights_of_their_own():
    """As wrappers store them that put all parameters into one flat tensor."""
    flat, found = torch.zeros(4), nn.Module()
    found.first, found.second = nn.Parameter(flat[:2]), nn.Parameter(flat[2:])
    load_exactly(found, {"first": torch.ones(2), "second": torch.full((2,), 2.0)}, Path("w.pt"))
    assert flat.tolist() == [1, 1, 2, 2]


def test_floats_of_8_bits_load_and_numbers_among_tensors_are_passed_over(tmp_path):
    state = {n: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for n, v in network().state_dict().items()}
    torch.save({**state, "epoch": 3, "arch": "mine"}, tmp_path / "w.pt")
    read, found = read_state(tmp_path / "w.pt"), network()
    load_exactly(found, read.tensors, tmp_path)
    assert read.extras == ("epoch", "arch") and torch.equal(found.conv.weight, state["conv.weight"].float())
    state["conv.weight"] = torch.full((4, 1, 3, 3), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(DataError, match=r"36 values are NaN or infinite, in conv\.weight$"):
        load_exactly(found, state, tmp_path)


def test_numbers_of_another_kind_are_refused():
    """They would lose their imaginary part, or the scale that integers had."""
    state = network().state_dict()
    state |= {"conv.weight": state["conv.weight"].to(torch.complex64), "conv.bias": state["conv.bias"].to(torch.int8)}
    state["head.bias"] = state["head.bias"].to_sparse()
    with pytest.raises(DataError) as caught:
        load_exactly(network(), state, Path("w.pt"))
    assert "3 of another kind, whose conversion would lose information: conv.weight is complex64, the" in str(
        caught.value
    )
    assert "conv.bias is int8, the model has float32, head.bias is float32 (torch.sparse_coo)" in str(caught.value)
    with pytest.raises(GigamorphError, match=r"Sequential: 0.weight has no shape before its first forward"):
        load_exactly(nn.Sequential(nn.LazyConv2d(4, 3)), state, Path("w.pt"))


def test_a_sub_tree_and_renamed_weights():
    state = {f"image_encoder.{n}": v for n, v in network().state_dict().items()} | {"text.weight": torch.zeros(2)}
    assert list(subtree(state, "image_encoder", Path("w"))) == list(network().state_dict())
    with pytest.raises(DataError, match=r"no weight begins with 'tower\.'; existing prefixes: image_encoder\., text\."):
        subtree(state, "tower", Path("w"))
    found = renamed({"backbone.a": 1, "linear.b": 2, "c": 3}, (("backbone.", ""), ("linear.", "fc.")))
    assert found == {"a": 1, "fc.b": 2, "c": 3}
