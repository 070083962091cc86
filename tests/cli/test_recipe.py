"""``gigamorph recipe`` and ``gigamorph train --recipe``, with a recipe of two lines."""

import json
import pickle
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
from commands import run

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography import recipes
from gigamorph.engine.mammography.recipes.claims import Effect, Rule, Synthetic
from gigamorph.engine.mammography.recipes.recipe import MethodRecipe
from gigamorph.engine.models import build_model
from gigamorph.engine.trust import VARIABLE


@dataclass(frozen=True)
class Config:
    rate: float = 0.5


@pytest.fixture
def toy(monkeypatch):
    """A recipe that notes what it was called with, and whose claim holds with the first seeds only."""
    calls = []

    def train(table, config, run):
        calls.append((table, config, run))
        if config.rate == 13:
            raise GigamorphError("no luck")
        return {"auc": 0.75, "rbf": {"test": {"auc": 0.625}}, "rows": [{"a": 1}], "versions": {"torch": "2"}}

    def rows(run):
        return [{"seed": run.seed, "auc": 0.9 - run.seed / 10, "other": 0.5, "kind": "x"}]

    synthetic = Synthetic("it learns", Rule((Effect("auc", "other"),), (("auc", 0.6),)), rows)
    module = ModuleType("toy")
    module.RECIPE = MethodRecipe("toy", "Toy", "Nobody, 2000", Config, train, synthetic)
    monkeypatch.setitem(sys.modules, "gigamorph.engine.mammography.recipes.toy", module)
    monkeypatch.setitem(recipes.RECIPES, "toy", "A recipe for tests.")
    of_others = recipes.default_text
    monkeypatch.setattr(
        recipes, "default_text", lambda name: "rate = 0.5  # Table 1\n" if name == "toy" else of_others(name)
    )
    return calls


def test_list_configuration_and_unknown_name(toy, capsys):
    assert run("recipe", "list") == 0
    assert "A recipe for tests." in capsys.readouterr().out
    assert run("recipe", "toy") == 0
    assert capsys.readouterr().out == "rate = 0.5  # Table 1\n"
    assert run("recipe", "nope") == 2
    assert "unknown recipe 'nope'; use one of" in capsys.readouterr().err


def test_exit_code_says_whether_the_claim_holds(toy, tmp_path, capsys):
    assert run("recipe", "toy", "--synthetic", "--seeds", "0, 1,2", "--out", tmp_path / "a") == 0
    shown = capsys.readouterr().out
    assert "result  holds" in shown and "0.9" in shown and "auc - other" in shown
    stored = json.loads((tmp_path / "a" / "claim.json").read_text())
    assert stored["rows"][0] == {"seed": 0, "auc": 0.9, "other": 0.5, "kind": "x"} and stored["holds"] is True
    assert run("recipe", "toy", "--synthetic", "--seeds", "0,5,9", "--out", tmp_path / "b") == 1
    assert "does not hold" in capsys.readouterr().out
    assert run("recipe", "toy", "--synthetic", "--seeds", "5", "--out", tmp_path / "c") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "result undecided with 1 seed; a claim needs 3 or more (" in shown and "not hold" not in shown
    assert json.loads((tmp_path / "c" / "claim.json").read_text())["holds"] is None
    assert run("recipe", "toy", "--synthetic", "--out", tmp_path / "b") == 2
    assert "already exists" in capsys.readouterr().err


