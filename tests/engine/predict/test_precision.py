"""Predictions in mixed precision: they are autocast's, wherever they are computed, and the folder keeps them apart."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import archives
import numpy as np
import pytest
import torch
from commands import rows

from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.predict.devices import DeviceSettings, compute_here
from gigamorph.engine.predict.job import started
from gigamorph.engine.predict.predictor import PredictionUnit, Wanted
from gigamorph.engine.predict.rows import Row, Work
from gigamorph.engine.predict.run import PredictOptions, predict

HERE = PredictOptions("m", workers=0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return archives.make_archive(tmp_path_factory.mktemp("archive"), 4)


def log_odds(out: Path) -> np.ndarray:
    return np.array([float(row["log_odds_1"]) for row in rows(out / "predictions.csv")])


def test_they_are_the_networks_under_autocast(table, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert predict(archives.tiny, [table], out, replace(HERE, precision=precision)).complete
        found[precision] = log_odds(out)
    opened = archives.tiny(device="cpu")
    wanted = []
    for item in opened.open_images(read_table(table).records):
        _, height, width = item["image"].shape
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = opened.net._network.eval()(item["image"].read(0, height, 0, width)[None])[0]
        wanted.append(float(logits.double().diff()))
    rounded = np.abs(np.array(wanted) - found["fp32"]).max()
    assert 0 < np.abs(found["bf16"] - found["fp32"]).max() < 2 * rounded
    assert "precision" not in json.loads((tmp_path / "fp32" / "predictions.json").read_text())
    assert json.loads((tmp_path / "bf16" / "predictions.json").read_text())["precision"] == "bf16"


def test_other_processes_compute_the_same(table, tmp_path):
    """What they are given, called here."""
    wanted = Wanted("m", tmp_path)
    record = read_table(table).records[0]
    found = []
    for unit, precision in (
        (started(functools.partial(PredictionUnit, wanted=wanted), archives.tiny, device="cpu"), "bf16"),
        (PredictionUnit(archives.tiny(device="cpu"), wanted), "bf16"),
        (PredictionUnit(archives.tiny(device="cpu"), wanted), "fp32"),
    ):
        settings = DeviceSettings(0, tmp_path, False, "cpu", precision)
        [outcome] = compute_here(unit, settings, iter([Work("key", Row(record))]))
        found.append(outcome.result["log_odds"])
    there, here, plain = found
    assert there == here != plain


def test_a_folder_is_of_one_precision(table, tmp_path):
    out = tmp_path / "out"
    predict(archives.tiny, [table], out, replace(HERE, precision="bf16"))
    with pytest.raises(
        GigamorphError, match="was started with --precision bf16; continue with it, or name another --out"
    ):
        predict(archives.tiny, [table], out, replace(HERE, resume=True))
    assert predict(archives.tiny, [table], out, replace(HERE, resume=True, precision="bf16")).computed == 0
