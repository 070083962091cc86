"""Recipes: the architecture rebuilt from JSON, the grown weights loaded strictly, weights grown in files."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from extra_memory import grow as grow_weights
from forked import Forked
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from morph_networks import half_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import LesionNet, resnet18
from gigamorph.engine.morph.activation import insert_activation
from gigamorph.engine.morph.decompose import decompose, insert_module, split_parallel
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.head import grow_head, split_class
from gigamorph.engine.morph.inputs import add_planes
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.recipe import Fingerprint, Morph, Recipe, apply, fingerprint, grow, grow_file
from gigamorph.engine.morph.step import known, to_json
from gigamorph.engine.morph.store import SafetensorsFile, read_state, write_state
from gigamorph.engine.morph.volume import to_volume
from gigamorph.engine.morph.widen import widen

Grow = Callable[[nn.Module, Tensor], tuple[nn.Module, Any]]

# Every morph that a recipe may hold, by its name, on a ResNet with `conv1`, `layer1.0.relu` and `fc`.
MORPHS: dict[str, Grow] = {
    "front": lambda m, x: front(m, x, 4, "stages"),
    "front fold": lambda m, x: front(m, x, 3, "fold"),
    "front residual": lambda m, x: front(m, x, 2, "residual"),
    "front keep": lambda m, x: front(m, x, 3, "keep", downsample="antialias"),
    "widen": lambda m, x: widen(m, x, factor=1.5, seed=3),
    "widen free": lambda m, x: widen(m, x, {0: [1, 2, 1, 3]}, free={"conv1.weight:0": 2}, split="kraft"),
    "activation": lambda m, x: insert_activation(m, x, "conv1"),
    "identity": lambda m, x: insert_identity(m, x, "layer1.0.relu"),
    "pair": lambda m, x: insert_pair(m, x, "layer1.0.conv2"),
    "residual": lambda m, x: insert_residual(m, x, "layer2.0"),
    "decompose": lambda m, x: decompose(m, x, "layer1.0.conv2"),
    "module": lambda m, x: insert_module(m, x, "layer1.0"),
    "parallel": lambda m, x: split_parallel(m, x, "conv1"),
    "kernel": lambda m, x: grow_kernel(m, x, "layer1.0.conv1", 5),
    "inputs": lambda m, x: add_planes(m, torch.cat([x, x], 1), 1),
    "head": lambda m, x: grow_head(m, x, "fc", 5),
    "merge": lambda m, x: merge(m, x),
    "split_class": lambda m, x: split_class(m, x, "fc", 1),
    "volume": lambda m, x: to_volume(m, x),
}


def network(num_classes: int = 3) -> nn.Module:
    return half_resnet(num_classes, 1, 4)


def trained() -> nn.Module:
    """Random weights; two channels of one inner space are copies, so that they can be merged."""
    torch.manual_seed(0)
    model = randomize(network()).eval()
    first = model.layer1[0]
    with torch.no_grad():
        for tensor in (first.conv1.weight, *first.bn1.state_dict().values()):
            if tensor.dim():
                tensor[1] = tensor[0]
    return model


def grown(name: str) -> tuple[nn.Module, nn.Module, Recipe]:
    return copy.deepcopy(_grown(name))


@functools.cache
def _grown(name: str) -> tuple[nn.Module, nn.Module, Recipe]:
    parent = trained()
    child, report = MORPHS[name](parent, torch.zeros(1, 1, 32, 32))
    recipe = Recipe()
    recipe.add(report, parent, child)
    return parent, child, recipe


def same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_all_known_morphs_are_tested() -> None:
    assert {name.split()[0] for name in MORPHS} == set(known())


@pytest.fixture(scope="module", params=MORPHS)
def every(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Recipe]:
    return grown(request.param)


class TestEveryMorph:
    def test_rebuilt_and_loaded(self, every: tuple[nn.Module, nn.Module, Recipe], tmp_path: Path) -> None:
        _, child, recipe = every
        child = copy.deepcopy(child)
        recipe.save(tmp_path / "recipe.json")
        write_state(tmp_path / "child.safetensors", child.state_dict())
        torch.manual_seed(7)  # other random weights: only their shapes may count
        fresh = network()
        before = fingerprint(fresh.state_dict())
        again = apply(Recipe.load(tmp_path / "recipe.json"), fresh)
        again.load_state_dict(read_state(tmp_path / "child.safetensors"), strict=True)
        assert fingerprint(fresh.state_dict()) == before
        assert fingerprint(again.state_dict()) == recipe.morphs[-1].child
        step = recipe.morphs[0].step
        r = getattr(step, "r", 1)
        depth = (3,) if step.op == "volume" else ()
        x = torch.randn(2, 2 if step.op == "inputs" else 1, *depth, 32 * r, 32 * r)
        for mode in (False, True):
            torch.manual_seed(0)
            want = child.train(mode)(x)
            torch.manual_seed(0)
            assert torch.equal(again.train(mode)(x), want)

    def test_weights_alone(self, every: tuple[nn.Module, nn.Module, Recipe], tmp_path: Path) -> None:
        parent, child, recipe = every
        before = fingerprint(parent.state_dict())
        with torch.device("meta"):
            empty = network()
        same(grow(recipe, empty, parent.state_dict()), child.state_dict())
        assert fingerprint(parent.state_dict()) == before
        source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        write_state(source, parent.state_dict())
        data = source.read_bytes()
        grow_file(recipe, empty, source, target)
        found = SafetensorsFile(target)
        same({n: found[n] for n in child.state_dict()}, child.state_dict())
        assert len(found) == len(child.state_dict())
        assert Recipe.from_json(found.metadata["recipe"]) == recipe
        assert source.read_bytes() == data
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_recipes_that_were_written_before_are_read() -> None:
    """Files of the first version, one of each morph: they say what they said and rebuild what they did."""
    written = json.loads(Path(__file__).with_name("recipes_version_1.json").read_text())
    assert list(written) == list(MORPHS)
    for name, data in written.items():
        recipe = Recipe.from_json(json.dumps(data))
        assert json.loads(recipe.to_json()) == data, name
        child = apply(recipe, resnet18(3, 1, width=4))
        assert fingerprint(child.state_dict()).shapes == data["morphs"][0]["child"]["shapes"], name


class TestChain:
    @settings(max_examples=4, deadline=None, phases=[Phase.generate])
    @given(data=st.data())
    def test_random_chains(self, data: Any, tmp_path_factory: Any) -> None:
        path = tmp_path_factory.mktemp("chain")
        parent, recipe = trained(), Recipe()
        x = torch.zeros(1, 1, 32, 32)
        model, fronted = parent, False
        names = [n for n in MORPHS if n not in ("widen free", "inputs", "split_class", "front keep", "volume")]
        for name in data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True)):
            if name.startswith("front"):
                if fronted:
                    continue
                fronted = True
            try:
                child, report = MORPHS[name](model, x)
            except MorphError:  # the layer has become something else
                continue
            recipe.add(report, model, child)
            model = child
            x = torch.zeros(1, 1, *(int(s * getattr(report.step, "r", 1)) for s in x.shape[2:]))
        recipe = Recipe.from_json(recipe.to_json())
        again = apply(recipe, network())
        again.load_state_dict(model.state_dict(), strict=True)
        write_state(path / "a.safetensors", parent.state_dict())
        grow_file(recipe, network(), path / "a.safetensors", path / "a.safetensors")
        found = SafetensorsFile(path / "a.safetensors")
        same({n: found[n] for n in model.state_dict()}, model.state_dict())
        same(grow(recipe, network(), parent.state_dict()), model.state_dict())
        assert [p.name for p in path.iterdir()] == ["a.safetensors"]

    def test_end_to_end(self, tmp_path: Path) -> None:
        """Train small, widen by half, deepen, a front for images four times as large, kernel 3 to 5 (A9)."""
        torch.manual_seed(0)
        parent = LesionNet(num_classes=2)
        optimizer = torch.optim.SGD(parent.parameters(), 0.01, momentum=0.9)
        for _ in range(20):
            x, y = torch.randn(4, 1, 32, 32), torch.randint(0, 2, (4,))
            optimizer.zero_grad()
            F.cross_entropy(parent(x), y).backward()
            optimizer.step()
        small, large = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 128, 128)
        recipe, model = Recipe(), parent
        steps: list[Callable[[nn.Module], tuple[nn.Module, Any]]] = [
            lambda m: widen(m, small, factor=1.5),
            lambda m: insert_pair(m, small, "stages.0.1", "GELU"),
            lambda m: front(m, small, 4, "stages"),
            lambda m: grow_kernel(m, large, "stages.1.0", 5),
        ]
        for step in steps:
            child, report = step(model)
            recipe.add(report, model, child)
            model = child
        recipe.save(tmp_path / "r.json")
        write_state(tmp_path / "w.safetensors", model.state_dict())
        again = apply(Recipe.load(tmp_path / "r.json"), LesionNet(num_classes=2))
        again.load_state_dict(read_state(tmp_path / "w.safetensors"), strict=True)
        same(again.state_dict(), model.state_dict())
        # The float32 weights as stored, computed with in float64: what is left is the order of the sums.
        again, x = again.double(), torch.randn(2, 1, 128, 128, dtype=torch.float64)
        want = parent.double()(F.avg_pool2d(x, 4))
        assert (again(x) - want).abs().max() <= 1e-11 * want.abs().max()
        assert_exact(again, torch.randn(1, 1, 148, 172, dtype=torch.float64), tile=(48, 64))

    def test_every_morph_must_be_added(self) -> None:
        parent, child, recipe = grown("kernel")
        other, report = MORPHS["head"](child, torch.zeros(1, 1, 32, 32))
        with pytest.raises(MorphError, match=r"head: its parent has other parameters.*\(kernel\)"):
            recipe.add(report, parent, other)
        recipe.add(report, child, other)
        assert [m.step.op for m in recipe.morphs] == ["kernel", "head"]


class TestHashes:
    def test_they_see_every_change(self) -> None:
        state = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
        base = fingerprint(state)
        assert fingerprint(dict(reversed(state.items()))) == base  # the order does not count
        for other in (
            {**state, "a": torch.zeros(3, 2)},
            {"A": state["a"], "b": state["b"]},
            {"a": state["a"]},
            {**state, "b": torch.zeros(3).reshape(1, 3)},
        ):
            assert fingerprint(other).shapes != base.shapes and fingerprint(other).contents != base.contents
        for other in ({**state, "b": torch.tensor([0.0, -0.0, 0.0])}, {**state, "b": torch.zeros(3).double()}):
            assert fingerprint(other).shapes == base.shapes and fingerprint(other).contents != base.contents

    def test_contents(self) -> None:
        _, child, recipe = grown("kernel")
        known = recipe.morphs[-1].child
        assert fingerprint(child.state_dict()) == known
        with torch.no_grad():
            child.fc.bias[0] += 1
        assert fingerprint(child.state_dict()).contents != known.contents


class TestRefusals:
    def test_another_architecture(self) -> None:
        _, _, recipe = grown("front")
        with pytest.raises(
            MorphError, match=r"recipe step 1 \(front\): the network has other parameter names or shapes"
        ):
            apply(recipe, network(4))
        with pytest.raises(MorphError, match="do not fit"):
            grow(recipe, network(), network(4).state_dict())
        _, _, recipe = grown("widen")
        with pytest.raises(MorphError, match="do not fit"):
            grow(recipe, network(), network(4).state_dict())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not JSON"),
            ("[1, 2", "not JSON"),
            ("[]", "not a recipe"),
            ('{"format": "gigamorph recipe", "version": 99}', "version 99.*update"),
            ('{"format": "gigamorph recipe", "version": 1}', "damaged.*morphs"),
            ('{"format": "gigamorph recipe", "version": 1, "morphs": [{"step": {}}]}', "damaged"),
            ('{"format": "gigamorph recipe", "version": 1, "morphs": 3}', "damaged"),
        ],
    )
    def test_damaged_recipes(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "r.json"
        path.write_text(text)
        with pytest.raises(MorphError, match=message) as caught:
            Recipe.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_missing_or_binary_file(self, tmp_path: Path) -> None:
        with pytest.raises(MorphError, match="cannot be read"):
            Recipe.load(tmp_path / "none.json")
        (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(MorphError, match="cannot be read"):
            Recipe.load(tmp_path / "b.json")

    @pytest.mark.parametrize("name", ["front", "front fold", "kernel", "widen", "head", "pair"])
    def test_damaged_steps(self, name: str, tmp_path: Path) -> None:
        """Whatever is missing or wrong in a step: a MorphError in one line, files and network untouched."""
        parent, _, recipe = grown(name)
        source = tmp_path / "a.safetensors"
        write_state(source, parent.state_dict())
        data = source.read_bytes()
        (morph,) = recipe.morphs
        wrong: dict[str, Any] = {
            "paths": ["nothing"],
            "at": ["layer1"],
            "path": "fc.x",
            "kernel": 2,
            "copies": {"x:0": [1]},
        }
        good = to_json(morph.step)
        broken = [
            {k: v for k, v in good.items() if k != key} for key in good if key not in ("op", "bias")
        ]  # older heads lack it
        broken += [{**good, key: value} for key, value in wrong.items() if key in good]
        broken += [{**good, "op": "melt"}, {**good, "extra": 1}]
        for step in broken:
            fresh = network()
            written = json.loads(recipe.to_json())
            written["morphs"][0]["step"] = step
            text = json.dumps(written)
            for call in (
                lambda text=text, fresh=fresh: apply(Recipe.from_json(text), fresh),
                lambda text=text, fresh=fresh: grow_file(Recipe.from_json(text), fresh, source, source),
            ):
                with pytest.raises(MorphError) as caught:
                    call()
                assert "\n" not in str(caught.value), step
            assert type(fresh.conv1) is nn.Conv2d
        assert source.read_bytes() == data
        assert list(tmp_path.iterdir()) == [source]

    def test_a_wrong_child_hash(self) -> None:
        _, _, recipe = grown("kernel")
        (morph,) = recipe.morphs
        bad = Recipe([Morph(morph.step, morph.parent, Fingerprint("0" * 64, "0" * 64))])
        with pytest.raises(MorphError, match="did not give the recorded"):
            apply(bad, network())

    def test_a_step_that_is_no_json(self) -> None:
        parent = network()
        _, report = MORPHS["kernel"](parent, torch.zeros(1, 1, 32, 32))
        report = replace(report, step=replace(report.step, kernel=torch.ones(2)))
        with pytest.raises(MorphError, match="kernel: the step is not plain JSON"):
            Recipe().add(report, parent, parent)

    def test_no_pickle(self) -> None:
        """A recipe is text: what it does not know by name it cannot run."""
        _, _, recipe = grown("front")
        assert set(json.loads(recipe.to_json())["morphs"][0]) == {"step", "parent", "child"}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
class TestMemory:
    def test_a_file_grows_without_the_model_in_memory(self, tmp_path: Path) -> None:
        """By a kernel, a front and by widening: a few tensors of 2.4 MB each are in memory, not the file's 66 MB."""
        process = Forked(grow_weights, str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), 28, 256)
        assert process.wait() == 0, process.error
        size, *extra = (int(word) for word in process.output.split())
        assert len(extra) == 3 and max(extra) < 38_000_000 < 0.6 * size, (size, extra)