def test_seeds_that_are_complete_are_not_run_again(toy, tmp_path, monkeypatch, capsys):
    ran, own = [], sys.modules["gigamorph.engine.mammography.recipes.toy"].RECIPE

    def rows(run):
        (run.out / "part").mkdir(parents=True)  # a seed that was cut off would refuse to begin again
        ran.append(run.seed)
        if ran == [0, 1]:
            raise KeyboardInterrupt
        return own.synthetic.rows(run)

    module = sys.modules["gigamorph.engine.mammography.recipes.toy"]
    monkeypatch.setattr(module, "RECIPE", replace(own, synthetic=replace(own.synthetic, rows=rows)))
    command = ["recipe", "toy", "--synthetic", "--out", tmp_path / "a"]
    assert run(*command) == 130
    assert "the same command with --resume continues with the current seed" in capsys.readouterr().err
    assert run(*command) == 2 and "seed_0: already exists; continue with --resume" in capsys.readouterr().err
    assert run(*command, "--resume") == 0 and ran == [0, 1, 1, 2]
    monkeypatch.setattr(module, "RECIPE", own)
    (tmp_path / "b" / "seed_0").mkdir(parents=True)  # of something else
    assert run(*command[:-1], tmp_path / "b", "--resume") == 2
    assert "seed_0: does not contain a seed of recipe toy; choose another folder" in capsys.readouterr().err
    (tmp_path / "b" / "seed_0").rmdir()
    assert run(*command[:-1], tmp_path / "b") == 0
    a, b = (json.loads((tmp_path / name / "claim.json").read_text()) for name in "ab")
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_networks_of_the_synthetic_task_need_no_trust(toy, tmp_path, monkeypatch):
    module = sys.modules["gigamorph.engine.mammography.recipes.toy"]
    own = module.RECIPE

    def rows(run):
        build_model("gigamorph.engine.mammography.recipes.morphhr.synthetic:MeanPooledNet")
        return own.synthetic.rows(run)

    monkeypatch.setattr(module, "RECIPE", replace(own, synthetic=replace(own.synthetic, rows=rows)))
    monkeypatch.delenv(VARIABLE)
    assert run("recipe", "toy", "--synthetic", "--out", tmp_path / "a") == 0


@pytest.mark.parametrize("seeds", ["", "a", "1,1", "-1"])
def test_seeds_are_different_numbers(toy, seeds):
    assert run("recipe", "toy", "--synthetic", "--seeds", seeds) == 2


def test_train_hands_the_configuration_on(toy, tmp_path, capsys):
    file = tmp_path / "toy.toml"
    file.write_text("rate = 2\n")
    shared = ("--memory-budget", "1GiB", "--seed", 3, "--precision", "bf16")
    assert run("train", tmp_path, "--recipe", "toy", "--config", file, "--out", tmp_path / "o", *shared) == 0
    [(table, config, given)] = toy
    assert table == tmp_path and config == Config(2.0)
    assert (given.out, given.seed, given.memory_budget, given.precision) == (tmp_path / "o", 3, 2**30, "bf16")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["auc", "0.75"] in shown and ["rbf.test.auc", "0.625"] in shown and "versions.torch" not in str(shown)
    assert run("train", tmp_path, "--recipe", "toy", "--out", tmp_path / "o") == 0 and toy[1][1] == Config()
    file.write_text("rate = 13\n")
    assert run("train", tmp_path, "--recipe", "toy", "--config", file, "--out", tmp_path / "o") == 2
    file.write_text("lr = 1\n")
    assert run("train", tmp_path, "--recipe", "toy", "--config", file, "--out", tmp_path / "o") == 2
    assert "unknown key 'lr'; known keys: rate" in capsys.readouterr().err


def test_what_goes_to_other_processes_can_be_pickled(toy, tmp_path, monkeypatch):
    """`--devices 2` sends the run to processes that are begun anew."""

    def launched(function, number, device, *args, timeout):
        function(*pickle.loads(pickle.dumps(args)))

    monkeypatch.setattr("gigamorph.engine.parallel.launch.launch", launched)
    assert run("train", tmp_path, "--recipe", "toy", "--out", tmp_path / "o", "--devices", 2, "--seed", 4) == 0
    [(_, config, given)] = toy
    assert config == Config() and (given.out, given.seed) == (tmp_path / "o", 4)


def test_what_the_configuration_says_is_no_option_too(toy, tmp_path, capsys):
    assert run("train", tmp_path, "--recipe", "toy", "--out", "o", "--epochs", 3) == 2
    assert "--epochs cannot be used with --recipe" in " ".join(capsys.readouterr().err.split())
    assert run("train", tmp_path, "--out", "o", "--config", "x.toml") == 2
    assert run("train", tmp_path, "--recipe", "toy", "--out", "o", "--split-image") == 2
    assert not toy
