"""The DICOM reader on real mammograms, on synthetic files of every lossless syntax, and on damaged ones."""

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from fuzz import DEPTH
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import BIG, DEFLATED, EXPLICIT, JPEG, LOSSLESS, LOSSY, RLE, encode, item, picture, sequence
from pydicom import config, dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut, apply_windowing, get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import UID, AllTransferSyntaxes, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from gigamorph.engine.datasets.index import index_folder
from gigamorph.engine.errors import DataError
from gigamorph.engine.images import codecs
from gigamorph.engine.images.dicom import open_dicom
from gigamorph.engine.images.header import read_info
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import write_phantoms

Write = Callable[..., Path]
# Damaged headers make pydicom warn before we raise.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def whole(source) -> np.ndarray:
    _, height, width = source.shape
    return source.read(0, height, 0, width).numpy()[0]


# ---------------------------------------------------------------------------------------------- real files


def test_ge_mammogram_header(real_data: Path) -> None:
    info = read_info(real_data / "dicom" / "mg_ge_jpeg_lossless.dcm")
    assert (info.laterality, info.view, info.orientation) == ("R", "MLO", ("P", "FL"))
    assert info.spacing == pytest.approx((0.0941, 0.0941), abs=1e-4)
    assert (info.rows, info.columns, info.bits_stored) == (3062, 2394, 12)
    assert info.is_mammogram
    assert not info.for_processing


def test_ge_mammogram_lut_and_sigmoid_window_agree(real_data: Path) -> None:
    path = real_data / "dicom" / "mg_ge_jpeg_lossless.dcm"
    for index in range(3):  # NORMAL, HARDER, SOFTER, stored once as a LUT and once as a sigmoid window
        lut, window = whole(open_pixels(path, voi=f"lut:{index}")), whole(open_pixels(path, voi=f"window:{index}"))
        assert np.abs(lut - window).mean() * 4095 < 1
        assert 0.5 < lut.max() <= 1
    # The default is the first LUT: what pydicom makes of it, on breast pixels.
    ds = dcmread(path)
    expected = apply_voi_lut(open_dicom(path).read(0, 3062, 0, 2394)[0], ds, index=0)
    padding = open_dicom(path).read(0, 3062, 0, 2394)[0] <= 30
    got = whole(open_pixels(path, flip=False))
    np.testing.assert_allclose(got[~padding] * 4095, expected[~padding], atol=1e-3)


def test_ge_mammogram_padding_is_black_and_chest_wall_left(real_data: Path) -> None:
    path = real_data / "dicom" / "mg_ge_jpeg_lossless.dcm"
    stored = open_dicom(path)
    assert stored.flips() == (True, False)
    raw = stored.read(0, 3062, 0, 2394)[0]
    assert ((raw >= 0) & (raw <= 30)).mean() == pytest.approx(0.680, abs=0.0005)
    shown = whole(open_pixels(path))
    assert np.all(shown[:, ::-1][raw <= 30] == 0)
    assert shown[:, :100].mean() > 0.2
    assert shown[:, -100:].mean() < 0.01
    np.testing.assert_array_equal(whole(open_pixels(path, flip=False)), shown[:, ::-1])
    # The side that the pixels tell is the side that the header tells.
    assert stored._breast_is_right()


def test_film_is_the_same_in_both_codecs(real_data: Path) -> None:
    films = [
        whole(open_pixels(real_data / "dicom" / f"mg_film_{codec}.dcm"))
        for codec in ("jpeg2000", "jpeg_extended_12bit")
    ]
    assert films[0].shape == films[1].shape == (4664, 3064)
    assert np.corrcoef(films[0].ravel()[::11], films[1].ravel()[::11])[0, 1] > 0.9998
    assert np.abs(films[0] - films[1]).mean() * 4095 < 20


def test_tomosynthesis_needs_a_frame_and_finds_its_window(real_data: Path) -> None:
    path = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    with pytest.raises(DataError, match=r"dbt_4frames.*4 frames"):
        open_pixels(path)
    with pytest.raises(DataError, match="frame 4"):
        open_pixels(path, frame=4)
    assert read_info(path).laterality == "L"
    frames = [open_dicom(path, frame=frame) for frame in range(4)]
    pixels = [frame.read(0, 128, 0, 128) for frame in frames]
    np.testing.assert_array_equal(np.concatenate(pixels), dcmread(path).pixel_array)
    # Window 512/512 of the shared functional groups, which a look at the top level misses.
    shown = whole(open_pixels(path, frame=2, flip=False))
    window = np.clip((pixels[2][0] - 511.5) / 511 + 0.5, 0, 1)
    np.testing.assert_allclose(shown, np.where(pixels[2][0] <= 4, 0, window), atol=1e-5)


