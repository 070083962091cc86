"""Masks of a cross-validation, whose table has Dice and no masks, are measured; nothing is drawn."""

import json

from commands import run
from predicted_masks import write_predicted


def test_a_table_without_masks_is_measured_beside_its_own_table(tmp_path, capsys):
    write_predicted(tmp_path, count=4)
    lines = [line.split(",") for line in (tmp_path / "out" / "predictions.csv").read_text().splitlines()]
    kept = [number for number, name in enumerate(lines[0]) if name != "mask" and not name.startswith("share_")]
    held = tmp_path / "out" / "out_of_fold.csv"
    held.write_text("\n".join(",".join(line[number] for number in kept) for line in lines) + "\n")
    assert run("eval", held, "--table", tmp_path / "table.csv", "--split", "all", "--out", tmp_path / "measured") == 0
    assert "out_of_fold.csv has no column mask; no images are drawn" in capsys.readouterr().out
    assert {"dice_mass", "dice_cyst"} <= json.loads((tmp_path / "measured" / "metrics.json").read_text()).keys()
    assert not list((tmp_path / "measured").glob("furthest*"))
