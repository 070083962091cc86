"""Maps written tile by tile, and losses on them, against the whole map in ordinary PyTorch."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from exactness import LIMIT, errors, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import Accelerated, GigamorphError, UnsupportedError, accelerate, open_pixels
from gigamorph.engine.dense import dense_loss, write_map
from gigamorph.engine.planning.strategy import strategies

PLAN = sys.modules["gigamorph.engine.planning.search"]
CLASSES, HEIGHT, WIDTH = 3, 45, 38


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Without a bias, whose gradient would be zero but for rounding."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels, upsampled to the odd sizes of the levels above; BatchNorm live in training."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.first, self.second, self.third = block(2, 4), block(4, 6, 2), block(6, 6, 2)
        self.up, self.out, self.last = block(12, 5), block(9, 4), nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        c = F.interpolate(self.third(b), size=b.shape[2:], mode="bilinear")
        b = self.up(torch.cat([b, c], 1))
        return self.last(self.out(torch.cat([a, F.interpolate(b, size=a.shape[2:], mode="bilinear")], 1)))


def small() -> nn.Module:
    """A live norm and a stride, where the loss is what counts."""
    return nn.Sequential(block(2, 4, 2), nn.Upsample((HEIGHT, WIDTH)), nn.Conv2d(4, CLASSES, 3, padding=1)).double()


class Pyramid(nn.Module):
    """One head at two scales, a map at each, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = block(2, 4), block(4, 6, 2), block(6, 6, 2)
        self.side, self.top = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)
        self.head = nn.Sequential(block(5, 5), nn.Conv2d(5, CLASSES, 3, padding=1))
        self.classify = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        b = self.second(self.first(x))
        c = self.third(b)
        fine = self.side(b) + F.interpolate(self.top(c), size=b.shape[2:], mode="nearest")
        maps = [F.interpolate(self.head(t), size=x.shape[2:], mode="bilinear") for t in (fine, self.top(c))]
        return {"fine": maps[0], "coarse": maps[1], "whole": self.classify(c.mean((2, 3)))}


def labels(*shape: int, ignored: bool = True) -> Tensor:
    drawn = torch.randint(0, CLASSES, shape or (2, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(3))
    if ignored:
        drawn[..., 3:9, 5:20] = 255
    return drawn


def image(number: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


def dice(logits: Tensor, y: Tensor) -> Tensor:
    kept = y != 255
    p = logits.softmax(1) * kept[:, None]
    t = F.one_hot(torch.where(kept, y, 0), CLASSES).permute(0, 3, 1, 2) * kept[:, None]
    both, sums = (p * t).sum((0, 2, 3)), (p + t).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (sums + 1)).mean()


def focal(logits: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, y, ignore_index=255, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).sum() / (y != 255).sum()


def picked(logits: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(logits, 1).gather(1, y.clamp(max=CLASSES - 1)[:, None]).mean()


def soft(logits: Tensor, y: Tensor) -> Tensor:
    """Probabilities, smoothed over the neighbourhood."""
    codes = F.one_hot(y.clamp(max=CLASSES - 1), CLASSES).movedim(-1, 1).to(logits.dtype)
    return F.cross_entropy(logits, F.avg_pool2d(codes, 3, 1, 1))


WEIGHT = torch.tensor([1.0, 0.3, 2.5], dtype=torch.float64)
CRITERIA = {
    "cross entropy": nn.CrossEntropyLoss(ignore_index=255),
    "weighted": nn.CrossEntropyLoss(WEIGHT, ignore_index=255),
    "weighted sum": nn.CrossEntropyLoss(WEIGHT, ignore_index=255, reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(WEIGHT, ignore_index=255, label_smoothing=0.1),
    "probabilities": soft,
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, WEIGHT, ignore_index=255),
    "nll of a list of pixels": lambda z, y: F.nll_loss(
        F.log_softmax(z.permute(0, 2, 3, 1).reshape(-1, CLASSES), 1), y.reshape(-1), ignore_index=255
    ),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y == 1).to(z.dtype), pos_weight=WEIGHT[2]),
    "binary, by position": lambda z, y: F.binary_cross_entropy(z.sigmoid(), (y == 1)[:, None].expand_as(z).to(z.dtype)),
    "squares": lambda z, y: F.mse_loss(z, y[:, None].expand_as(z).to(z.dtype)),
    "squares and distances by weights": lambda z, y: (
        F.mse_loss(z[:, 0], (y == 1).to(z.dtype), weight=1.0 + (y == 2))
        + F.l1_loss(z[:, 1], (y == 1).to(z.dtype), weight=z[:, 2].sigmoid())
        + F.mse_loss(z[:, 2], (y == 0).to(z.dtype), weight=torch.ones_like(z[:, 2]), reduction="sum")
    ),
    "smooth absolute": lambda z, y: F.smooth_l1_loss(z[:, 1], y.to(z.dtype), reduction="sum", beta=0.7),
    "absolute and divergence": lambda z, y: (
        F.l1_loss(z[:, 1], y.to(z.dtype))
        + F.kl_div(z.log_softmax(1), torch.ones_like(z) / CLASSES, reduction="batchmean")
    ),
    "counts": lambda z, y: (
        F.poisson_nll_loss(z[:, 1], y.to(z.dtype), full=True)
        + F.poisson_nll_loss(z[:, 2].exp(), y.to(z.dtype), log_input=False, eps=1e-3, reduction="sum")
    ),
    "dice": dice,
    "focal": focal,
    "picked": picked,
}