# ---------------------------------------------------------------------------------------------- every syntax


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_syntaxes_are_bit_exact(write_dicom: Write, syntax: str, bits: int) -> None:
    pixels = picture(bits)
    path = write_dicom(pixels, syntax, bits)
    source = open_pixels(path)
    np.testing.assert_array_equal(source.stored.read(0, 37, 0, 53)[0], pixels)
    expected = (pixels / (2**bits - 1)).astype(np.float32)
    np.testing.assert_array_equal(whole(source), expected)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read(5, 21, 7, 50)[0], expected[5:21, 7:50])


@pytest.mark.parametrize("kept", [0, 132], ids=["data set alone", "with meta information"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_without_prefix(write_dicom: Write, tmp_path: Path, syntax: str, kept: int) -> None:
    """Some scanners and exports write the data set alone; older ones put a group length before it."""
    pixels = picture(12)
    written = write_dicom(pixels, syntax).read_bytes()
    (length,) = struct.unpack("<I", written[140:144])
    bare = tmp_path / "bare" / "image.dcm"
    bare.parent.mkdir()
    bare.write_bytes(written[kept or 144 + length :])
    np.testing.assert_array_equal(open_pixels(bare).stored.read(0, 37, 0, 53)[0], pixels)
    (record,) = index_folder(bare.parent).records
    assert record.extra["rows"] == "37" and record.patient_known
    np.testing.assert_array_equal(open_pixels(write_dicom(pixels, syntax)).stored.read(0, 37, 0, 53)[0], pixels)


@pytest.mark.parametrize(
    "head", [b"\2\0\0\0garbage", b"\x08\0\x05\0\xff\xff\xff\xff", b"\x08\0\x16\0UI\4\0abcd", b"\x08\0"]
)
def test_what_only_begins_like_a_data_set_is_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "image.dcm"
    path.write_bytes(head + bytes(300))
    with pytest.raises(DataError, match=r"image.dcm: (is not a|has no Rows|damaged)"):
        open_pixels(path)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_frames_of_every_syntax(write_dicom: Write, syntax: str) -> None:
    pixels = picture(12, (3, 37, 53))
    path = write_dicom(pixels, syntax)
    for frame in range(3):
        np.testing.assert_array_equal(open_dicom(path, frame=frame).read(0, 37, 0, 53)[0], pixels[frame])


@pytest.mark.parametrize(("syntax", "bits"), [(JPEG + "50", 8), (JPEG + "51", 8), (JPEG + "51", 12)])
def test_lossy_syntaxes_are_what_the_codec_says(write_dicom: Write, syntax: str, bits: int) -> None:
    pixels = picture(bits)
    stored = open_pixels(write_dicom(pixels, syntax, bits)).stored.read(0, 37, 0, 53)[0]
    np.testing.assert_array_equal(stored, imagecodecs.jpeg8_decode(encode(pixels, syntax, bits)))
    assert np.abs(stored.astype(int) - pixels).mean() < 0.04 * 2**bits


@pytest.mark.parametrize("syntax", [RLE, JPEG + "70", JPEG + "80", JPEG + "90"])
@pytest.mark.parametrize(("offsets", "fragments"), [("basic", 1), ("basic", 3), ("none", 1), ("extended", 1)])
def test_frames_however_they_are_indexed(write_dicom: Write, syntax: str, offsets: str, fragments: int) -> None:
    pixels = picture(12, (4, 37, 53))
    path = write_dicom(pixels, syntax, offsets=offsets, fragments=fragments)
    for frame in range(4):
        np.testing.assert_array_equal(open_dicom(path, frame=frame).read(0, 37, 0, 53)[0], pixels[frame])


def test_frames_in_fragments_without_a_table_are_refused(write_dicom: Write) -> None:
    path = write_dicom(picture(12, (4, 37, 53)), JPEG + "70", offsets="none", fragments=3)
    with pytest.raises(DataError, match="12 fragments for 4 frames without a table"):
        open_dicom(path, frame=1)


def test_a_table_of_offsets_that_lies_is_not_believed(write_dicom: Write) -> None:
    """Offsets beyond 4 GiB wrap around in the basic table; then the fragments themselves tell."""
    pixels = picture(12, (3, 37, 53))
    path = write_dicom(pixels, JPEG + "70")
    data = bytearray(path.read_bytes())
    table = data.index(b"\xfe\xff\x00\xe0\x0c\x00\x00\x00") + 8
    data[table + 8 : table + 12] = b"\0\0\0\0"
    path.write_bytes(bytes(data))
    for frame in range(3):
        np.testing.assert_array_equal(open_dicom(path, frame=frame).read(0, 37, 0, 53)[0], pixels[frame])


def test_a_compressed_syntax_without_a_decoder_is_refused(write_dicom: Write) -> None:
    path = write_dicom(picture(12), JPEG + "70")
    path.write_bytes(path.read_bytes().replace((JPEG + "70").encode(), (JPEG + "92").encode()))
    with pytest.raises(DataError, match=r"pixel data cannot be decoded \(JPEG 2000 Part 2 .*\); convert it"):
        open_dicom(path).read(0, 37, 0, 53)


@pytest.mark.parametrize("syntax", [one for one in AllTransferSyntaxes if one.is_encapsulated])
def test_pydicom_decodes_no_compressed_syntax_that_we_refuse(syntax: UID) -> None:
    try:
        get_decoder(syntax)
    except NotImplementedError:
        return
    assert codecs.is_known(syntax)


def test_bytes_in_big_endian_words(write_dicom: Write) -> None:
    """8-bit pixels as OW in big-endian files: two pixels a word, the first in the lower byte."""
    pixels = picture(8, (3, 37, 53))
    path = write_dicom(pixels, BIG, 8)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x7f\xe0\x00\x10OB") + 4
    data[place : place + 2] = b"OW"
    words = np.frombuffer(bytes(data[place + 8 :]), np.uint16).byteswap().tobytes()
    path.write_bytes(bytes(data[: place + 8]) + words)
    for frame in range(3):
        np.testing.assert_array_equal(open_dicom(path, frame=frame).read(0, 37, 0, 53)[0], pixels[frame])


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG, RLE, JPEG + "70"])
def test_signed_pixels_and_garbage_above_the_high_bit(write_dicom: Write, syntax: str) -> None:
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    garbage = np.uint16(0xA000 if syntax != JPEG + "70" else 0)
    patterns = (values.view(np.uint16) & 0x0FFF) | garbage
    path = write_dicom(patterns, syntax, bits=12, PixelRepresentation=1)
    np.testing.assert_allclose(whole(open_pixels(path)), (values + 2048) / 4095, atol=1e-6)
    shifted = ((values.view(np.uint16) & 0x0FFF) << 2) | np.uint16(0xC003 if syntax != JPEG + "70" else 0)
    if syntax != JPEG + "70":
        path = write_dicom(shifted, syntax, bits=12, PixelRepresentation=1, HighBit=13)
        np.testing.assert_allclose(whole(open_pixels(path)), (values + 2048) / 4095, atol=1e-6)


