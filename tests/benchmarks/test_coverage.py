"""benchmarks/coverage.py: the recorded census is whole and holds its limits, and the page in the docs says so."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import coverage as census  # noqa: E402
from coverage_judge import ROUNDING  # noqa: E402
from coverage_list import ATTENTION, FIRST, MORE  # noqa: E402
from coverage_markdown import DYNAMO, LONG, PAGE, page, slowdown  # noqa: E402


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(census.RESULTS.read_text())


def test_the_page_is_what_the_json_says(recorded: dict[str, Any]) -> None:
    assert PAGE.read_text() == page(recorded)


def test_every_network_in_both_modes(recorded: dict[str, Any]) -> None:
    """At one commit, but for those that were measured again after what they found was mended; the page counts them."""
    found = [(row["network"], row["mode"]) for row in recorded["networks"]]
    assert found == list(itertools.product(census.CLASSES, census.MODES))
    assert recorded["counts"] == census.counts(recorded["networks"])
    commits = Counter(row["commit"] for row in recorded["networks"])
    assert commits.most_common(1)[0][1] >= 0.9 * len(found)
    told = "All {} rows are of commit {}" if len(commits) == 1 else "{} of {}"
    assert all(told.format(number, commit) in PAGE.read_text() for commit, number in commits.items())


def test_no_network_is_lost_with_torchdynamo(recorded: dict[str, Any]) -> None:
    verdicts = {(row["network"], row["mode"]): row["verdict"] for row in recorded["networks"]}
    again = {(row["network"], row["mode"]): row["verdict"] for row in json.loads(DYNAMO.read_text())["networks"]}
    assert again.keys() == verdicts.keys()
    ranks = ["exact", "taken whole", "unclear"]
    assert all(ranks.index(again[key]) <= ranks.index(verdicts[key]) for key in verdicts)


def test_the_list_is_chosen_by_family() -> None:
    """250 networks or more, 60 or more with attention, each once; what was first stays first."""
    assert len(census.CLASSES) >= 250 and list(census.CLASSES)[:178] == list(FIRST)
    assert len(ATTENTION) == len(set(ATTENTION)) >= 60 and not set(MORE) & set(FIRST)
    timm = pytest.importorskip("timm")
    names = {name for name in census.CLASSES if ":" not in name}
    assert names <= set(timm.list_models())


@pytest.mark.parametrize("name", ["features:resnet18", "pooled:convnext_atto", "tvd:mobilenet_v3_large"])
def test_parts_of_models_are_built(name: str) -> None:
    model = census.build(name).eval()
    with torch.no_grad():
        found = model(torch.zeros(1, 3, 64, 64))
    shapes = {tuple(x.shape) for x in (found.values() if isinstance(found, dict) else [found])}
    assert shapes >= {"f": {(1, 512, 2, 2)}, "p": {(1, 320)}, "t": {(1, 256, 2, 2), (1, 256, 1, 1)}}[name[0]]


def test_not_one_is_wrong(recorded: dict[str, Any]) -> None:
    """Of frozen repvgg_d2se stock's own rounding moves the gradients by more than 1e-9."""
    by = {
        name: [(row["network"], row["mode"]) for row in recorded["networks"] if row["verdict"] == name]
        for name in census.VERDICTS
    }
    assert by["wrong"] == [] and by["unclear"] == [("repvgg_d2se", "eval")]
    for row in recorded["networks"]:
        if row["verdict"] == "unclear":
            continue
        assert row["error"] <= census.LIMIT or ("noise" in row.get("notes", "") and row["error"] <= ROUNDING), row[
            "network"
        ]
        assert row["verdict"] == "exact" or row["message"], row["network"]


def test_no_step_takes_ten_times_stocks(recorded: dict[str, Any]) -> None:
    times = {(row["network"], row["mode"]): slowdown(row) for row in recorded["networks"]}
    known = {key: ratio for key, ratio in times.items() if ratio is not None}
    assert len(known) >= len(times) - 7  # of some networks stock itself takes one step alone
    assert [key for key, ratio in known.items() if ratio >= LONG] == []


def test_at_most_five_networks_take_a_map_whole(recorded: dict[str, Any]) -> None:
    whole = {row["network"] for row in recorded["networks"] if row["verdict"] == "taken whole"}
    assert whole == {"bat_resnext26ts", "csatv2", "gcvit_xxtiny", "sequencer2d_s", "volo_d1_224"}


def test_classes_a_and_b_are_computed_tile_by_tile(recorded: dict[str, Any]) -> None:
    """Halo attention alone (windows of the map with a matrix for each) takes a map whole."""
    whole = {row["network"] for row in recorded["networks"] if row["verdict"] == "taken whole" and row["class"] in "ab"}
    assert whole <= {"halonet26t"}


def test_counts_and_remarks_of_the_page() -> None:
    def row(name: str, kind: str, mode: str, verdict: str, **more: Any) -> dict[str, Any]:
        measured = {"size": [8, 9], "tile": 4, "commit": "c0ffee"}
        return {"network": name, "class": kind, "mode": mode, "verdict": verdict, **measured, **more}

    single = {"outputs": 1.0, "gradients": 0.5}
    rows = [
        row("one", "a", "eval", "exact", error=2e-13, float32=single, steps={"stock": 2.0, "tiled": 5.0}),
        row("one", "a", "live", "wrong", message="module 'x' fails"),
        row("two", "c", "eval", "taken whole", error=1e-14, message="module 'x' fails"),
    ]
    source = {"torch": "2", "timm": "1", "torchvision": "0", "limit": 1e-12}
    text = page({"networks": rows, **source})
    assert "| a | frozen | 1 | 1 | 0 | 0 | 0 | 0 |\n" in text and "| all | live | 1 | 0 | 0 | 0 | 0 | 1 |\n" in text
    assert "No verdict yet with live norms: two." in text
    assert "| one | a | 8 x 9 | exact | 2e-13 | 1.00 | 2.5 | **wrong** [1](#remarks) |  |  |  |\n" in text
    assert "The median is 2.5; the maximum is 2.5, for\none with frozen norms." in text
    assert "All 3 rows are of commit c0ffee." in text
    assert text.count("module 'x' fails") == 1 and "Wrong: 1" in text


def test_statistics_of_a_batch() -> None:
    """With them maps keep their size from layer to layer."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, momentum=None)) for _ in range(3)]
    model = nn.Sequential(*blocks).double().eval()
    with torch.no_grad():
        for block in blocks:
            block[0].weight.mul_(100)  # pyright: ignore[reportOperatorIssue, reportCallIssue]
    census._calibrate(model, (32, 32))
    y = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert not model.training and blocks[0][1].momentum is None
    assert 0.7 < y.std() < 1.4