def train(net: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in net.named_parameters()}, **dict(net.named_buffers())}


def assert_same(model: nn.Module, x: Tensor, y, criterion, given=None, **options) -> None:
    """Loss, gradients of parameters and image, and running statistics."""
    stock, fast = copy.deepcopy(model), accelerate(copy.deepcopy(model), **options)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected = train(stock, criterion(stock(leaves[0]), y))
    got = train(fast, dense_loss(fast, leaves[1], y if given is None else given, criterion))
    found = errors(expected, got) | errors({"image": leaves[0].grad}, {"image": leaves[1].grad})
    assert not {name: error for name, error in found.items() if not error <= LIMIT}


@pytest.mark.parametrize("name", CRITERIA)
def test_losses(name):
    y = labels(ignored=name != "binary")
    assert_same(randomize(small()), image(), y, CRITERIA[name], tile=(13, 17))


@pytest.mark.parametrize("training", [False, True])
def test_a_loss_of_a_network_with_skips(training):
    assert_same(randomize(UNet().double()).train(training), image(), labels(), CRITERIA["weighted"], tile=(13, 17))


@pytest.mark.parametrize("training", [False, True])
def test_several_maps_at_once(training):
    def criterion(out: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        maps = [F.cross_entropy(out[name], y["mask"], ignore_index=255) for name in ("fine", "coarse")]
        return maps[0] + 0.4 * maps[1] + out["whole"].square().mean() + (out["fine"] * y["weight"]).mean()

    y = {"mask": labels(), "weight": image()[:, :1].abs()}
    assert_same(randomize(Pyramid().double()).train(training), image(), y, criterion, tile=(19, 16))


def test_labels_that_want_a_gradient():
    """The maps of another network, trained as well."""
    model, x = small(), image()
    grads = []
    for fast in (False, True):
        y = torch.ones(2, CLASSES, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
        loss = dense_loss(accelerate(model, tile=16), x, y, F.mse_loss) if fast else F.mse_loss(model(x), y)
        grads.append({"labels": torch.autograd.grad(loss, y)[0]})
    assert errors(*grads)["labels"] <= LIMIT


class Regions:
    """Labels that exist in no array; remembers the largest region that was read."""

    shape = (2, HEIGHT, WIDTH)

    def __init__(self):
        self.largest = 0

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        self.largest = max(self.largest, (bottom - top) * (right - left))
        return labels().numpy().astype("uint8")[:, top:bottom, left:right]


@pytest.mark.parametrize("kind", ["array", "memory map", "zarr", "regions"])
def test_labels_by_region(kind, tmp_path):
    y = labels()
    given = y.numpy().astype("uint8")
    if kind == "memory map":
        np.save(tmp_path / "y.npy", given)
        given = np.load(tmp_path / "y.npy", mmap_mode="r")
    if kind == "zarr":
        given = zarr.create_array(str(tmp_path / "y.zarr"), data=given, chunks=(1, 16, 16))
    if kind == "regions":
        given = Regions()
    assert_same(small(), image(), y, CRITERIA["weighted"], given, tile=16)
    if kind == "regions":
        assert given.largest <= 17 * 17


def test_masks_as_pixel_sources():
    mask = (labels(HEIGHT, WIDTH, ignored=False) == 1).numpy().astype("float32")
    net = UNet(1)
    criterion = F.binary_cross_entropy_with_logits
    x = image(1).float()
    got = dense_loss(accelerate(net, tile=16), x, open_pixels(mask, flip=False), criterion)
    torch.testing.assert_close(got, criterion(net(x), torch.from_numpy(mask)[None, None]), rtol=1e-5, atol=1e-6)


def test_criteria_that_change_are_noticed_and_others_are_recorded_once():
    net, x, y = accelerate(small().eval(), tile=16), image(), labels()
    wanted = F.cross_entropy(net(x), y, ignore_index=255)
    kept = len(net._runner.programs.kept)
    for factor in (1.0, 1.0, 3.0):
        got = dense_loss(net, x, y, lambda z, t: F.cross_entropy(z, t, ignore_index=255) * factor)  # noqa: B023
        torch.testing.assert_close(got, wanted * factor)
    assert len(net._runner.programs.kept) == kept + 2


@pytest.mark.parametrize("anew", [False, True])
def test_a_criterion_that_changes_its_own_state_does_so_once_per_step(anew):
    """Counters, attributes and buffers, whether it is one object or made for each step."""

    class Ramped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.kept = 0, []
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.steps += 1
            loss = F.cross_entropy(logits, labels)
            self.mean, self.latest = 0.9 * self.mean + 0.1 * loss.detach(), loss
            self.kept.append(loss.detach())
            return loss * self.steps

    torch.manual_seed(0)
    stock = small()
    labels, found = torch.randint(CLASSES, (2, HEIGHT, WIDTH)), []
    for net in (stock, accelerate(copy.deepcopy(stock), tile=16)):
        criterion, seen = Ramped(), []
        for seed in range(3):
            criterion = Ramped() if anew else criterion
            torch.manual_seed(seed)
            x = torch.randn(2, 2, HEIGHT, WIDTH, dtype=torch.float64)
            loss = criterion(net(x), labels) if net is stock else dense_loss(net, x, labels, criterion)
            loss.backward()
            assert criterion.steps == (1 if anew else seed + 1)
            seen += [loss.detach(), criterion.mean, criterion.latest.detach(), *criterion.kept]
        found.append([*seen, *(p.grad for p in net.parameters())])
    assert len(found[0]) == len(found[1])
    for got, wanted in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-11)


def test_a_part_of_the_steps_recomputed(monkeypatch):
    """Where little is stored, maps between the norms are computed again, with the labels at hand."""
    monkeypatch.setattr(PLAN, "strategies", lambda *a: list(strategies(*a))[-1:])
    model = randomize(UNet().double())
    assert_same(model, image(), labels(), CRITERIA["dice"], labels().numpy(), tile=16)


@pytest.mark.parametrize(
    ("given", "criterion", "pattern"),
    [
        (labels(), lambda z, y: z.movedim(1, -1)[y != 255].sum(), "data-dependent"),
        (labels(), lambda z, y: z.flatten(2).sort().values.mean(), "sort"),
        ("mask.png", F.cross_entropy, "not str"),
        (labels(2, CLASSES, 7, 5), lambda z, y: (z * y).sum(), r"\[2, 3, 7, 5\].*\[2, 3, 45, 38\] \(test_dense.py:"),
        (np.zeros(7), F.cross_entropy, "two non-empty image axes"),
        (np.zeros((2, 9, 9), int), F.cross_entropy, r"different sizes, \(45, 38\) and \(9, 9\)"),
    ],
)
def test_refused(given, criterion, pattern):
    with pytest.raises(GigamorphError, match=pattern):
        dense_loss(accelerate(small(), tile=16), image(), given, criterion)


# -- maps ---------------------------------------------------------------------------------------------------------


@functools.cache
def unet_in_tiles(training: bool) -> tuple[nn.Module, Accelerated]:
    net = randomize(UNet().double()).train(training)
    return net, accelerate(copy.deepcopy(net), tile=(31, 27))


@pytest.mark.parametrize("kind", ["tensor", "array", "npy", "zarr", "zarr array", "tif"])
def test_maps_are_written(kind, tmp_path):
    number = 1 if kind == "tif" else 2
    net, fast = unet_in_tiles(kind == "array")
    x = torch.randn(number, 2, 137, 113, dtype=torch.float64)
    expected = net(x).detach()
    path = tmp_path / f"map.{kind}"
    out = {
        "tensor": torch.zeros(expected.shape, dtype=torch.float64),
        "array": np.zeros(expected.shape),
        "zarr array": zarr.create_array(
            str(tmp_path / "z"), shape=tuple(expected.shape), dtype="float64", chunks=(1, 2, 40, 30)
        ),
    }.get(kind, path)
    write_map(fast, x, out)
    if kind == "tif":
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].is_tiled
            got = file.asarray().transpose(2, 0, 1)[None]
    else:
        got = {"npy": lambda: np.load(path), "zarr": lambda: zarr.open(str(path))[:]}.get(kind, lambda: out[:])()
    assert errors({"map": expected}, {"map": torch.as_tensor(np.asarray(got))})["map"] <= LIMIT