@pytest.mark.parametrize("syntax", [JPEG + "90", JPEG + "80"])
def test_signed_code_streams(write_dicom: Write, syntax: str) -> None:
    """JPEG 2000 knows signed samples and decodes to them; JPEG-LS keeps the words, sign extended."""
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    unsigned = values.view(np.uint16)
    path = write_dicom(unsigned, syntax, 16, BitsStored=12, HighBit=11, PixelRepresentation=1)
    np.testing.assert_allclose(whole(open_pixels(path)), (values + 2048) / 4095, atol=1e-6)
    if syntax == JPEG + "90":
        signed = imagecodecs.jpeg2k_encode(values, level=0, codecformat="J2K", reversible=True)
        old, data = encode(unsigned, syntax, 16), path.read_bytes()
        signed += b"\0" * (len(signed) % 2)
        start = data.index(old) - 4
        path.write_bytes(data[:start] + len(signed).to_bytes(4, "little") + signed + b"\xfe\xff\xdd\xe0\0\0\0\0")
        assert imagecodecs.jpeg2k_decode(signed).dtype == np.int16
        np.testing.assert_allclose(whole(open_pixels(path)), (values + 2048) / 4095, atol=1e-6)


# ---------------------------------------------------------------------------------------------- grey scale


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2000.0, 900.0), (100.5, 2.0), (2048.0, 4096.0), (-50.0, 10000.0)])
def test_windows_agree_with_pydicom(write_dicom: Write, function: str, center: float, width: float) -> None:
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = write_dicom(pixels, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    expected = apply_windowing(pixels, dcmread(path)) / 4095
    np.testing.assert_allclose(whole(open_pixels(path)), expected, atol=1 / 65535)


def test_order_of_operations(write_dicom: Write) -> None:
    """Modality, then window, then inversion, then padding."""
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    elements = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 2001}
    elements |= {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 3900, "PhotometricInterpretation": "MONOCHROME1"}
    shown = whole(open_pixels(write_dicom(pixels, **elements)))
    window = np.clip((2.0 * pixels - 1000 - 999.5) / 2000 + 0.5, 0, 1)
    expected = np.where((pixels >= 3900) & (pixels <= 4000), 0, 1 - window)
    np.testing.assert_allclose(shown, expected, atol=1e-5)


