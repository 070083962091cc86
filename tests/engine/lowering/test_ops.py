"""Rules one by one, with the forms that random networks may miss in a short run."""

import pytest
import torch
from around import Around, image
from exactness import assert_each_exact, assert_exact, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import UnsupportedError, accelerate


def blur_pool(x: Tensor) -> Tensor:
    """Anti-aliased downsampling (Zhang, 2019)."""
    observers = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = (observers[:, None] * observers / 64).expand(4, 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 2, 1, 2), mode="reflect"), kernel, stride=2, groups=4)


def space_to_depth(x: Tensor) -> Tensor:
    """TResNet's stem, by a reshape."""
    n, c, h, w = x.shape
    x = x[..., : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, c * 4, h // 2, w // 2)[:, 3:15:3]


def top_instances(x: Tensor) -> Tensor:
    """The features of the seven most suspicious positions, weighted: a multiple-instance head."""
    values, places = x[:, :1].flatten(2).topk(7, 2)
    found = x.flatten(2).gather(2, places.expand(-1, x.shape[1], -1))
    return x * (values.softmax(2) * found).sum(2)[..., None, None]


def unpooled(x: Tensor, kernel: int = 2, ceil_mode: bool = False, **how: int) -> Tensor:
    """As SegNet and ENet do: maxima, and what is made of them, go back to where they were found."""
    y, places = F.max_pool2d(x, kernel, ceil_mode=ceil_mode, return_indices=True, **how)
    return x + F.max_unpool2d(y.tanh(), places, kernel, output_size=x.shape, **how)


def places_of_maxima(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    return y * (places % 7)


def places_where_nothing_is(x: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """Windows of -inf alone, also at the border, have their first place."""
    x = torch.where(x < 0.9, -torch.inf, x)
    y, places = F.max_pool2d(x, kernel, stride, 1, dilation, return_indices=True)
    return y.clamp(min=-1) * (places % 7)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.ConvTranspose2d(4, 4, 4, 2, 1),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
        nn.ConvTranspose2d(4, 4, 3, 1, 1, groups=4, bias=False),
        nn.ConvTranspose2d(4, 4, (1, 5), (3, 2), (0, 2), output_padding=(2, 0), dilation=(1, 2)),
        nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2)),
        nn.Sequential(nn.PixelUnshuffle(1), nn.ReflectionPad2d((1, 2, 3, 0))),
        nn.ReplicationPad2d((4, 0, 1, 2)),
        nn.Conv2d(4, 4, 5, 2, 2, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, (5, 3), (2, 1), (2, 3), dilation=(1, 2), padding_mode="circular"),
        nn.CircularPad2d((14, 0, 2, 19)),
        nn.CircularPad2d((3, 1, 0, 0)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.Upsample(size=(31, 9), mode="bilinear"),
        nn.UpsamplingBilinear2d(scale_factor=3),
        nn.UpsamplingNearest2d(size=(23, 40)),
    ],
    ids=str,
)
def test_layers(layer):
    assert_each_exact(Around(layer).double(), [(image(), tile) for tile in ((3, 4), (7, 5), 64)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate(x, scale_factor=0.7, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
        lambda x: F.interpolate(x[:, :, :1], size=(9, 11), mode="bilinear", align_corners=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 1), divisor_override=5),
        lambda x: F.max_pool2d(x, 3, 1, 1, dilation=1, ceil_mode=True),
        lambda x: F.local_response_norm(x, 3),
        blur_pool,
        space_to_depth,
        top_instances,
        unpooled,
        lambda x: unpooled(x, 3, True),
        places_of_maxima,
        lambda x: places_where_nothing_is(x, 3, 2, 1),
        lambda x: places_where_nothing_is(x, 2, 1, 2),
        lambda x: F.pad(x, (0, 3, 2, 1)),
        lambda x: F.pad(x, (5, -1, -2, 4), value=0.7),
        lambda x: x.topk(2, 1).values.repeat(1, 2, 1, 1) + x.movedim((1, 2), (3, 1)).movedim(-1, 1),
        lambda x: F.glu(torch.cat([x, x * 2], 1), dim=1),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: F.normalize(x, dim=1),
        lambda x: x.flip(1).roll(1, 1),
        lambda x: x.reshape(x.shape[0], 2, 2, *x.shape[2:]).sum(1).repeat(1, 2, 1, 1),
        lambda x: x.unflatten(1, (2, 2)).flatten(1, 2),
        lambda x: torch.stack(x.unbind(1), 1) * x.argmax(1, keepdim=True).to(x.dtype),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x.index_select(1, torch.tensor([2, 0, 1, 1])),
    ],
)
def test_functions(function):
    assert_exact(Around(function).double(), image(), tile=(5, 4))