def test_maps_of_many_tiles_of_a_file(tmp_path):
    """Wider and higher than a tile of the file, and the class of each pixel in place of the logits."""

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 5, padding=2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.net(x)
            return z.mean((2, 3)), z.argmax(1).to(torch.uint8)

    net, x = Classes(), torch.randn(1, 1, 1100, 1300)
    write_map(accelerate(net, tile=(300, 700)), x, tmp_path / "classes.tif", output=1)
    assert np.array_equal(tifffile.imread(tmp_path / "classes.tif"), net(x)[1][0].numpy())


def test_maps_that_cannot_be_written(tmp_path):
    net = accelerate(Pyramid(), tile=16)
    x = image().float()
    closed = np.broadcast_to(np.float32(0), (2, 3, 45, 38))
    for out, output, pattern in (
        (closed, 0, "is read-only"),
        (torch.zeros(3), 0, r"shape \(2, 3, 45, 38\)"),
        (torch.zeros(3), 2, "is not a map"),
        (torch.zeros(3), 3, "does not exist"),
        (tmp_path / "map.jpg", 0, "format"),
        (tmp_path / "map.tif", 0, "one image"),
        (tmp_path / "none" / "map.tif", 0, "cannot be written"),
        (tmp_path / "none" / "map.npy", 0, "cannot be written"),
    ):
        with pytest.raises(GigamorphError, match=pattern):
            write_map(net, x if "none" not in str(out) else x[:1], out, output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["tif", "npy", "zarr"])