def lut_item(entries: np.ndarray, first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return item


def test_voi_lut_goes_before_windows_and_is_clamped(write_dicom: Write) -> None:
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    entries = (np.arange(1000) ** 2 // 1000).astype(np.uint16)  # 0 to 998: 10 bits
    elements = {
        "VOILUTSequence": Sequence([lut_item(entries, 500, 10)]),
        "WindowCenter": [9, 99],
        "WindowWidth": [2, 3],
    }
    path = write_dicom(pixels, **elements)
    expected = entries[np.clip(pixels.astype(int) - 500, 0, 999)] / 1023
    np.testing.assert_allclose(whole(open_pixels(path)), expected, atol=1e-6)
    second = np.clip((pixels - 98.5) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(whole(open_pixels(path, voi="window:1")), second, atol=1e-5)
    np.testing.assert_allclose(whole(open_pixels(path, voi="none")), pixels / 4095, atol=1e-6)
    for voi, message in [("window:2", "has 2"), ("lut:1", "has 1"), ("bright", "must be 'auto'"), ("lut:x", "has 1")]:
        with pytest.raises(DataError, match=message):
            open_pixels(path, voi=voi)


def test_voi_lut_with_bytes_and_with_too_few_bits_declared(write_dicom: Write) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [256, 0, 8])
    item.add_new("LUTData", "OW", bytes(range(255, -1, -1)))
    path = write_dicom(pixels, bits=8, VOILUTSequence=Sequence([item]))
    np.testing.assert_allclose(whole(open_pixels(path)), 1 - pixels / 255, atol=1e-6)
    wide = lut_item(np.arange(256) * 16, 0, 8)
    path = write_dicom(pixels, bits=8, VOILUTSequence=Sequence([wide]))
    np.testing.assert_allclose(whole(open_pixels(path)), pixels * 16.0 / 4095, atol=1e-6)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"WindowCenter": 9, "WindowWidth": 0}, "WindowWidth 0"),
        ({"WindowCenter": 9, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        ({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "RGB"),
        ({"BitsStored": 20}, "20 bits of 16"),
        ({"PixelRepresentation": 2}, "PixelRepresentation 2 must be 0 or 1"),
        ({"PixelRepresentation": 65535}, "PixelRepresentation 65535 must be 0 or 1"),
        ({"Rows": 36}, "3922 bytes of pixel data instead of 3816 for 1 frames of 36 x 53; correct the header"),
        ({"Columns": 52}, "3922 bytes of pixel data instead of 3848 for 1 frames of 37 x 52"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "3922 bytes of pixel data instead of 1961"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2.1"}, "For Processing"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "For Processing"),
    ],
)
def test_headers_that_cannot_be_right(write_dicom: Write, elements: dict, message: str) -> None:
    path = write_dicom(picture(12), **elements)
    with pytest.raises(DataError, match=message) as error:
        open_pixels(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("syntax", [EXPLICIT, DEFLATED])
def test_a_few_bytes_after_the_pixels_are_padding(write_dicom: Write, syntax: str) -> None:
    """Fewer than a row or column of another image would have."""
    pixels = picture(12, (37, 53))
    path = write_dicom(np.append(pixels.ravel(), np.zeros(36, np.uint16))[None], syntax, Rows=37, Columns=53)
    np.testing.assert_array_equal(open_dicom(path).read(0, 37, 0, 53)[0], pixels)


@pytest.mark.parametrize("syntax", [JPEG + end for end in ("57", "70", "80", "90", "201")])
@pytest.mark.parametrize("high", [12, 15])
def test_a_high_bit_that_a_code_stream_cannot_have(write_dicom: Write, syntax: str, high: int) -> None:
    """Its values were shifted down; they are the stored values whatever the header says."""
    path = write_dicom(picture(12), syntax, HighBit=high)
    with pytest.raises(DataError, match=f"x.dcm: 12 bits stored and high bit {high} contradict each other"):
        open_pixels(path)


@pytest.mark.parametrize("elements", [{"Rows": 36}, {"Columns": 52}, {"Rows": 8, "Columns": 8}])
def test_rle_that_holds_more_than_the_header_says(write_dicom: Write, elements: dict) -> None:
    """RLE has no size of its own, so that another width shears the image."""
    with pytest.raises(DataError, match=r"x\.dcm: damaged pixel data"):
        whole(open_pixels(write_dicom(picture(12), RLE, **elements)))


def test_bombs_take_no_more_than_the_header_says(write_dicom: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(picture(8, (64, 64)), RLE, 8)
    start = struct.pack("<16I", 1, 64, *[0] * 14)
    bomb = start + b"\x81\x05" * 400_000  # 51 MB
    monkeypatch.setattr("image_files.encode", lambda *_: bomb)
    path = write_dicom(picture(8, (64, 64)), RLE, 8)
    source = open_pixels(path)
    tracemalloc.start()
    with pytest.raises(DataError, match="damaged pixel data"):
        whole(source)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(bomb)
    tracemalloc.stop()
    # A size that two bytes for 128 cannot reach is refused before anything is allocated.
    monkeypatch.setattr("image_files.encode", lambda *_: start + b"\x81\x05" * 1000)
    with pytest.raises(DataError, match="RLE bytes cannot contain"):
        whole(open_pixels(write_dicom(np.zeros((512, 512), np.uint8), RLE, 8)))


def test_a_frame_of_a_deflated_file_holds_no_other(write_dicom: Write) -> None:
    pixels = np.zeros((20, 500, 500), np.uint16)
    pixels[19] = picture(12, (500, 500))
    source = open_pixels(write_dicom(pixels, DEFLATED), frame=19, voi="none", flip=False)
    tracemalloc.start()
    seen = source.stored.read(0, 500, 0, 500)[0]  # pyright: ignore[reportArgumentType]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(seen, pixels[19])
    assert peak < pixels.nbytes  # of 20 frames


def test_for_processing_on_demand_ignores_windows(write_dicom: Write) -> None:
    pixels = picture(12)
    path = write_dicom(pixels, PresentationIntentType="FOR PROCESSING", WindowCenter=9, WindowWidth=9)
    shown = whole(open_pixels(path, for_processing=True))
    np.testing.assert_allclose(shown, pixels / 4095, atol=1e-6)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG + "90"])
def test_minmax_is_over_what_is_no_padding(write_dicom: Write, inverted: bool, syntax: str) -> None:
    pixels = picture(12) // 4 + 1000
    pixels[:, :9], pixels[0, 20] = 50, 1000
    elements = {"PhotometricInterpretation": f"MONOCHROME{1 if inverted else 2}", "PixelPaddingValue": 50}
    source = open_pixels(write_dicom(pixels, syntax, WindowCenter=9, WindowWidth=9, **elements), voi="minmax")
    source = pickle.loads(pickle.dumps(source))
    inside = pixels[:, 9:]
    expected = (pixels - 1000) / float(inside.max() - 1000)
    expected = np.where(pixels == 50, 0, 1 - expected if inverted else expected)
    np.testing.assert_allclose(whole(source), expected, atol=1 / 65535)
    assert any(f"minmax, 1000 to {inside.max()}" in step for step in source.steps)


def test_grey_scale_by_name(write_dicom: Write) -> None:
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    luts = [lut_item(np.arange(4096) // 2, 0, 12), lut_item(np.arange(4096) // 3, 0, 12)]
    luts[0].LUTExplanation, luts[1].LUTExplanation = "NORMAL", "SOFTER"
    elements = {"WindowCenter": [9, 99], "WindowWidth": [2, 30], "WindowCenterWidthExplanation": ["A", "Hard one"]}
    path = write_dicom(pixels, VOILUTSequence=Sequence(luts), **elements)
    for named, numbered in [("lut:softer", "lut:1"), ("window:HARD ONE", "window:1"), ("lut:NORMAL", "auto")]:
        np.testing.assert_array_equal(whole(open_pixels(path, voi=named)), whole(open_pixels(path, voi=numbered)))
    for voi, message in [("window:B", "has 2 of these"), ("window:", "must be 'auto'"), ("window", "must be 'auto'")]:
        with pytest.raises(DataError, match=message):
            open_pixels(path, voi=voi)


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 60000, "WindowWidth": 100},
        {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095},
        {"RescaleSlope": "1e-300", "RescaleIntercept": 5, "WindowCenter": 50, "WindowWidth": 10},
    ],
)
def test_a_header_that_makes_the_image_black_is_refused(write_dicom: Write, elements: dict) -> None:
    with pytest.raises(DataError, match=r"x\.dcm: .*same grey"):
        open_pixels(write_dicom(picture(12), **elements))


@pytest.mark.parametrize("stored", [2, 9])
def test_a_code_stream_with_fewer_bits_than_the_header_says(write_dicom: Write, stored: int) -> None:
    """A damaged bit depth gives an image that is all black: an error, if there is anything in it."""
    path = write_dicom(picture(12), JPEG + "90", WindowCenter=2500, WindowWidth=1000)
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\x4f\xff\x51") + 42  # Ssiz, bits less one
    assert data[place] == 11
    data[place] = stored - 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"x\.dcm: (decodes to uint8, not 12 bits|all pixels get the same grey)"):
        whole(open_pixels(path))


