"""Images in files of several kinds and depths: on one scale, or told."""

import imagecodecs
import numpy as np
import pytest
from click.testing import CliRunner
from image_files import write_dicom

from gigamorph.cli.data import data
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.grey import grey_warnings
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.train.inputs import training_data

RAMP = np.linspace(0, 1, 20 * 30).reshape(20, 30)


@pytest.fixture
def mixed(tmp_path):
    """A table of as many PNG and DICOM files; the DICOM files' patients have the label that is asked for."""

    def write(label_of_dicom, white_of_png=255):
        rows = ["image_path,label,patient_id,split"]
        for number in range(8):
            dicom, split = number % 2 == 1, "train" if number < 6 else "val"
            name = f"{number}.{'dcm' if dicom else 'png'}"
            if dicom:
                write_dicom(tmp_path / name, np.round(RAMP * 65535).astype(np.uint16), bits=16)
            else:
                imagecodecs.imwrite(str(tmp_path / name), np.round(RAMP * white_of_png).astype(np.uint8))
            label = label_of_dicom if dicom else 0 if label_of_dicom else number // 2 % 2
            rows.append(f"{name},{label},p{number},{split}")
        (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
        return tmp_path / "t.csv"

    return write


def test_eight_and_sixteen_bits_are_one_scale(mixed):
    images = ImageDataset(read_table(mixed(0)).records, channels=1)
    png, dicom = (images[number]["image"].read(0, 20, 0, 30) for number in (0, 1))
    assert float((png - dicom).abs().max()) < 1 / 255
    assert grey_warnings(images) == []


def test_kinds_on_unlike_scales_are_told(mixed):
    [told] = grey_warnings(ImageDataset(read_table(mixed(0, white_of_png=80)).records, channels=1))
    assert told.startswith("file types reach different grey values (0.31 in PNG, 1 in DICOM;")


def test_a_kind_of_file_that_tells_the_label_is_told(mixed):
    said = []
    training_data(mixed(1), warn=said.append)
    assert any("all PNG have label 0, DICOM have label 1): the network may learn the type" in text for text in said)
    problems = CliRunner().invoke(data, ["check", str(mixed(1)), "--workers", "1"])
    assert problems.exit_code == 1
    assert "written     " in problems.output and "(all PNG have label 0, DICOM have label 1)" in problems.output
    problems = CliRunner().invoke(data, ["check", str(mixed(0, white_of_png=80)), "--workers", "1"])
    assert "written" in problems.output and "reach different grey values (0.31 in PNG" in problems.output
    said.clear()
    training_data(mixed(0), warn=said.append)
    assert not any("file type" in text for text in said)