def test_a_map_that_fails_leaves_no_file_or_the_earlier_one(tmp_path, suffix):
    net, x = accelerate(nn.Conv2d(1, 1, 3, padding=1), tile=16), torch.rand(1, 1, 64, 64)
    failing = accelerate(nn.Conv2d(1, 1, 3, padding=1), tile=16)
    failing.on_tile = lambda event: 1 // (event.total // 2 - event.done)
    for _ in range(2):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ZeroDivisionError):
            write_map(failing, x, tmp_path / f"map.{suffix}")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        write_map(net, x, tmp_path / f"map.{suffix}")
    assert before


def test_flattened_maps_are_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(2)).double()
    with pytest.raises(UnsupportedError, match="flattened into one"):
        write_map(accelerate(net, tile=16), image(), tmp_path / "map.npy")


def test_bounded_memory(tmp_path):
    """A map of several times the memory that the process takes to write it, or to compute a loss on it."""
    script = Path(__file__).parent / "dense_memory.py"
    files = [str(tmp_path / f"map.{suffix}") for suffix in ("tif", "npy")]
    command = [sys.executable, str(script), *files]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    map_bytes, tif, npy, learned = map(int, printed[-4:])
    assert max(tif, npy, learned) < map_bytes / 4


def test_a_criterion_gets_the_object_that_the_network_also_keeps():
    """It would get what stands for the object in the recording."""

    class Keeping(UNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.kept = {"map": super().forward(x)}
            return self.kept

    torch.manual_seed(0)
    net = Keeping().double()
    stock, labels = copy.deepcopy(net), torch.randint(CLASSES, (1, HEIGHT, WIDTH))
    x = torch.rand(1, 2, HEIGHT, WIDTH, dtype=torch.float64)

    def criterion(found: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(found["map"], y)

    ours = dense_loss(accelerate(net, tile=16), x, labels, criterion)
    torch.testing.assert_close(ours, criterion(stock(x), labels))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_volumes(reduction: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, (1, 3, 3), padding=(0, 1, 1)))
    network, fast = network.double(), accelerate(copy.deepcopy(network.double()), tile=16)
    volume, labels = torch.randn(2, 1, 5, 37, 45, dtype=torch.float64), torch.randint(0, 3, (2, 5, 37, 45))
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    expected, found = criterion(network(volume), labels), dense_loss(fast, volume, labels, criterion)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found.backward()
    expected.backward()
    for one, two in zip(fast.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-13 * float(expected.detach()))
