"""benchmarks/morph_table.py: its verdicts cannot be fooled, and the page in the docs is what the JSON says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import morph_markdown  # noqa: E402
import morph_nets  # noqa: E402
import morph_table  # noqa: E402
import morph_trials  # noqa: E402

from gigamorph.engine.errors import MorphError  # noqa: E402
from gigamorph.engine.morph.widen import widen  # noqa: E402

X = torch.zeros(2, 3, 16, 16)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(morph_table.JSON.read_text())


def small() -> Any:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 4, 3, padding=1))
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_the_page_is_what_the_json_says(recorded: dict[str, Any]) -> None:
    assert morph_markdown.PAGE.read_text() == morph_markdown.page(recorded)


def test_the_recorded_table_holds_its_limits(recorded: dict[str, Any]) -> None:
    networks = recorded["networks"]
    names = [n["network"] for n in networks]
    assert names == morph_nets.NETWORKS
    assert recorded["counts"] == morph_table.count(networks) and recorded["limits"] == morph_table.LIMITS
    assert recorded["counts"]["wrong"] == 0
    for network in networks:
        assert list(network["transforms"]) == list(morph_trials.transforms()) == list(morph_markdown.WHAT)
        for row in network["transforms"].values():
            if row["verdict"] != "exact":
                assert row["reason"]
                continue
            for mode in ("eval", "train") if row["promises_train"] else ("eval",):
                assert row[f"float64_{mode}"] <= 1e-12 and row[f"ratio_{mode}"] <= 8
            assert row["changes"] and (row["certificate"] is None or row["certificate"][1] == 0 < row["certificate"][0])


def test_rows_measured_again_replace_their_own() -> None:
    def report(name: str, **rows: str) -> dict[str, Any]:
        return {"network": name, "transforms": {row: {"verdict": verdict} for row, verdict in rows.items()}}

    kept = [report("resnet18", pair="exact", grey="exact"), report("resnet50", grey="exact")]
    new = [report("resnet18", grey="wrong", all="wrong"), report("own:flatten", pair="exact")]
    part = [report("own:flatten", pair="exact"), report("resnet18", pair="exact", grey="wrong", all="wrong"), kept[1]]
    assert morph_table.merge(kept, new, whole=False) == part
    assert morph_table.merge(kept, new, whole=True) == [new[1], new[0], kept[1]]


def test_all_transforms_are_exact_on_a_small_network() -> None:
    model, known = small().eval(), {}
    rows = {name: morph_table.attempt(model, X, name, f, known) for name, f in morph_trials.transforms().items()}
    assert {name: row for name, row in rows.items() if row["verdict"] != "exact"} == {}
    assert rows["widen x2"]["certificate"][0] > 0 and rows["residual"]["float64_train"] == 0
    assert rows["identity, BatchNorm"]["float64_train"] > 1e-3  # shown, and not promised
    before, after = rows["widen x2"]["parameters"]
    assert after > 2 * before and rows["merge back"]["parameters"] == [before, before]


def test_dropout_is_off_however_it_is_called() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.2, training=self.training)

    model = nn.Sequential(*small()[:3], Drops(), *small()[3:]).eval()
    assert morph_table.attempt(model, X, "widen x2", morph_trials.transforms()["widen x2"], {})["verdict"] == "exact"


def lying(error: float, train_only: bool = False) -> Any:
    """A widening whose child is off by a little although its report says otherwise."""

    def transform(model: nn.Module, x: Tensor) -> morph_trials.Trial:
        child, report = widen(model, x, factor=2)
        net: Any = child
        with torch.no_grad():
            if train_only:
                net[1].momentum = 0.1 + error  # other statistics are left
            else:
                net[-1].bias += error
        return morph_trials.Trial(report, child, None, None, tuple(x.shape))

    return transform


@pytest.mark.parametrize("error, train_only", [(1e-5, False), (float("nan"), False), (1e-3, True)])
def test_a_child_that_is_off_is_wrong(error: float, train_only: bool) -> None:
    row = morph_table.attempt(small(), X, "kernel", lying(error, train_only), {})
    assert row["verdict"] == "wrong"
    assert (row["float64_eval"] <= 1e-12) == train_only


def raising(error: Exception) -> Any:
    def transform(model: nn.Module, x: Tensor) -> morph_trials.Trial:
        raise error

    return transform


@pytest.mark.parametrize(
    "error, verdict, name",
    [
        (MorphError("module 'a' is shared"), "refused", "kernel"),
        (MorphError("the child's function differs from its parent's by 1e-3 in float64"), "wrong", "kernel"),
        (MorphError("the child differs from its parent by 1e-3 in float32"), "wrong", "kernel"),
        (
            MorphError("widen: 3 of 7 weights violate S E = I; the original is unchanged, report this"),
            "wrong",
            "kernel",
        ),
        (MorphError("the child cannot be run in eval mode: input height"), "refused", "front x2"),
        (MorphError("the child cannot be run in eval mode: groups=64"), "wrong", "widen x2"),
        (IndexError("list index out of range"), "wrong", "kernel"),
        (morph_trials.Absent("no convolution"), "none", "kernel"),
    ],
)
def test_what_a_transform_raises(error: Exception, verdict: str, name: str) -> None:
    row = morph_table.attempt(small(), X, name, raising(error), {})
    assert row["verdict"] == verdict and str(error) in row["reason"]


def test_a_changed_parent_is_wrong() -> None:
    def transform(model: Any, x: Tensor) -> morph_trials.Trial:
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] += 1
        raise MorphError("refused")

    row = morph_table.attempt(small(), X, "kernel", transform, {})
    assert row["verdict"] == "wrong" and "parent" in row["reason"]


def test_a_widening_of_nothing_is_refused_not_exact() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name in ("widen x2", "random counts", "new channels", "merge back"):
        assert morph_table.attempt(frozen, X, name, morph_trials.transforms()[name], {})["verdict"] == "refused"


def test_the_image_is_large_enough_for_batch_statistics() -> None:
    def net(stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride, 1), nn.BatchNorm2d(4))

    assert list(morph_nets.example(net(2)).shape) == [2, 3, 64, 64]
    assert list(morph_nets.example(net(32)).shape) == [2, 3, 96, 96]
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert list(morph_nets.example(pooled).shape) == [18, 3, 64, 64]


@pytest.mark.slow
def test_one_network_in_a_process_of_its_own() -> None:
    report = morph_table.child_process("own:lesionnet", ["widen x2"])
    assert list(report["transforms"]) == ["widen x2"] and report["transforms"]["widen x2"]["verdict"] == "exact"
    dead = morph_table.child_process("own:no_such_network", [])
    assert dead["transforms"]["all"]["verdict"] == "wrong" and "no_such_network" in dead["transforms"]["all"]["reason"]
