"""Tables of volumes on the command line: what fits neither network nor task is refused in one line."""

import csv
import re
from pathlib import Path

import pytest
from commands import run

from gigamorph.engine.mammography.phantom import write_phantoms


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tables of volumes, of images, and of both; a network for volumes as "weights"."""
    folder = tmp_path_factory.mktemp("volumes")
    size = {"patients": 4, "height": 128, "width": 96, "lesions": ["mass"]}
    found = {"volumes": write_phantoms(folder / "v", slices=5, **size), "images": write_phantoms(folder / "i", **size)}
    with found["volumes"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    found["both"] = folder / "v" / "both.csv"
    with found["both"].open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([{**rows[0], "frame": "2"}, *rows[1:]])
    found["weights"] = folder / "volume.safetensors"
    assert run("morph", "to-volume", "--model", "resnet18", "--random-weights", "--out", found["weights"]) == 0
    return found


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train {volumes} --model resnet18", "cannot take a volume of 1 x 5 x 128 x 96 .* gigamorph morph to-volume"),
        (
            "train {images} --model resnet18 --weights {weights}",
            "an image .* write all into .* column frame",
        ),
        ("train {both} --model resnet18", "is an image, but .* a volume .frame all.; use one kind"),
        ("train {volumes} --model unet --task masks", "masks"),
        ("data convert {volumes} --images png", "is a volume .frame all., but images are needed here"),
    ],
)
def test_what_does_not_fit_is_refused(
    tables: dict[str, Path], command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(*command.format(**tables).split(), "--out", tmp_path / ("out.csv" if "convert" in command else "out"))
    shown = " ".join(capsys.readouterr().err.split())
    assert code not in (0, None) and "Traceback" not in shown
    assert re.search(message, shown), shown


def test_data_check_reads_volumes(tables: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "check", tables["volumes"]) == 0
    assert "0 with problems" in capsys.readouterr().out
