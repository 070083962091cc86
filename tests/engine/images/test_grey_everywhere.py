"""One image has the same grey values in training, prediction, explanation and the viewer."""

import importlib
import keyword
from pathlib import Path

import click
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from image_files import JPEG, picture, write_bytes, write_dicom

from gigamorph.cli.main import cli
from gigamorph.engine.datasets.dataset import grey_of
from gigamorph.engine.datasets.grey import grey_warnings
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import as_stored
from gigamorph.engine.mammography.view.exams import ExamImage
from gigamorph.engine.models.folder import Preprocessing
from gigamorph.engine.predict.job import opened_with_white
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.published.images import published_images
from gigamorph.engine.train.inputs import images

GREY = picture(12)
PREPARED = {"normalize": {"mean": [0.0], "std": [1.0]}, "voi": "none", "flip": "auto", "downsample": 1}

AUTO = {**PREPARED, "voi": "auto"}


def _saved(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def _tiff(path: Path) -> Path:
    tifffile.imwrite(path, GREY)
    return path


FILES = {
    "dicom": lambda path: write_dicom(path / "a.dcm", GREY, WindowCenter=500, WindowWidth=100),
    "png16": lambda path: write_bytes(path / "a.png", imagecodecs.png_encode(GREY)),
    "png8": lambda path: write_bytes(path / "a8.png", imagecodecs.png_encode(picture(8))),
    "tiff": lambda path: _tiff(path / "a.tif"),
    "float": lambda path: _saved(path / "a.npy", GREY.astype(np.float32)),
    "int64": lambda path: _saved(path / "b.npy", GREY.astype(np.int64)),
}


def test_every_command_that_reads_images_has_the_same_option() -> None:
    commands = {}
    for name in cli.list_commands(click.Context(cli)):
        module = f"{name}_" if keyword.iskeyword(name) else name
        commands[name] = getattr(importlib.import_module(f"gigamorph.cli.{module}"), module)
    commands |= {f"data {name}": command for name, command in commands.pop("data").commands.items()}
    helps = {
        name: parameter.help
        for name, command in commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and "--white" in parameter.opts
    }
    # A grey scale of DICOM, or images and a network, are of what reads pixels.
    reading = {
        name
        for name, command in commands.items()
        if {"voi", "images", "evidence"} & {one.name for one in command.params}
    }
    assert set(helps) >= {"train", "predict", "explain", "view", "data check", "data preview", "data convert"}
    assert reading - set(helps) - {"import"} == set()  # import notes the grey scale of a network, and reads no image
    assert len(set(helps.values())) == 1


def test_a_look_warns_once_of_images_of_all_kinds_that_are_black_or_white(tmp_path: Path) -> None:
    dark = GREY.copy()
    dark[0, 0] = 65535  # a single bright pixel makes no image bright
    paths = [write_bytes(tmp_path / f"{n}.png", imagecodecs.png_encode(dark)) for n in range(3)]
    found = published_images([Record(path, 0, "P") for path in paths], like := Preprocessing(), like)
    text = grey_warnings(found)
    assert len(text) == 1
    assert "0.png (and 2 more of 3 checked images): grey values reach only" in text[0]
    assert "--white 65535" in text[0]
    white = write_dicom(tmp_path / "w.dcm", GREY + 1, WindowCenter=1, WindowWidth=1)
    assert "of the pixels are white; choose another" in grey_warnings(images([Record(white, 0, "P")], 1, AUTO))[0]


@pytest.mark.parametrize("white", [4095.0, "auto", None])
@pytest.mark.parametrize("kind", list(FILES))
def test_all_commands_see_the_same_grey_values(tmp_path: Path, kind: str, white: float | str | None) -> None:
    path = FILES[kind](tmp_path)
    record = Record(path, 0, "P1")
    trained = images([record], 1, {**PREPARED, **({} if white is None else {"white": white})})
    seen = {"train": trained[0]["image"]}
    # A published network says nothing of white: --white does.
    published = Classifier(
        torch.nn.Identity(), ["a"], lambda found: published_images(found, like := Preprocessing(voi="none"), like)
    )
    opened = opened_with_white(lambda device: published, white, device="cpu")
    seen["predict"] = opened.open_images([record])[0]["image"]
    seen["explain"] = as_stored(seen["predict"])
    seen["view"] = ExamImage(record, {}, grey=grey_of(trained)).open()
    _, height, width = seen["train"].shape
    values = {name: source.read(0, height, 0, width) for name, source in seen.items()}
    for name, found in values.items():
        assert torch.equal(found, values["train"]), name
    if white == 4095 and kind not in ("dicom", "png8"):
        assert values["view"].max() == 1
    elif kind == "png16" and white is None:
        assert values["view"].max() == pytest.approx(4095 / 65535)


@pytest.mark.parametrize(
    "dtype", ["int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bool", ">i8"]
)
def test_arrays_of_all_types_reach_white(tmp_path: Path, dtype: str) -> None:
    values = np.linspace(0, 1, 40).reshape(5, 8)
    wide = np.dtype(dtype).kind in "iu"
    path = _saved(tmp_path / "a.npy", (values * 4095 if wide else np.rint(values)).astype(dtype))
    source = open_pixels(path)
    assert (source.full, float(source.read(0, 5, 0, 8).max())) == (4095.0 if wide else 1.0, 1.0)
    if wide:
        large = _saved(tmp_path / "b.npy", (values * 200_000).astype(dtype))
        assert open_pixels(large).read(0, 5, 0, 8).max() == 1
        assert open_pixels(path, white=8190).read(0, 5, 0, 8).max() == 0.5


def test_negative_values_are_below_black(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a.npy", np.array([[-1000, 0, 4095]], np.int16))
    assert open_pixels(path).read(0, 1, 0, 3).flatten().tolist() == pytest.approx([-1000 / 32767, 0, 4095 / 32767])


@pytest.mark.parametrize("syntax", ["90", "201"])
def test_a_jpeg_2000_stream_is_believed_about_the_sign(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, syntax: str
) -> None:
    bits = 12 if syntax == "90" else 16
    pixels = picture(bits)
    right = write_dicom(tmp_path / "a.dcm", pixels, JPEG + syntax, bits)
    wrong = write_dicom(tmp_path / "b.dcm", pixels, JPEG + syntax, bits, PixelRepresentation=1)
    expected = open_pixels(right).read(0, 37, 0, 53)
    assert not caplog.messages
    for _ in range(2):
        assert torch.equal(open_pixels(wrong).read(0, 37, 0, 53), expected)
    assert len(caplog.messages) == 1
    assert "b.dcm: the header declares signed pixels, but its JPEG 2000 stream unsigned ones" in caplog.messages[0]


def test_a_signed_stream_under_an_unsigned_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(-32768, 32768, 16, dtype=np.int16).reshape(64, 64)
    stream = imagecodecs.jpeg2k_encode(values, level=0, codecformat="J2K", reversible=True)
    monkeypatch.setattr("image_files.encode", lambda *_: stream)
    path = write_dicom(tmp_path / "a.dcm", values.view(np.uint16), JPEG + "90", 16)
    found = open_pixels(path).read(0, 64, 0, 64)[0].numpy()
    np.testing.assert_allclose(found, (values + 32768.0) / 65535, atol=1e-5)
    assert "unsigned pixels, but its JPEG 2000 stream signed ones" in caplog.text


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"PresentationLUTShape": "INVERSE"}, "INVERSE and MONOCHROME2 contradict"),
        ({"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"}, "IDENTITY and MONOCHROME1"),
        ({"PixelAspectRatio": [2, 1]}, "pixels are not square (PixelAspectRatio 2, 1)"),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, "not square (ImagerPixelSpacing 0.1, 0.2)"),
        ({"PresentationLUTShape": "IDENTITY", "PixelSpacing": [0.1, 0.1]}, ""),
    ],
)
def test_contradictions_of_the_header_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, elements: dict, message: str
) -> None:
    open_pixels(write_dicom(tmp_path / "a.dcm", GREY, **elements))
    assert len(caplog.messages) == bool(message)
    assert message in caplog.text
