import pytest

from gigamorph.engine.data.phantom import write_phantoms
from gigamorph.engine.errors import DataError
from gigamorph.engine.pixels import Normalize
from gigamorph.engine.train.inputs import prediction_records, training_data


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("p"), patients=4, height=136, width=104)


def test_preprocessing_is_what_the_items_show(table):
    data = training_data(table, channels=3, normalize=Normalize((0.25,), (0.5,)), downsample=8)
    assert data.preprocessing == {
        "normalize": {"mean": [0.25], "std": [0.5]}, "voi": "auto", "flip": "auto", "downsample": 8
    }  # fmt: skip
    image = data.train[0]["image"]
    assert image.shape == (3, 17, 13)
    # the background is 0 before the normalisation
    assert image.read(0, 17, 0, 13).min().item() == pytest.approx(-0.5)
    assert sum(len(part) for part in data.parts.values()) == 8


def test_records_to_predict_come_from_tables_folders_and_files(table, tmp_path):
    files = sorted((table.parent / "images").iterdir())
    assert [r.label for r in prediction_records([table], ["0", "1"], check_files=True)] == [0, 0, 1, 1] * 2
    assert [r.path for r in prediction_records([table.parent / "images"], ["0", "1"], check_files=True)] == files
    assert [r.path for r in prediction_records(files[:2], ["0", "1"], check_files=True)] == files[:2]
    bare = table.parent / "bare.csv"
    bare.write_text(f"image_path\nimages/{files[0].name}\n")
    assert [r.label for r in prediction_records([bare], ["0", "1"], check_files=True)] == [-1]


def test_a_wrong_table_is_reported_as_such(table, tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na,0\n")
    with pytest.raises(DataError, match=r"t\.csv.*image_path"):
        prediction_records([tmp_path / "t.csv"], ["0", "1"], check_files=True)
    with pytest.raises(DataError, match=r"none\.dcm: no such file"):
        prediction_records([tmp_path / "none.dcm"], ["0", "1"], check_files=True)
    assert len(prediction_records([tmp_path / "none.dcm"], ["0", "1"], check_files=False)) == 1
