import errno

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.datasets.views import DownsampledSource, MirroredSource
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize, to_original
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.run import PredictOptions, predict
from gigamorph.engine.train.explanation import Explanation, explain_class
from gigamorph.engine.train.heatmap import overlay_name, write_overlay


@pytest.fixture
def source():
    return open_pixels(torch.rand(1, 1111, 603, generator=torch.Generator().manual_seed(0)))


def expected(source, evidence):
    """The same picture from whole native-size maps."""
    _, h, w = source.shape
    positive = (evidence - evidence.median().clamp(min=0)).clamp(min=0)
    heat = F.interpolate((positive / positive.max())[None, None], (h, w), mode="bilinear")[0, 0]
    alpha = heat.sqrt() * 0.6
    return heat, alpha


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_overlay_is_the_whole_image_one_strip_at_a_time(tmp_path, source, suffix):
    evidence = torch.randn(35, 19, generator=torch.Generator().manual_seed(1)) + 0.3
    path = tmp_path / f"map{suffix}"
    write_overlay(Explanation(source, evidence), path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the private mode of a temporary file
    picture = np.array(Image.open(path)) if suffix == ".png" else tifffile.imread(path)
    assert picture.shape == (1111, 603, 3) and picture.dtype == np.uint8
    heat, alpha = expected(source, evidence)
    grey = source.read(0, 1111, 0, 603)[0]
    # blue = grey * (1 - alpha): linear in the grey window, whose ends are those of a sample
    where = alpha == 0
    low, high = np.polyfit(grey[where].numpy(), picture[..., 2][where.numpy()], 1)[::-1]
    assert low == pytest.approx(0, abs=3) and high == pytest.approx(255, abs=6)
    red_minus_blue = picture[..., 0].astype(float) - picture[..., 2]
    assert np.abs(red_minus_blue - 255 * alpha.numpy()).max() <= 1.01
    assert np.abs((picture[..., 1].astype(float) - picture[..., 2]) - 255 * (alpha * heat).numpy()).max() <= 1.01


def test_what_most_of_the_image_has_is_left_grey(tmp_path, source):
    evidence = torch.full((35, 19), 0.8)
    evidence[20:24, 10:12] = 1.0
    write_overlay(Explanation(source, evidence), tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png")).astype(int)
    coloured = picture[..., 0] != picture[..., 2]
    assert coloured[650:740, 325:370].all() and not coloured[:580].any() and not coloured[:, :270].any()


@pytest.mark.parametrize("shape", [(900, 700), (90, 300), (40, 24)])
def test_a_caption_stands_in_the_corner_where_nothing_stands_out(tmp_path, shape):
    source = open_pixels(torch.rand(1, *shape, generator=torch.Generator().manual_seed(2)))
    evidence = torch.zeros(10, 10)
    evidence[:2, :] = evidence[:, 8:] = 1.0  # all corners but the one at the bottom left
    found = Explanation(source, evidence)
    write_overlay(found, tmp_path / "plain.png")
    write_overlay(found, tmp_path / "a.png", caption="malignant: probability 0.931, log-odds +2.60 $x^2$")
    plain, picture = (np.array(Image.open(tmp_path / name)).astype(int) for name in ("plain.png", "a.png"))
    assert picture.shape == plain.shape == (*shape, 3)
    rows, columns = np.nonzero((picture != plain).any(-1))
    assert rows.min() > shape[0] / 2 and columns.min() == 0
    if min(shape) > 40:  # the colour bar, from black to yellow
        bar = (picture[..., 0] - picture[..., 2])[rows.min() :, : columns.max() + 1].max(0)
        bar = bar[bar.nonzero()[0][0] : bar.argmax() + 1]
        assert len(bar) > 100 and bar[-1] > 120 and np.corrcoef(bar, np.sqrt(np.arange(len(bar))))[0, 1] > 0.99
    text = picture[rows.min() :, : columns.max() + 1]
    assert text.max() > 150 and (text[..., 0] == text[..., 2]).mean() > 0.6  # light and grey


def test_negative_or_no_evidence_leaves_the_image_grey(tmp_path, source):
    write_overlay(Explanation(source, -torch.rand(8, 8)), tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png"))
    assert (picture[..., 0] == picture[..., 2]).all() and picture.std() > 50


def test_a_large_image_is_a_tiff_and_other_suffixes_are_refused(tmp_path, source):
    assert overlay_name("x", (1, 4096, 3328)) == "x.png"
    assert overlay_name("x", (1, 32768, 32768)) == "x.tif"
    with pytest.raises(GigamorphError, match=r"a\.jpg: the suffix of a heat map must be"):
        write_overlay(Explanation(source, torch.rand(3, 3)), tmp_path / "a.jpg")


def test_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, source, monkeypatch):
    import os

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GigamorphError, match=r"a\.png: the heat map cannot be written: No space left on device"):
        write_overlay(Explanation(source, torch.rand(3, 3)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_native_size_float_map_is_held(tmp_path):
    """4096 x 4096 is 67 MB per float map; a strip of 512 rows is 8 MB, the 8-bit picture of a TIFF is streamed."""

    class Blank:
        shape = (1, 4096, 4096)
        name = "blank"
        largest = 0

        def read(self, top, bottom, left, right):
            self.largest = max(self.largest, (bottom - top) * (right - left))
            return torch.zeros(1, bottom - top, right - left)

    blank = Blank()
    write_overlay(Explanation(blank, torch.rand(128, 128)), tmp_path / "a.tif")
    assert blank.largest <= 512 * 4096


def colour(path):
    """How much red there is beyond grey, (H, W); 0 without evidence."""
    picture = np.array(Image.open(path)).astype(int)
    return picture[..., 0] - picture[..., 2]


@pytest.mark.parametrize("up_down", [False, True])
def test_evidence_goes_back_to_the_stored_image(tmp_path, up_down):
    """Evidence at one cell of a mirrored and averaged image colours the pixels that the cell was made of."""
    image = np.random.default_rng(0).random((602, 452), dtype=np.float32)
    source = MirroredSource(
        DownsampledSource(open_pixels(image, flip=True, normalize=Normalize((0.3,), (0.1,))), 3),
        left_right=False,
        up_down=up_down,
    )
    evidence = torch.zeros(50, 30)  # cells of 4 x 5 pixels of 3 x 3
    evidence[7, 22] = 1
    write_overlay(Explanation(source, evidence), tmp_path / "a.png", stored=True)
    found = colour(tmp_path / "a.png")
    assert found.shape == (602, 452)
    left, top, right, bottom = to_original(source).boxes([22 * 5, 7 * 4, 23 * 5, 8 * 4]).astype(int)
    assert (left, right) == (452 - 23 * 15, 452 - 22 * 15)
    assert (top, bottom) == ((600 - 8 * 12, 600 - 7 * 12) if up_down else (7 * 12, 8 * 12))
    i, j = np.unravel_index(found.argmax(), found.shape)
    assert top <= i < bottom and left <= j < right
    # Drawn bilinearly: from one cell's middle to the next one's.
    found[top - 6 : bottom + 6, left - 8 : right + 8] = 0
    assert not found.any()
    # Rows and columns that averaging leaves out are part of the picture, without evidence.
    grey = np.array(Image.open(tmp_path / "a.png"))[..., 2].astype(float)
    assert np.corrcoef(grey[300:].ravel(), image[300:].ravel())[0, 1] > 0.99


def test_evidence_lies_on_a_mammogram_as_it_is_stored(tmp_path, real_data):
    """A right MLO, shown to the network mirrored."""
    path = real_data / "dicom" / "mg_ge_jpeg_lossless.dcm"
    source = open_pixels(path)
    assert to_original(source).points([0, 0]).tolist() == [2394, 0]
    evidence = torch.zeros(96, 75)
    evidence[40, 10] = 1
    write_overlay(Explanation(source, evidence), tmp_path / "a.png", stored=True)
    found = colour(tmp_path / "a.png")
    rows, columns = np.nonzero(found > 0.7 * found.max())
    assert abs(rows.mean() - 40.5 * 3062 / 96) < 1 and abs(columns.mean() - (2394 - 10.5 * 2394 / 75)) < 1
    stored = open_pixels(path, flip=False).read(2000, 2512, 0, 2394)[0].numpy()
    picture = np.array(Image.open(tmp_path / "a.png"))[2000:2512, :, 2]
    assert np.corrcoef(picture.ravel(), stored.ravel())[0, 1] > 0.99


def test_evidence_of_a_cluster_lies_in_its_box_in_the_file(tmp_path):
    """A network that looks for what is brighter than its surroundings, on breasts of both sides."""
    table = write_phantoms(tmp_path / "p", patients=4, height=384, width=288, seed=3)
    records = [record for record in read_table(table).records if record.label]
    assert {record.laterality for record in records} == {"L", "R"}
    conv, linear = nn.Conv2d(1, 1, 7, padding=3, padding_mode="reflect"), nn.Linear(1, 2)
    with torch.no_grad():
        conv.weight.fill_(-1 / 48)[..., 3, 3] = 1
        conv.bias.fill_(-0.3)
        linear.weight.copy_(torch.tensor([[-300.0], [300.0]]))
        linear.bias.copy_(torch.tensor([7.0, -8.0]))
    net = accelerate(nn.Sequential(conv, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear))
    classifier = Classifier(net, ["0", "1"], lambda records: ImageDataset(records, channels=1))
    predict(lambda device: classifier, records, tmp_path / "out", PredictOptions("model", heatmaps=True))
    for record in records:
        found = colour(tmp_path / "out" / "heatmaps" / f"{record.path.stem}.png")
        top, bottom, left, right = record.findings[0].box
        # The colour bar of the caption takes five rows of a corner; the rest of the picture is as before.
        ends = np.r_[0:26, len(found) - 26 : len(found)]
        bar = [row for row in ends if found[row].any() and not top <= row < bottom]
        assert len(bar) <= 6 and np.ptp(bar) < 6
        found[bar] = 0
        inside = found[top:bottom, left:right].sum()
        assert found.max() > 100 and inside > 0.95 * found.sum(), (record.path.stem, inside / found.sum())


class _Joined(nn.Module):
    """A network for volumes whose last maps are images: the mean of the slices."""

    def __init__(self):
        super().__init__()
        self.slices, self.image, self.head = nn.Conv3d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, volume):
        return self.head(self.image(self.slices(volume).tanh().mean(2)).relu().mean((2, 3)))


def test_volumes_are_explained_by_a_slice():
    """The one with the most evidence; the middle one, with the whole map, of a network that joins the slices."""
    torch.manual_seed(0)
    pixels = torch.rand(6, 48, 40) * 0.1
    pixels[4] += 1
    volume = open_pixels(pixels, frame="all")
    apart = nn.Sequential(
        nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )
    apart = nn.Sequential(apart, nn.Linear(4, 2)).eval()
    with torch.no_grad():
        apart[1].weight[1] = apart[1].weight[0].abs() + 1
    found, _, _ = explain_class(accelerate(apart, tile=16), volume)
    assert found.source.number == 4 and found.values.shape == (48, 40)
    np.testing.assert_array_equal(found.source.read(0, 48, 0, 40)[0], pixels[4])
    joined = _Joined().eval()
    found, _, _ = explain_class(accelerate(joined, tile=16), volume)
    assert found.source.number == 3 and found.values.shape == (46, 38)