@pytest.mark.parametrize("syntax", [JPEG + "70", JPEG + "80", JPEG + "90"])
def test_a_code_stream_with_more_bits_than_the_header_says(write_dicom: Write, syntax: str) -> None:
    """Precision alone may differ; values that the header has no bits for would wrap around."""
    pixels = picture(12)
    sound = write_dicom(pixels, syntax, 16, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(open_dicom(sound).read(0, 37, 0, 53)[0], pixels)
    with pytest.raises(DataError, match=r"x\.dcm: pixels have 14 bits, but BitsStored is 12"):
        open_dicom(write_dicom(pixels * 4, syntax, 16, BitsStored=12, HighBit=11)).read(0, 37, 0, 53)


def test_a_code_stream_that_decodes_to_nothing(write_dicom: Write) -> None:
    """OpenJPEG gives one value for a stream whose parts it cannot find, and no error."""
    pixels = picture(12)
    path = write_dicom(pixels, JPEG + "201")
    data = bytearray(path.read_bytes())
    stream = encode(pixels, JPEG + "201", 12)
    place = data.index(stream) + stream.index(b"\xff\x52")  # COD: decomposition levels, code block size
    data[place + 9 : place + 11] = b"\0\0"
    path.write_bytes(bytes(data))
    assert np.ptp(imagecodecs.jpeg2k_decode(bytes(data[data.index(stream[:40]) : -8]))) == 0
    with pytest.raises(DataError, match=r"x\.dcm: 1\d{3} bytes decode to pixels of one value"):
        whole(open_pixels(path))


def test_a_blank_frame_is_an_image(write_dicom: Write) -> None:
    pixels = np.zeros((30, 40), np.uint16)
    assert not whole(open_pixels(write_dicom(pixels, JPEG + "90", PixelPaddingValue=0))).any()
    pixels[3:9] = 4
    elements = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4}
    assert not whole(open_pixels(write_dicom(pixels, JPEG + "90", **elements))).any()


