"""Texts that are nested too deeply, or grow: one line each, in every place that reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import run

from gigamorph.engine.config import parse_value, read_values
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.datasets.tables.cells import escape, is_number, read_rows
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.class_names import in_order
from gigamorph.engine.mammography.layouts import mammoscreen
from gigamorph.engine.models.checkpoints import WeightFile, read_state
from gigamorph.engine.models.folder import read_description
from gigamorph.engine.models.spec import Spec
from gigamorph.engine.morph.recipe import Recipe
from gigamorph.engine.parsing import parse_json, parse_literal

DEEP = "[" * 100_000 + "]" * 100_000
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text", [DEEP, DEEP[:-1], '{"a":' * 100_000, "nonsense", "", "(" * 100_000, "-" * 100_000 + "1"]
)
@pytest.mark.parametrize("parse", [parse_json, parse_literal])
def test_what_cannot_be_parsed_is_a_value_error(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize("name", ["a.json", "a.toml", "a.yaml"])
@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_configurations_that_are_deep(name: str, depth: int, tmp_path: Path) -> None:
    text = "[" * depth + "]" * depth
    path = tmp_path / name
    path.write_text(f"a = {text}" if name == "a.toml" else f'{{"a": {text}}}')
    if name == "a.yaml" and depth > 5_000:
        return  # PyYAML needs quadratic time for it
    try:
        found = read_values(path)
    except GigamorphError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert depth == 500 and found


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_aliases_of_aliases(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(GigamorphError, match="nested too deeply") as caught:
        read_values(path)
    assert "\n" not in str(caught.value)


def test_aliases_that_are_few_are_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_values(path) == {"a": [1, 2], "b": [1, 2]}


def test_a_folder_a_recipe_a_model_and_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text(DEEP)
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    for read in (
        lambda: read_description(tmp_path),
        lambda: Recipe.from_json(DEEP),
        lambda: read_state(tmp_path / "model.safetensors.index.json"),
    ):
        with pytest.raises(GigamorphError) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert Spec.parse(f"resnet18?width={DEEP}").arguments["width"] == DEEP
    assert run("plan", "--model", tmp_path, "--size", "64x64") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_findings_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("image_path,label,patient_id,findings\na.png,0,1," + DEEP[:30_000] + DEEP[-30_000:] + "\n")
    assert run("train", table, "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "a = " + "1" * 5_000),
        ("a.json", '{"a": ' + "1" * 5_000 + "}"),
        *(("a.yaml", f"a: {one}") for one in ("1" * 5_000, "2001-99-99", "2001-01-01T00:00:00+99:99")),
        *(("a.yaml", f'a: !!{kind} "x"') for kind in ("int", "float", "bool", "timestamp")),
    ],
)
def test_values_that_cannot_be_made(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(GigamorphError, match=f"{name}: is not valid {name[2:].upper()}: ") as caught:
        read_values(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("a.toml", "a = [0x{}]"), ("a.yaml", "a: 0x{}"), ("a.json", '{{"a": {}}}')])
def test_numbers_that_are_too_long_to_be_printed(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text.format("1" * 4_000))
    with pytest.raises(
        GigamorphError, match=f"{name}: contains an integer of more than 64 bits; write a smaller number$"
    ):
        read_values(tmp_path / name)


@pytest.mark.parametrize("read", [is_number, lambda cell: parse_value(f"a={cell}"), lambda cell: escape(f"-{cell}")])
def test_long_cells_are_read_in_linear_time(read: Callable[[str], Any]) -> None:
    began = time.process_time()
    read("1" * 100_000 + "x")
    assert time.process_time() - began < 1


def test_long_cells_of_a_configuration_and_a_table(tmp_path: Path) -> None:
    began = time.process_time()
    (tmp_path / "a.json").write_text(json.dumps({"a": "1" * 100_000 + "x"}))
    read_values(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text(f'image_path,label\n"a{" " * 100_000}b\n \r\n c",1\n')
    assert read_rows(tmp_path / "a.csv").rows[0]["image_path"] == f"a{' ' * 100_000}b c"
    assert time.process_time() - began < 1


LONG = "9" * 5_000


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        *(("frame", one) for one in (LONG, "1.0e300", "9" * 25)),
        *(("label", one) for one in (LONG, "5.0e300", "9" * 25, str(10**12))),
        *(("findings", f'[{{""box"": [0, {one}, 0, 1]}}]') for one in ("1e999", "Infinity", LONG)),
        *(("findings", f'[{{""outline"": [[0, {one}], [0, 1]]}}]') for one in ("1e999", "NaN")),
    ],
)
def test_numbers_of_a_table_that_are_too_large(column: str, cell: str, tmp_path: Path) -> None:
    row = {"image_path": "a.png", "patient_id": "1", "label": "1", "frame": "", "findings": "", column: cell}
    table = tmp_path / "a.csv"
    table.write_text(",".join(row) + "\n" + ",".join(f'"{value}"' for value in row.values()) + "\nb.png,2,0,,\n")
    began = time.process_time()
    with pytest.raises(DataError) as caught:
        read_table(table, check_files=False)
    assert str(caught.value).startswith(str(table)) and time.process_time() - began < 1


def test_values_of_a_parquet_table_that_python_has_not(tmp_path: Path) -> None:
    table, whole = tmp_path / "a.parquet", pa.array([2**60], pa.int64())
    for odd in (whole.cast(pa.timestamp("ms")), whole.view(pa.duration("s")), pa.array([b"\xff"]).view(pa.string())):
        pq.write_table(pa.table({"image_path": ["a.png"], "odd": odd}), table)
        with pytest.raises(DataError) as caught:
            read_rows(table)
        assert str(table) in str(caught.value) and "\n" not in str(caught.value)
    pq.write_table(pa.table({"image_path": ["a.png"], "odd": pa.array([[b"a", b"b"]])}), table)
    assert read_rows(table).rows[0]["odd"]


def test_numbers_in_the_names_of_weights(tmp_path: Path) -> None:
    names = ("net0.backbone.conv_stem.weight", "net0.linear.weight", f"net{LONG}.linear.weight")
    state = WeightFile(tmp_path, dict.fromkeys(names, torch.zeros(1)))
    assert mammoscreen.recognises(state) and [part.name for part in mammoscreen.parts(state)] == ["net0"]
    assert in_order([LONG, "1"]) == (["1", LONG], False)
