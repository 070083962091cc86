import pydicom
import pytest
from pydicom.uid import DigitalMammographyXRayImageStorageForProcessing

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.convert import convert_images
from gigamorph.engine.train.inputs import images, training_data


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("p"), patients=4, height=136, width=104)


def test_preprocessing_is_what_the_items_show(table):
    data = training_data(table, channels=3, normalize=Normalize((0.25,), (0.5,)), downsample=8)
    assert data.preprocessing == {
        "normalize": {"mean": [0.25], "std": [0.5]},
        "voi": "auto",
        "flip": "auto",
        "downsample": 8,
    }
    image = data.train[0]["image"]
    assert image.shape == (3, 17, 13)
    # the background is 0 before the normalisation
    assert image.read(0, 17, 0, 13).min().item() == pytest.approx(-0.5)
    assert sum(len(part) for part in data.parts.values()) == 8


def test_images_that_are_not_for_display_must_be_asked_for(table, tmp_path):
    """Once asked for it is part of the preprocessing that predicts."""
    for path in (table.parent / "images").iterdir():
        ds = pydicom.dcmread(path)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForProcessing
        ds.PresentationIntentType = "FOR PROCESSING"
        (tmp_path / "images").mkdir(exist_ok=True)
        ds.save_as(tmp_path / "images" / path.name)
    copy = tmp_path / table.name
    copy.write_bytes(table.read_bytes())
    with pytest.raises(DataError, match="For Processing"):
        training_data(copy).train[0]["image"].read(0, 9, 0, 9)
    data = training_data(copy, for_processing=True)
    assert images(data.train.records, 1, data.preprocessing)[0]["image"].read(0, 9, 0, 9).shape == (1, 9, 9)
    converted, errors, _ = convert_images(data.train.records, tmp_path / "a")
    assert not converted and len(errors) == len(data.train)
    converted, errors, _ = convert_images(data.train.records, tmp_path / "b", for_processing=True)
    assert len(converted) == len(data.train) and not errors