def test_windows_of_each_frame(write_dicom: Write) -> None:
    pixels = np.stack([np.arange(4096, dtype=np.uint16).reshape(64, 64)] * 3)
    groups = [
        item(
            FrameVOILUTSequence=sequence(WindowCenter=1000 * (k + 1), WindowWidth=501),
            PixelValueTransformationSequence=sequence(RescaleSlope=k + 1, RescaleIntercept=0),
        )
        for k in range(3)
    ]
    path = write_dicom(pixels, PerFrameFunctionalGroupsSequence=Sequence(groups), WindowCenter=7, WindowWidth=7)
    for frame in range(3):
        window = np.clip(((frame + 1.0) * pixels[0] - (1000 * (frame + 1) - 0.5)) / 500 + 0.5, 0, 1)
        np.testing.assert_allclose(whole(open_pixels(path, frame=frame)), window, atol=1e-5)


def test_steps_say_what_was_done_and_name_no_patient(write_dicom: Write) -> None:
    elements = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 2, "RescaleIntercept": -5}
    elements |= {
        "WindowCenter": 1000,
        "WindowWidth": 900,
        "VOILUTFunction": "SIGMOID",
        "PatientOrientation": ["P", "L"],
    }
    elements |= {"PixelPaddingValue": 7, "PatientName": "Doe^Jane", "StudyInstanceUID": "1.2.99.7"}
    path = write_dicom(
        picture(12), JPEG + "80", WindowCenterWidthExplanation="seen by Jane", name="P1_Jane.dcm", **elements
    )
    source = open_pixels(path)
    steps = source.steps
    expected = ["JPEG-LS Lossless", "rescaled by 2, -5", "VOI window:0, SIGMOID 1000/900", "inverted", "padding 7 to 7"]
    expected += ["grey 0 to 65520 as 0 to 1", "mirrored left-right"]
    assert len(steps) == len(expected)
    assert all(word in step for word, step in zip(expected, steps, strict=True)), steps
    for text in (str(steps), repr(read_info(path))):
        assert not any(word in text for word in ("Jane", "P1", "1.2.99.7"))


