"""Any module on the tiles of an image: exact in both passes, by itself and inside of an accelerated network."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from exactness import LIMIT, Step, errors, named, step, step_errors
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import GigamorphError, UnsupportedError, accelerate, open_pixels, tilewise
from gigamorph.engine.errors import ChangedError

SIZE, WIDTH = 16, 12


class Encoder(nn.Module):
    """A small vision transformer: patches, a class token, attention, a vector per tile. It tells how often it ran."""

    def __init__(self, channels: int = 2, dropout: float = 0.0):
        super().__init__()
        self.patches = nn.Conv2d(channels, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, WIDTH))
        self.tiles = 0
        self.hidden: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tiles += len(x)
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp(self.norms[1](x))
        self.hidden.append(weakref.ref(y))
        return self.norms[2](x + y)[:, 0]


class Gated(nn.Module):
    """Gated attention over instances (Ilse et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u, self.w = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(6, 1)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, grid: Tensor) -> Tensor:
        x = grid.flatten(2).transpose(1, 2)
        weights = self.w(self.v(x).tanh() * self.u(x).sigmoid()).softmax(1)
        return self.last((weights * x).sum(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, grid: Tensor) -> Tensor:
        return self.layer(grid.flatten(2).transpose(1, 2)).mean(1)


class Mean(nn.Module):
    def forward(self, grid: Tensor) -> Tensor:
        return grid.mean((2, 3))


class Convolved(nn.Module):
    """The grid as a map like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        return self.conv(grid).relu().amax((2, 3))


class Ordinary(nn.Module):
    """What `tilewise` does, in ordinary code: all tiles at once, with one graph of all."""

    def __init__(self, module: nn.Module, stride: int, batch: int | None = None):
        super().__init__()
        self.module, self.stride, self.batch = module, stride, batch

    def forward(self, x: Tensor) -> Tensor:
        tiles = x.unfold(2, SIZE, self.stride).unfold(3, SIZE, self.stride)
        n, c, h, w = tiles.shape[:4]
        tiles = tiles.permute(2, 3, 0, 1, 4, 5).reshape(-1, c, SIZE, SIZE)  # by place, then by image
        made = torch.cat([self.module(part) for part in tiles.split(self.batch or len(tiles))])
        return made.reshape(h, w, n, -1).permute(2, 3, 0, 1)


def both(head: nn.Module, stride: int = SIZE, seed: int = 0, **options) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(seed)
    encoder = Encoder(dropout=options.pop("dropout", 0.0))
    ours = nn.Sequential(tilewise(encoder, SIZE, stride, **options), head).double()
    plain = nn.Sequential(Ordinary(encoder, stride, options.get("batch_size")), head)
    return ours, copy.deepcopy(plain)


def image(n: int = 2, height: int = 53, width: int = 70) -> Tensor:
    return torch.randn(n, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def worst(expected: Step, got: Step) -> float:
    return max(step_errors(expected, got).values())


HEADS: dict[str, Callable[[], nn.Module]] = {
    "gated attention": Gated,
    "mean": Mean,
    "transformer": Transformer,
    "convolved": Convolved,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("stride", "batch_size"), [(16, 5), (11, 7), (16, 100)], ids=["", "overlap", "one batch"])
def test_equal_to_ordinary_code(head, stride, batch_size):
    ours, plain = both(HEADS[head](), stride, batch_size=batch_size)
    assert worst(step(plain, image()), step(ours, image())) <= LIMIT


@pytest.mark.parametrize("head", ["gated attention", "convolved"])
@pytest.mark.parametrize(("tile", "stride"), [(24, 16), (9, 11), (None, 16)], ids=["tiles", "overlap", "planned"])
def test_inside_of_an_accelerated_network(head, tile, stride):
    ours, plain = both(HEADS[head](), stride, batch_size=3)
    assert worst(step(plain, image()), step(accelerate(ours, tile=tile), image())) <= LIMIT


def test_the_graph_of_one_batch():
    """After the forward no tile's activations are there; ordinary code has those of all tiles."""
    ours, _ = both(Gated(), batch_size=4)
    result = ours(image())
    gc.collect()
    assert not any(reference() is not None for reference in ours[0].module.hidden)
    result.sum().backward()
    assert ours[0].module.patches.weight.grad.abs().sum() > 0


def test_frozen_encoder():
    ours, plain = both(Gated(), batch_size=4)
    for network in (ours, plain):
        network[0].requires_grad_(False)
    assert worst(step(plain, image()), step(ours, image())) <= LIMIT
    before = ours[0].module.tiles
    ours(image()).sum().backward()
    assert ours[0].module.tiles == before + 2 * 12  # nothing of it is computed again


def test_pixel_sources():
    pixels = (np.random.default_rng(0).random((60, 75)) * 65535).astype(np.uint16)
    torch.manual_seed(0)
    encoder = Encoder(channels=1)
    ours = nn.Sequential(tilewise(encoder, SIZE, 11, batch_size=5), Gated()).double()
    source = open_pixels(pixels)
    whole = source.read(0, 60, 0, 75)[None].double()
    expected = step(nn.Sequential(Ordinary(copy.deepcopy(encoder), 11), copy.deepcopy(ours[1])), whole)
    got = step(ours, [source])
    assert max(errors(named(expected.gradients.values()), named(got.gradients.values())).values()) <= LIMIT
    inside = step(accelerate(ours, tile=30), [source])
    assert (inside.outputs[0] - expected.outputs[0]).abs().max() <= LIMIT


@pytest.mark.parametrize("tile", [None, 24], ids=["by itself", "inside"])
def test_images_of_bytes(tile):
    """For a module that takes them: its tiles are what the image is."""

    class OfBytes(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.uint8
            return super().forward(x.double() / 255)

    torch.manual_seed(0)
    ours = nn.Sequential(tilewise(OfBytes(), SIZE, batch_size=5), Gated()).double()
    plain = copy.deepcopy(nn.Sequential(Ordinary(ours[0].module, SIZE), ours[1]))
    pixels = torch.randint(0, 256, (2, 2, 53, 70), dtype=torch.uint8)
    net = ours if tile is None else accelerate(ours, tile=tile)
    expected, got = (step(each, pixels, image_gradient=False) for each in (plain, net))
    assert worst(expected, got) <= LIMIT


def test_random_numbers_are_those_of_ordinary_batches():
    ours, plain = both(Gated(), batch_size=5, dropout=0.4)
    ours.train(), plain.train()
    runs = []
    for network in (plain, ours):
        with torch.no_grad():
            network(image())  # what looks at the module first has drawn nothing
        torch.manual_seed(7)
        runs.append(step(network, image()))
    assert worst(*runs) <= LIMIT


def test_both_passes_of_a_scan_see_the_same_numbers():
    """The output is linear in the weights: it is their product with the gradient, for the same numbers."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(2 * SIZE**2, 4, bias=False))
    net = accelerate(nn.Sequential(tilewise(encoder, SIZE, batch_size=2), Mean()).double().train(), tile=24)
    loss = net(image()).sum()
    loss.backward()
    weight = encoder[2].weight
    assert weight.grad is not None
    assert (weight * weight.grad).sum().item() == pytest.approx(loss.item(), rel=1e-12)


# -- changes of the module and the image ------------------------------------------------------------------------------


def halved(encoder: nn.Module) -> None:
    encoder.mlp.register_forward_hook(lambda module, inputs, output: output / 2)


def of_another_width(encoder: nn.Module) -> None:
    encoder.norms[2] = nn.Linear(WIDTH, 7).double()


CHANGES_BETWEEN_STEPS: dict[str, Callable[[nn.Module], object]] = {
    "frozen": lambda encoder: encoder.qkv.requires_grad_(False),
    "another parameter": lambda encoder: setattr(encoder.out, "weight", nn.Parameter(encoder.out.weight * 2)),
    "an attribute": lambda encoder: setattr(encoder.norms[0], "eps", 0.3),
    "a hook": halved,
    "another width": of_another_width,
}


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize("change", CHANGES_BETWEEN_STEPS)
def test_changes_between_steps_are_honoured(change, fast):
    ours, plain = both(Mean(), batch_size=3)
    network = accelerate(ours, tile=24) if fast else ours
    step(network, image())
    for each in (ours, plain):
        torch.manual_seed(1)
        CHANGES_BETWEEN_STEPS[change](each[0].module)
    assert worst(step(plain, image()), step(network, image())) <= LIMIT


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
def test_the_backward_computes_what_the_forward_did(fast):
    """Modes and numbers of PyTorch's modules that have changed meanwhile: with the weights times their gradient."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(2 * SIZE**2, 4, bias=False))
    ours = nn.Sequential(tilewise(encoder, SIZE, batch_size=2), Mean()).double().train()
    loss = (accelerate(ours, tile=24) if fast else ours)(image()).sum()
    encoder.eval()
    encoder[1].p = 0.9
    loss.backward()
    assert encoder[2].weight.grad is not None
    assert (encoder[2].weight * encoder[2].weight.grad).sum().item() == pytest.approx(loss.item(), rel=1e-12)
    assert not encoder[1].training
    assert encoder[1].p == 0.9


def test_parameters_of_a_functional_call():
    ours, plain = both(Mean(), batch_size=3)
    others = {name: (p.detach() * 1.1).requires_grad_() for name, p in ours.named_parameters()}
    result = torch.func.functional_call(ours, others, (image(),)).square().sum()
    got = torch.autograd.grad(result, list(others.values()))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    wanted = torch.autograd.grad(plain(image()).square().sum(), list(plain.parameters()))
    assert max(errors(named(wanted), named(got)).values()) <= LIMIT


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize("what", ["weights", "image", "hooks"])
def test_changes_before_the_backward_are_told(what, fast):
    ours, _ = both(Mean(), batch_size=3)
    x = image()
    result = (accelerate(ours, tile=24) if fast else ours)(x).sum()
    with torch.no_grad():
        if what == "hooks":
            halved(ours[0].module)
        else:
            (x if what == "image" else ours[0].module.qkv.weight).mul_(2)
    with pytest.raises(ChangedError, match="after the forward"):
        result.backward()


# -- tiles that are skipped -------------------------------------------------------------------------------------------


def with_background() -> Tensor:
    x = image(2, 64, 64).abs() + 0.1
    x[0, :, :32], x[1, :, :, 16:40] = 0, 0
    return x


def expected_grid(ours: nn.Module, x: Tensor, keep: Tensor, skipped: Tensor) -> Tensor:
    grid = Ordinary(ours[0].module, SIZE)(x)
    return torch.where(keep[:, None], grid, skipped[None, :, None, None])


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize("background", [0.0, lambda tiles: tiles.mean((1, 2, 3)) < 1e-6], ids=["number", "function"])
def test_background_is_skipped(background, fast):
    skipped = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
    ours, _ = both(Gated(), batch_size=3, background=background, skipped=skipped)
    keep = with_background().unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE).amax((1, 4, 5)) > 0
    assert 0 < keep.sum() < keep.numel()
    x = with_background()
    loss = ours[1](expected_grid(ours, x, keep, skipped)).square().sum()
    wanted = torch.autograd.grad(loss, list(ours.parameters()))
    network = accelerate(ours, tile=24) if fast else ours
    with torch.no_grad():
        network(x)
        ours[0].module.tiles = 0
        network(x)
    assert ours[0].module.tiles == keep.sum()
    network(x).square().sum().backward()
    assert max(errors(named(wanted), named(p.grad for p in ours.parameters())).values()) <= LIMIT


class Masked(nn.Module):
    def __init__(self, body: nn.Module, keep: Tensor):
        super().__init__()
        self.body = body
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[1](self.body[0](x, self.keep))


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
def test_mask(fast):
    keep = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    ours, _ = both(Gated(), batch_size=3, skipped=0.5)
    x = image(2, 64, 64)
    wanted = ours[1](expected_grid(ours, x, keep, torch.full((WIDTH,), 0.5, dtype=torch.float64)))
    network = accelerate(Masked(ours, keep), tile=24) if fast else Masked(ours, keep)
    assert (network(x) - wanted).abs().max() <= LIMIT


def test_everything_skipped():
    ours, _ = both(Mean(), background=0.0, skipped=2.0)
    assert torch.equal(ours(torch.zeros(1, 2, 32, 32).double()), torch.full((1, WIDTH), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("tile", [None, 16, 64], ids=["alone", "accelerated", "one tile"])
def test_gradients_where_everything_is_skipped_are_zeros(tile):
    skipped = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
    ours, _ = both(Mean(), background=0.0, skipped=skipped)
    x = torch.zeros(1, 2, 32, 48, dtype=torch.float64, requires_grad=True)
    loss = ours[1](expected_grid(ours, x, torch.zeros(1, 2, 3) > 0, skipped)).square().sum()
    given = [x, *ours.parameters()]
    wanted = torch.autograd.grad(loss, given)
    (accelerate(ours, tile=tile) if tile else ours)(x).square().sum().backward()
    for expected, tensor in zip(wanted, given, strict=True):
        assert tensor.grad is not None and (tensor.grad - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
def test_an_encoder_without_a_graph_has_no_gradients(fast):
    """Zeros would let an optimizer's weight decay change it."""
    ours, _ = both(Mean(), background=0.0)
    encoder = ours[0].module
    encoder.forward = torch.no_grad()(encoder.forward)
    network = nn.Sequential(ours, nn.Linear(WIDTH, 1).double())
    (accelerate(network, tile=24) if fast else network)(with_background()).sum().backward()
    assert all(p.grad is None for p in encoder.parameters()) and network[1].weight.grad is not None


# -- what is refused --------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.mean((2, 3))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3))
        return (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt()


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).long()


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 4, 4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "'1' .*training mode",
        ),
        (Counting(), "buffer 'count'"),
        (Centred(), "depends on the other tiles"),
        (nn.Conv2d(2, 4, 3), r"not vectors \(2, D\)"),
        (Whole(), "returns torch.int64; it must return floating-point"),
    ],
    ids=["BatchNorm", "a counter", "a norm of its own", "a map", "integers"],
)
def test_no_function_of_one_tile_is_refused(module, reason, fast):
    net = nn.Sequential(tilewise(module, SIZE), Mean()).double().train()
    with pytest.raises(UnsupportedError, match=f"(?s)tilewise: .*{reason}"):
        (accelerate(net) if fast else net)(image())


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
@pytest.mark.parametrize(
    ("size", "given", "reason"),
    [
        (SIZE, image().float()[:, :1], r" \(2, 1, 16, 16\) .*first convolution takes 2 channels"),
        (SIZE, image(), r".*its parameters are torch.float32: convert the image, image.to\(torch.float32\)"),
        (20, image().float(), ".*RuntimeError: .*; pass tiles that it accepts: another size"),
    ],
    ids=["channels", "dtype", "size"],
)
def test_tiles_that_the_module_does_not_take(size, given, reason, fast):
    net = nn.Sequential(tilewise(Encoder(), size), Mean())
    with pytest.raises(GigamorphError, match=f"^tilewise: the module fails on 2 tiles{reason}"):
        (accelerate(net) if fast else net)(given)


@pytest.mark.parametrize("fast", [False, True], ids=["alone", "accelerated"])
def test_masks_that_are_not_numbers(fast):
    net = Masked(both(Mean(), batch_size=3)[0], torch.tensor([[1, 0, 1, float("nan")]] * 3))
    with pytest.raises(GigamorphError, match="mask of tilewise has NaN"):
        (accelerate(net) if fast else net)(image())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tilewise(Encoder(), 0), "size must be a positive number of pixels, or .height, width., not 0"),
        (lambda: tilewise(Encoder(), SIZE, (4, -1)), "stride must be "),
        (lambda: tilewise(Encoder(), SIZE, batch_size=0), "batch_size must be a positive whole number of tiles, not 0"),
        (lambda: tilewise(Encoder(), SIZE, background="black"), "background must be .*, not 'black'"),
        (lambda: tilewise(Encoder(), SIZE, background=float("nan")), "background must be .*, not nan"),
        (lambda: tilewise(torch.relu, SIZE), "needs a torch.nn.Module, not "),
        (lambda: tilewise(Encoder(), 99)(image().float()), "53 x 70 pixels is smaller than one tile of 99 x 99"),
        (lambda: tilewise(Encoder(), SIZE)(image().float(), torch.ones(3, 3)), r"grid of tiles has shape \(2, 3, 4\)"),
        (lambda: tilewise(Encoder(), SIZE)(image().float(), [[1] * 4] * 3), "the mask must be a tensor, not list"),
        (
            lambda: tilewise(Encoder(), SIZE, background=9.0, skipped=torch.ones(3))(image().float()),
            "skipped has 3 values, but an embedding of this module has 12",
        ),
    ],
)
def test_arguments(call, message):
    with pytest.raises(GigamorphError, match=message):
        call()
