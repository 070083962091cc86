"""What holds of every recipe: several processes make the same networks as one, and reduced precision trains."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_recipes
import torch
from exactness import errors
from processes import in_processes

from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.mammography.recipes import RECIPES, get_recipe
from gigamorph.engine.mammography.recipes.dvme import ExtractorConfig
from gigamorph.engine.mammography.recipes.end2end.config import Model
from gigamorph.engine.mammography.recipes.recipe import begin
from gigamorph.engine.parallel.process_group import ProcessGroup
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.run import Run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small_recipes.write(tmp_path_factory.mktemp("table"))


def numbers(found):
    """All numbers of metrics by where they stand, the timings of no run among them."""
    if isinstance(found, dict):
        return {f"{key}.{name}": value for key, own in found.items() for name, value in numbers(own).items()}
    if isinstance(found, list | tuple):
        return numbers(dict(enumerate(found)))
    return {"": found} if isinstance(found, int | float) else {}


def norm(tensors):
    """Of all of them together."""
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_devices_make_the_networks_of_one_process(name, table, tmp_path):
    alone = small_recipes.run_recipe(name, table, tmp_path / "alone", 2)
    tasks = [(small_recipes.run_recipe, name, table, tmp_path / "two", 2)]
    [both] = in_processes(2, tmp_path, tasks)
    for found in both:
        assert not isinstance(found, str), found
        assert numbers(found).keys() == numbers(alone).keys()
        assert all(abs(a - b) < 1e-3 for a, b in zip(numbers(found).values(), numbers(alone).values(), strict=True))
    checkpoints = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("last.ckpt"))
    processes = set()
    for path in checkpoints:
        stored = [load_checkpoint(tmp_path / folder / path) for folder in ("alone", "two")]
        one, other = (own["state_dict"] for own in stored)
        # Adam's steps are as large where a gradient is hardly more than its rounding in float32, which shows in weights
        # that have begun as zeros.
        assert max(errors(one, other).values()) < 1e-4, path
        assert norm(one[n] - other[n] for n in one) < 1e-6 * norm(one.values()), path
        processes.add(stored[1]["gigamorph"]["settings"]["processes"])
    assert 2 in processes  # batches were dealt
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.*")) for f in ("alone", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cae", {"layer": "nowhere"}),
        ("dvme", {"extractors": (ExtractorConfig("a", "nowhere"),)}),
        ("end2end", {"models": (Model("a", "lesionnet", "random", layer="nowhere"),)}),
        ("morphhr", {"model": "nowhere"}),
        ("siamese", {"layer": "nowhere"}),
    ],
)
def test_a_network_that_there_is_not_takes_no_folder(name, wrong, table, tmp_path):
    """It is refused before any work, and the folder is free for the command that is mended."""
    config = replace(small_recipes.configs(1)[name], **wrong)
    with pytest.raises(GigamorphError, match="'nowhere'"):
        get_recipe(name).train(table, config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_batches_that_cannot_be_dealt_take_no_folder(name, table, tmp_path):
    run = Run(tmp_path / "run", group=ProcessGroup(0, 2))
    with pytest.raises(GigamorphError, match="2 images per optimizer step, 2 at a time, cannot be distributed to 2"):
        get_recipe(name).train(table, small_recipes.configs(1)[name], run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "stages", "wrong"),
    [
        ("cae", "finetune", {"trainable": ("nowhere",)}),
        ("end2end", "whole", {"trainable": ("nowhere",)}),
        ("end2end", "whole", {"optimizer": "nowhere"}),
        ("morphhr", "high", {"trainable": ("nowhere",)}),
        ("morphhr", "high", {"schedule": "nowhere"}),
        ("morphhr", "high", {"rates": (("nowhere", 1e-3),)}),
        ("cae", "finetune", {"undecayed": ("nowhere",)}),
    ],
)
def test_a_later_stage_is_refused_before_the_first_one_begins(name, stages, wrong, table, tmp_path):
    config = small_recipes.configs(1)[name]
    config = replace(config, **{stages: tuple(replace(stage, **wrong) for stage in getattr(config, stages))})
    with pytest.raises(GigamorphError, match="'nowhere'"):
        get_recipe(name).train(table, config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_truth_of_the_same_images(tmp_path):
    finding = Finding("mass", box=(1, 5, 2, 6), pathology="benign")
    record = Record(Path("a.png"), 0, "p", "train", "L", "CC", findings=(finding,), labels={"a": 1.0})
    config = small_recipes.configs(1)["morphhr"]
    begin(Run(tmp_path), "morphhr", config, [record])
    begin(Run(tmp_path, resume=True), "morphhr", config, [record])
    moved = replace(finding, box=(2, 6, 2, 6))
    for other in ({"findings": (moved,)}, {"findings": ()}, {"labels": {"a": 0.0}}, {"laterality": "R"}):
        with pytest.raises(DataError, match="begun with other labels, findings, sides"):
            begin(Run(tmp_path, resume=True), "morphhr", config, [replace(record, **other)])
    for other in ({"frame": 1}, {"white": 4095.0}, {"chest_wall": "right"}):
        with pytest.raises(DataError, match="begun with other frames, sides or white levels"):
            begin(Run(tmp_path, resume=True), "morphhr", config, [replace(record, **other)])


@pytest.mark.parametrize("name", ["cae", "end2end", "morphhr"])
def test_without_test_images_nothing_is_measured(name, table, tmp_path):
    """What the best epoch was chosen by is no measure, and it is said."""
    read, said = read_table(table), []
    known = [record for record in read.records if record.split != "test"]
    own = write_table(table.parent / "no_test.csv", known, read.classes)
    found = get_recipe(name).train(own, small_recipes.configs(1)[name], Run(tmp_path / "run", say=said.append))
    measures = [key for key in numbers(found) if "test" in key.split(".") or key.split(".")[-2:] == ["auc", ""]]
    assert [key for key in measures if key != "images.test." and ".val." not in key] == []
    assert found.get("auc") is None
    assert sum("the split test has no images, so nothing is measured" in text for text in said) == 1


@pytest.mark.parametrize(("name", "precision"), [*((name, "bf16") for name in sorted(RECIPES)), ("end2end", "fp16")])
def test_reduced_precision(name, precision, table, tmp_path):
    """Autocast, for which Lightning takes bfloat16 on the CPU in both cases; the weights stay float32."""
    found = small_recipes.run_recipe(name, table, tmp_path / "run", 1, precision)
    assert not isinstance(found, str), found
    assert all(math.isfinite(value) for value in numbers(found).values())
    for path in (tmp_path / "run").rglob("last.ckpt"):
        stored = load_checkpoint(path)
        assert stored["gigamorph"]["settings"]["precision"] == precision
        assert all(
            value.dtype == torch.float32 and bool(value.isfinite().all())
            for value in stored["state_dict"].values()
            if value.is_floating_point()
        )