def test_odd_values_are_not_printed(
    write_dicom: Write, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """pydicom would warn of each and print it: identifiers end up in logs."""
    path = write_dicom(picture(12))
    data = path.read_bytes()
    assert b"UI\6\x001.2.3\0" in data
    path.write_bytes(data.replace(b"UI\6\x001.2.3\0", b"UI\6\x001.Jane").replace(b"A\\R ", b"a\\r "))
    assert dcmread(path).SOPInstanceUID == "1.Jane"
    assert any("1.Jane" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    caplog.clear()
    open_pixels(path).read(0, 5, 0, 5)
    assert read_info(path).orientation == ("A", "R")
    assert not [str(warning.message) for warning in recwarn]
    assert not caplog.records
    assert config.settings.reading_validation_mode == config.WARN


@pytest.mark.parametrize("syntax", [JPEG + "110", "1.2.840.10008.1.2.8.1", "1.2.3.4"])
def test_a_syntax_that_nobody_decodes(write_dicom: Write, syntax: str) -> None:
    path = write_dicom(picture(12), JPEG + "70")
    data = path.read_bytes().replace((JPEG + "70").encode(), syntax.encode().ljust(22, b"\0"), 1)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.dcm: ") as error:
        whole(open_pixels(path))
    assert "\n" not in str(error.value)


def test_boxes_go_back_to_the_file(write_dicom: Write) -> None:
    pixels = picture(12)
    source = open_pixels(write_dicom(pixels, PatientOrientation=["P", "HL"]))
    left, top, right, bottom = 5, 7, 20, 30
    box = source.to_original.boxes([left, top, right, bottom])
    x0, y0, x1, y1 = box.astype(int)
    np.testing.assert_array_equal(box, [53 - 20, 37 - 30, 53 - 5, 37 - 7])
    seen = source.read(top, bottom, left, right).numpy()[0]
    np.testing.assert_array_equal(seen, (pixels[y0:y1, x0:x1][::-1, ::-1] / 4095).astype(np.float32))


# ---------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("orientation", "flips"),
    [
        (["A", "R"], (False, False)),
        (["P", "L"], (True, False)),
        (["P", "FL"], (True, False)),
        (["A", "H"], (False, True)),
        (["P", "HL"], (True, True)),
    ],
)
def test_orientation(write_dicom: Write, orientation: list[str], flips: tuple[bool, bool]) -> None:
    pixels = picture(12)
    path = write_dicom(pixels, PatientOrientation=orientation)
    source = open_pixels(path)
    assert source.stored.flips() == flips
    expected = pixels[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1] / np.float32(4095)
    np.testing.assert_allclose(whole(source), expected, atol=1e-6)
    np.testing.assert_array_equal(source.read(3, 20, 4, 50)[0], whole(source)[3:20, 4:50])


def test_what_the_detector_did_is_not_done_again(write_dicom: Write) -> None:
    elements = {"FieldOfViewHorizontalFlip": "YES", "FieldOfViewRotation": 180}
    assert open_pixels(write_dicom(picture(12), **elements)).stored.flips() == (False, False)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("padding", [None, 5])
def test_chest_wall_is_found_without_orientation(write_dicom: Write, inverted: bool, padding: int | None) -> None:
    pixels = np.full((300, 101), 5 if not inverted else 4095, np.uint16)
    pixels[40:280, 60:] = 2000
    elements = {"PatientOrientation": None, "PhotometricInterpretation": f"MONOCHROME{1 if inverted else 2}"}
    if padding is not None:
        elements["PixelPaddingValue"] = 4095 if inverted else 5
    path = write_dicom(pixels, **elements)
    assert open_pixels(path).stored.flips() == (True, False)
    other = write_dicom(np.ascontiguousarray(pixels[:, ::-1]), **elements)
    assert open_pixels(other).stored.flips() == (False, False)


def test_other_modalities_are_not_flipped(write_dicom: Write) -> None:
    path = write_dicom(
        picture(12), Modality="DX", SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", PatientOrientation=["P", "F"]
    )
    assert open_pixels(path).stored.flips() == (False, False)


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_truncated_anywhere_is_an_error_that_names_the_file(write_dicom: Write, syntax: str) -> None:
    bits = 8 if syntax == JPEG + "50" else 12
    path = write_dicom(picture(bits), syntax, bits)
    data = path.read_bytes()
    cut = path.with_name("cut.dcm")
    places = sorted({*range(0, len(data), max(1, len(data) // 97)), len(data) - 1, len(data) - 9})
    for place in places:
        cut.write_bytes(data[:place])
        if syntax == DEFLATED and place == len(data) - 1:
            # The last byte only makes the length even; the image is whole without it.
            np.testing.assert_array_equal(whole(open_pixels(cut)), whole(open_pixels(path)))
            continue
        with pytest.raises(DataError) as error:
            whole(open_pixels(cut))
        assert str(cut) in str(error.value), place
        assert "\n" not in str(error.value), place


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.99])
def test_truncated_real_files(real_data: Path, tmp_path: Path, where: float) -> None:
    for path in sorted((real_data / "dicom").iterdir()):
        data = path.read_bytes()
        cut = tmp_path / path.name
        cut.write_bytes(data[: int(len(data) * where)])
        frame = 0 if path.name.startswith("dbt") else None
        with pytest.raises(DataError, match=path.name):
            open_pixels(cut, frame=frame).read(0, 10, 0, 10)


@settings(deadline=None, max_examples=75 * DEPTH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(syntax=st.sampled_from(LOSSLESS), seed=st.integers(0, 2**32 - 1))
def test_flipped_bytes_never_crash(write_dicom: Write, syntax: str, seed: int) -> None:
    """Damage inside may decode to something, but to an image of the right shape, or it is a DataError."""
    path = write_dicom(picture(12), syntax)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(data), 5):
        data[place] = rng.integers(256)
    path.write_bytes(bytes(data))
    try:
        source = open_pixels(path, frame=0)
        _, height, width = source.shape
        # A damaged size that still fits the file may be anything; only reads of what it claims count.
        assert whole(source).shape == (height, width)
    except DataError as error:
        assert str(path) in str(error)


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "report.dcm"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.3", "P1"
    ds.save_as(path, enforce_file_format=True)
    with pytest.raises(DataError, match=r"report\.dcm: has no Rows"):
        open_pixels(path)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    table = write_phantoms(tmp_path, patients=2, height=256, width=192, fractions=(0.5, 0.5, 0.0))
    path = sorted((table.parent / "images").iterdir())[0]
    source = open_pixels(path)
    source.read(0, 10, 0, 10)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="truncated"):
        source.read(200, 256, 0, 192)


def test_jpeg_2000_that_claims_another_size_is_not_decoded(write_dicom: Write) -> None:
    path = write_dicom(picture(12), JPEG + "90")
    data = bytearray(path.read_bytes())
    size = data.index(b"\xff\x4f\xff\x51") + 12  # Ysiz
    assert int.from_bytes(data[size : size + 4], "big") == 37
    data[size] = 3  # 50 million rows
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="not 37 x 53 with 1 as"):
        whole(open_pixels(path))
