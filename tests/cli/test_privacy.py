"""What DICOM headers and tables say of patients stays in them: not in checkpoints, logs, metrics or pictures."""

from pathlib import Path

import lookalikes
import pydicom
import pytest
from commands import SMALL_TRAINING, run

from gigamorph.engine.mammography.phantom import write_phantoms


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """A table of phantoms whose headers hold all that must not be told; its patients are called Table-Patient-N."""
    table = write_phantoms(tmp_path_factory.mktemp("p"), patients=8, height=160, width=128, seed=1)
    for path in (table.parent / "images").iterdir():
        ds = pydicom.dcmread(path)
        for keyword, value in lookalikes.SECRETS.items():
            setattr(ds, keyword, value)
        ds.save_as(path)
    lines = table.read_text().replace(",PHANTOM", ",Table-Patient-").splitlines()
    table.write_text("\n".join(",".join(line.split(",")[:6]) for line in lines))
    return table


def told(folder: Path, *texts: str) -> list[str]:
    """Which secrets are in the files of a folder or in texts; checkpoints are archives without compression."""
    content = [path.read_bytes() for path in folder.rglob("*") if path.is_file()] + [text.encode() for text in texts]
    assert len(content) > 1
    names = [path.name for path in folder.rglob("*")]
    wanted = [*lookalikes.SECRETS.values(), "Table-Patient-"]
    return [value for value in wanted if any(value.encode() in c for c in content) or any(value in n for n in names)]


def test_training_and_prediction_tell_no_patients(secret, tmp_path, capfd):
    options = [*SMALL_TRAINING, "--memory-budget", "64MiB"]
    assert run("train", secret, "--out", tmp_path / "run", *options) == 0
    said = capfd.readouterr()
    assert (tmp_path / "run" / "best.ckpt").stat().st_size > 0
    assert told(tmp_path / "run", said.out, said.err) == []
    assert (
        run("predict", tmp_path / "run" / "best.ckpt", secret.parent / "images", "--heatmaps", "--out", tmp_path / "p")
        == 0
    )
    said = capfd.readouterr()
    assert (tmp_path / "p" / "predictions.csv").read_text().count("P00001") == 16  # all images are of one PatientID
    assert told(tmp_path / "p", said.out, said.err) == []
    checkpoint, predictions = tmp_path / "run" / "best.ckpt", tmp_path / "p" / "predictions.csv"
    assert run("explain", checkpoint, secret.parent / "images", "--format", "tif", "--out", tmp_path / "e") == 0
    labels = ["--table", secret, "--split", "all", "--resamples", 20, "--level", "image", "--by", "view"]
    assert run("eval", predictions, *labels, "--out", tmp_path / "v") == 0
    said = capfd.readouterr()
    assert told(tmp_path / "e", said.out, said.err) == [] and told(tmp_path / "v", said.out, said.err) == []
    # Asked for, it is there: the test can fail.
    named = [tmp_path / "run" / "best.ckpt", secret.parent / "images", "--identifiers", "--out", tmp_path / "n"]
    assert run("predict", *named) == 0
    assert told(tmp_path / "n") == ["MRN-4711", "1.2.99.1"]  # the patient and the study


def test_data_commands_tell_no_patients(secret, tmp_path, capfd):
    images = secret.parent / "images"
    (tmp_path / "out").mkdir()
    (images / "cut.dcm").write_bytes(sorted(images.iterdir())[0].read_bytes()[:5000])
    assert run("data", "index", images, "--out", tmp_path / "out" / "i.csv") == 0
    assert run("data", "check", images, "--out", tmp_path / "out" / "c.csv") == 1
    assert run("data", "convert", tmp_path / "out" / "i.csv", "--out", tmp_path / "out" / "x") == 2  # it has no labels
    (images / "cut.dcm").unlink()
    first = sorted(images.iterdir())[0]
    assert run("data", "preview", first, "--out", tmp_path / "out" / "p.png") == 0
    said = capfd.readouterr()
    assert told(tmp_path / "out", said.out, said.err) == []