OTHER_PLACES = [
    lambda x: unpooled(x, 3, stride=2, padding=1),
    lambda x: F.max_unpool2d(x[:, :, ::2, ::2], torch.arange(70).view(1, 1, 10, 7).expand(2, 4, 10, 7), 2),
    lambda x: F.max_unpool2d(x[:, :, ::2, ::2], F.max_pool2d(x, 2, return_indices=True)[1].flip(1), 2),
]


@pytest.mark.parametrize("function", OTHER_PLACES)
def test_unpooling_by_other_places_is_refused(function):
    with pytest.raises(UnsupportedError, match="needs the indices of a max-pooling"):
        accelerate(Around(function).double(), tile=8)(image(2, 2, 20, 14))


def test_unpooling_of_whole_maps():
    """Bands of rows, whose images do not lie one after the other in memory."""
    assert_exact(Around(OTHER_PLACES[0]).double(), image(2, 2, 14, 17), tile=(3, 20), fallback="untiled")


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_in_low_precision(align_corners):
    """The blend runs in float32, as PyTorch's own does: no further from float64 than stock is."""
    net = Around(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners))
    truth = step(net.double(), image()).outputs[0]
    for dtype in (torch.float32, torch.bfloat16):
        net = net.to(dtype)
        stock = (step(net, image().to(dtype)).outputs[0] - truth).norm()
        tiled = (step(accelerate(net, tile=8), image().to(dtype)).outputs[0] - truth).norm()
        rounding = torch.finfo(dtype).eps * truth.norm()
        assert tiled <= max(1.5 * stock, rounding)
        net = net.double()


class Strides(TorchDispatchMode):
    """Those of the convolutions whose gradients are computed."""

    sees_tiles = True

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(tuple(args[4]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [0, 1])
def test_pixels_of_few_channels_are_picked_before_they_are_convolved(padding):
    """oneDNN would write the gradient of such weights beyond its workspace (uxlfoundation/oneDNN#6035)."""
    layer = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, (2, 3), padding))
    net = Around(layer).double()
    truth = step(net, image())
    with Strides() as strides:
        got = step(accelerate(net.float(), tile=8), image().float())
    assert set(strides.seen) == {(1, 1)}
    torch.testing.assert_close(got.gradients, {name: g.float() for name, g in truth.gradients.items() if g is not None})


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        lambda x, keepdim: x.mean((2, 3), keepdim),
        lambda x, keepdim: x.sum((2, 3), keepdim),
        lambda x, keepdim: x.flatten(2).max(2, keepdim).values,
        lambda x, keepdim: F.adaptive_max_pool2d(x, 1),
        lambda x, keepdim: F.adaptive_avg_pool2d(x, 1).flatten(1 if keepdim else 0),
    ],
    ids=["mean", "sum", "max", "pooled maximum", "pooled mean"],
)
def test_what_is_pooled_may_be_changed_in_place(pool, keepdim):
    """Classifiers begin with a dropout in place; the tensor is the caller's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return pool(self.conv(x), keepdim).mul_(3).square()

    assert_exact(Net().double(), image(), tile=(5, 4))
