"""Configurations: TOML into dataclasses, every mistake in one line that names the key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from gigamorph.engine.config import load_config, parse_config
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes import RECIPES, default_text, get_recipe
from gigamorph.engine.mammography.recipes.recipe import begin
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage


@dataclass(frozen=True)
class Size:
    side: int
    crop: int = 0

    def __post_init__(self):
        if self.crop > self.side:
            raise GigamorphError(f"crop = {self.crop} is larger than side = {self.side}")


@dataclass(frozen=True)
class Config:
    mode: Literal["a", "b"] = "a"
    rate: float = 0.5
    weights: str | None = None
    mean: tuple[float, ...] = (0.0,)
    window: tuple[int, int] = (3, 3)
    stages: tuple[Stage, ...] = ()
    size: Size = field(default_factory=lambda: Size(8))
    deep: bool = False


def test_all_kinds_of_values():
    text = """
    mode = "b"
    rate = 2
    weights = "w.pt"
    mean = [0.1, 2]
    window = [5, 7]
    deep = true
    [size]
    side = 4
    [[stages]]
    name = "head"
    epochs = 3
    lr = 1e-3
    trainable = ["head.*"]
    """
    found = parse_config(text, Config, "here")
    assert found == Config(
        "b", 2.0, "w.pt", (0.1, 2.0), (5, 7), (Stage("head", 3, 1e-3, trainable=("head.*",)),), Size(4), True
    )
    assert isinstance(found.rate, float) and parse_config("", Config, "here") == Config()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rate = 'x'", "key 'rate' is 'x', not a number"),
        ("rate = true", "key 'rate' is True, not a number"),
        ("deep = 1", "key 'deep' is 1, not true or false"),
        ("mode = 'c'", "choose from a, b"),
        ("lr = 1", "unknown key 'lr'; known keys: mode, rate"),
        ("window = [1]", "not a list of 2: a whole number, a whole number"),
        ("mean = [1, 'x']", "key 'mean[1]' is 'x'"),
        ("[size]\ncrop = 1", "key 'size.side' is missing"),
        ("[size]\nside = 1\ncrop = 2", "crop = 2 is larger than side = 1"),
        ("[[stages]]\nname = 's'\nepochs = 1.5\nlr = 1", "key 'stages[0].epochs' is 1.5, not a whole number"),
        ("[size", "is not valid TOML"),
    ],
)
def test_mistakes_name_the_key(text, told):
    with pytest.raises(GigamorphError) as caught:
        parse_config(text, Config, "here.toml")
    assert str(caught.value).startswith("here.toml: ") and told in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(GigamorphError, match="cannot be read"):
        load_config(tmp_path / "x.toml", Config)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_published_configuration_is_the_default(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert parse_config(default_text(name), recipe.config, name) == recipe.config()


def test_a_run_is_resumed_with_what_it_was_begun_with(tmp_path):
    """Where nothing has begun it begins, so that a job can always ask for it."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "last.ckpt").touch()
    with pytest.raises(GigamorphError, match=r"last.ckpt: exists, but recipe.json"):
        begin(Run(tmp_path, seed=1, resume=True), "toy", Config())
    (tmp_path / "stage" / "last.ckpt").unlink()
    begin(Run(tmp_path, seed=1, resume=True), "toy", Config())
    begin(Run(tmp_path, seed=1, resume=True), "toy", Config())
    with pytest.raises(GigamorphError, match="already contains a run"):
        begin(Run(tmp_path, seed=1), "toy", Config())
    with pytest.raises(GigamorphError, match="begun with seed 1, not 2"):
        begin(Run(tmp_path, seed=2, resume=True), "toy", Config())
    with pytest.raises(
        GigamorphError, match=r"begun with rate = 0\.\d+ in its configuration, not 1\.0; resume with the same"
    ):
        begin(Run(tmp_path, seed=1, resume=True), "toy", Config(rate=1.0))
