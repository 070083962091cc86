"""What cannot be computed exactly is refused before any work, in one line that names the module and the remedy."""

import copy
import random
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gigamorph import GigamorphError, UnsupportedError, accelerate
from gigamorph.engine.errors import ForwardError


class Net(nn.Module):
    """One convolution, then a module called `odd`, then a convolution and a pooling."""

    def __init__(self, odd: nn.Module):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.odd = odd
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x))).mean((2, 3))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Double(torch.autograd.Function):
    """Of the sum of all pixels too, which no tile has."""

    @staticmethod
    def forward(ctx, x):
        return x * 2 + x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def _log_of_a_draw(law: torch.distributions.Distribution) -> Tensor:
    return law.log_prob(law.rsample())


def python_dice(_net, x: Tensor) -> Tensor:
    return x * random.random()


def numpy_dice(_net, x: Tensor) -> Tensor:
    return x * float(np.random.rand())


@torch.library.custom_op("gigamorph_tests::relu", mutates_args=())
def library_relu(x: Tensor) -> Tensor:
    """An op of another library that is no ReLU."""
    return x.flip(2).clone()


@library_relu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def sigmoid(x: Tensor) -> Tensor:
    """A function of another library that can be overridden, and is no sigmoid."""
    return handle_torch_function(sigmoid, (x,), x) if has_torch_function_unary(x) else x.flip(2)


def norm_of_torch(_net, x: Tensor) -> Tensor:
    """torch.batch_norm takes weight and bias ahead of mean and variance."""
    a, b = (torch.full((4,), value, dtype=x.dtype) for value in (0.5, 2.0))
    return torch.batch_norm(x, a, b, a, b, False, 0.1, 1e-5, False)


CASES = {
    "the image's size as numbers": (
        Call(lambda m, x: torch.native_group_norm(x, None, None, x.shape[0], 4, x.shape[2] * x.shape[3], 2, 1e-5)[0]),
        r"'odd'.*native_group_norm.*F.group_norm",
    ),
    "an empty index": (
        Call(lambda m, x: x + x.gather(1, torch.zeros(0, dtype=torch.long)).sum()),
        r"'odd'.*'gather'",
    ),
    "layer norm over columns": (nn.LayerNorm(24), r"'odd'.*one image axis alone"),
    "antialias to one column": (
        Call(lambda m, x: F.interpolate(x, (9, 1), mode="bilinear", antialias=True)),
        r"'odd'.*one column",
    ),
    "grid_sample": (
        Call(lambda m, x: F.grid_sample(x, torch.zeros(x.shape[0], 3, 3, 2, dtype=x.dtype), align_corners=False)),
        r"'odd'.*'grid_sample'",
    ),
    "custom autograd.Function": (Call(lambda m, x: Double.apply(x)), r"'odd'.*'autograd.Function'"),
    "a branch by noise": (Call(lambda m, x: x * 2 if (x + torch.rand(1)).mean() > 0 else x), r"(?i)data-dependent"),
    "a distribution that checks what it has drawn": (
        Call(lambda m, x: _log_of_a_draw(torch.distributions.Normal(x, x.exp(), validate_args=True))),
        r"constraints\.py",
    ),
    "boolean mask": (Call(lambda m, x: x * x[x > 0].mean()), r"'odd'.*data-dependent"),
    **({"python random": (Call(python_dice), r"Random\.random")} if torch.__version__ < "2.14" else {}),
    "numpy random": (Call(numpy_dice), r"data-dependent expression"),
    "assignment to a region": (Call(lambda m, x: x.clone().index_fill_(2, torch.tensor([1]), 0.0)), r"'odd'"),
    "roll of all": (Call(lambda m, x: x.roll(1) + x), r"'odd'.*needs a dimension"),
    "flip": (Call(lambda m, x: x.flip(3) + x), r"'odd'|the model"),
    "sort": (Call(lambda m, x: x.sort(dim=2)[0]), r"'odd'.*'sort'"),
    "cumsum along rows": (Call(lambda m, x: x.cumsum(2) + x), r"'odd'|the model"),
    "split along columns": (Call(lambda m, x: x.chunk(2, 3)[0]), r"'odd'.*image axis"),
    "one row": (Call(lambda m, x: x[:, :, 3].unsqueeze(2) + x), r"'odd'.*positions of the image"),
    "rows by list": (Call(lambda m, x: x[:, :, [0, 2]]), r"'odd'"),
    "means of rows": (Call(lambda m, x: x + x.nanmean(3, keepdim=True)), r"'odd'.*'nanmean'.*whole map"),
    "row against column": (Call(lambda m, x: x + x.transpose(2, 3)[:, :, :1, :1]), r"'odd'"),
    "broadcast of a smaller map": (Call(lambda m, x: x + x[:, :, :1, :1]), r"'odd'.*size"),
    "product over positions": (Call(lambda m, x: x @ x.transpose(2, 3) @ x), r"'odd'.*'matmul'"),
    "linear over columns": (Call(lambda m, x: F.linear(x, torch.ones(24, 24, dtype=x.dtype))), r"'odd'.*image axis"),
    "custom op": (Call(lambda m, x: library_relu(x)), r"'odd'.*'gigamorph_tests.relu"),
    "operation of ATen": (Call(lambda m, x: torch.ops.aten.relu(x)), r"'odd'.*'aten.relu'"),
    "norm of torch": (Call(norm_of_torch), r"'odd'.*'torch.batch_norm'"),
    "out=": (Call(lambda m, x: torch.add(x, 1, out=torch.empty_like(x))), r"out=.*test_refusals.py:"),
    "convolution with weights from the image": (
        Call(lambda m, x: F.conv2d(x, x[:1, :, :3, :3], padding=1).expand(-1, 4, -1, -1)),
        r"'odd'.*weights",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    odd, pattern = CASES[case]
    net = accelerate(Net(odd).double(), tile=8)
    tiles = []
    net.on_tile = tiles.append
    with pytest.raises((UnsupportedError, ForwardError), match=pattern) as refusal:
        net(torch.randn(1, 3, 20, 24, dtype=torch.float64))
    assert not tiles, "work was done before the refusal"
    assert "\n" not in str(refusal.value)
    assert re.search(r"\b\w+\.py:\d+", str(refusal.value)), "no line is named"
    assert isinstance(refusal.value, GigamorphError)


def test_torchscript():
    traced = torch.jit.trace(nn.Conv2d(3, 4, 1), torch.ones(1, 3, 2, 2))
    with pytest.raises(UnsupportedError, match="the model is a TorchScript module"):
        accelerate(traced, tile=8)
    with pytest.raises(UnsupportedError, match=r"'odd'.*TorchScript"):
        accelerate(Net(torch.jit.script(nn.Conv2d(4, 4, 1))), tile=8)(torch.randn(1, 3, 20, 24))


HALVE = torch.jit.trace(lambda x: x * 0.5 + x.relu(), torch.ones(1, 4, 2, 2))


@pytest.mark.parametrize("function", [lambda m, x: HALVE(x), lambda m, x: sigmoid(x)], ids=["traced", "overridable"])
def test_functions_are_what_their_python_code_does(function):
    """Traced ones, and those of another library that have the name of one of PyTorch's."""
    net, x = Net(Call(function)).double(), torch.randn(1, 3, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(accelerate(net, tile=8)(x), net(x))


def test_lazy_module():
    with pytest.raises(UnsupportedError, match=r"'odd'.*lazy"):
        accelerate(Net(nn.LazyConv2d(4, 1)), tile=8)(torch.randn(1, 3, 20, 24))


def test_output_without_the_image():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * 2

    with pytest.raises(UnsupportedError, match="does not depend on the image; "):
        accelerate(Constant(), tile=8)(torch.randn(1, 3, 20, 24))


def test_an_unused_branch_is_no_reason_to_refuse():
    """Auxiliary heads whose result is dropped may hold anything."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.norm(x)
            return x.mean((2, 3))

    model = Net()
    x = torch.randn(1, 3, 20, 24)
    assert torch.allclose(accelerate(model, tile=8)(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"batch_norm": "frozn"}, "batch_norm must be .*, not 'frozn'"),
        ({"halos": "moon"}, "halos must be .*, not 'moon'"),
        ({"tile": 0}, "tile"),
        ({"fallback": "half"}, "fallback must be .*, not 'half'"),
        ({"tile": (8, -1)}, "tile"),
        ({"memory_budget": "4 bananas"}, "bananas"),
    ],
)
def test_arguments(options, pattern):
    with pytest.raises(GigamorphError, match=pattern):
        accelerate(nn.Conv2d(3, 4, 3), **options)


# -- refusals whose remedy is not the line alone ----------------------------------------------------------------------

BOUND = torch.from_numpy  # by a name of this module


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def said(net: nn.Module, *given: object) -> str:
    """Its refusal, which is one line."""
    with pytest.raises(GigamorphError) as caught:
        accelerate(net, tile=8)(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def agree_whole(net: nn.Module, x: Tensor) -> None:
    """What the refusal proposes: the map whole."""
    other = accelerate(copy.deepcopy(net), tile=8, fallback="untiled")
    torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-10)


class Levels(nn.Module):
    """A backbone: maps of two levels, of one number of channels."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x).relu()
        return {"0": x, "1": self.second(x)}


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_a_detector_is_refused_as_one(name):
    """Its backbone is computed by tiles."""
    detection = pytest.importorskip("torchvision.models.detection")
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    given = {"rpn_anchor_generator" if name == "FasterRCNN" else "anchor_generator": anchors}
    net = getattr(detection, name)(Levels(), 3, min_size=96, **given).double().eval()
    remedy = "net.backbone = accelerate(net.backbone, ...)"
    told = said(net, images(1, 3, 96, 96))
    assert told.endswith(remedy) and "NMS" in told and re.match(r"\w+\.py:\d+ \(in \w+\)", told), told
    assert said(net, [images(3, 96, 96)]).endswith(remedy)
    x = images(1, 3, 96, 128)
    wanted = net.backbone(x)
    net.backbone = accelerate(net.backbone, tile=32)
    found = net.backbone(x)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


class Copying(nn.Module):
    """A copy of what a tensor is in, and its convolution's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = {"x": self.conv(x)}
        return copy.deepcopy(found)["x"]


class Cloning(Copying):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clone()


def test_a_deepcopy_is_refused_with_the_line_of_the_user():
    net = Net(Copying()).double()
    told = said(net, images(1, 3, 24, 24))
    assert re.match(r"test_refusals\.py:\d+ \(in forward\) in module 'odd' cannot be recorded", told), told
    assert "copy tensors by clone()" in told
    other = Net(Cloning()).double()
    x = images(1, 3, 24, 24)
    torch.testing.assert_close(accelerate(copy.deepcopy(other), tile=8)(x), other(x), rtol=1e-10, atol=1e-10)


class Lines(nn.Module):
    """What Python's own copying does with a tensor is in a graph; its file is Python's."""

    def forward(self, x: Tensor) -> Tensor:
        return copy.copy(x.flip(3)) + x


def test_a_line_of_a_graph_is_the_users():
    told = said(Net(Lines()).double(), images(1, 3, 24, 24))
    assert "test_refusals.py:" in told and "copy.py:" not in told, told


class Parts(nn.Module):
    def __init__(self, in_sequence: bool):
        super().__init__()
        self.in_sequence = in_sequence
        self.parts = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_sequence:
            return checkpoint_sequential(self.parts, 2, x, use_reentrant=False)
        for first in (0, 2):
            x = checkpoint(self.parts[first : first + 2], x, use_reentrant=False)
        return x


def test_checkpoints_in_sequence():
    net = Net(Parts(True)).double()
    x = images(1, 3, 24, 24)
    told = said(net, x)
    assert re.match(r"test_refusals\.py:\d+ \(in forward\) in module 'odd'", told), told
    assert "call torch.utils.checkpoint.checkpoint for each part" in told
    agree_whole(net, x)
    other = Net(Parts(False)).double()
    torch.testing.assert_close(accelerate(copy.deepcopy(other), tile=8)(x), other(x), rtol=1e-10, atol=1e-10)


def test_from_numpy_by_another_name():
    weights = np.ones((4, 1, 1))
    net = Net(Call(lambda m, x: x * BOUND(weights))).double()
    x = images(1, 3, 24, 24)
    torch.testing.assert_close(accelerate(copy.deepcopy(net), tile=8)(x), net(x), rtol=1e-10, atol=1e-10)


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = x.clone()
        found[:, :, ::2, ::2] = self.coarse(x)
        return found


def test_an_assignment_to_every_second_row():
    net = Net(Strided()).double()
    x = images(1, 3, 24, 24)
    told = said(net, x)
    assert "'odd'" in told and "test_refusals.py:" in told and 'fallback="untiled"' in told, told
    agree_whole(net, x)


def test_observers_of_a_quantization():
    quantization = pytest.importorskip("torch.ao.quantization")
    net = Net(nn.Conv2d(4, 4, 3, padding=1)).train()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    x = images(1, 3, 24, 24).float()
    before = accelerate(copy.deepcopy(net), tile=8)
    torch.testing.assert_close(before(x), net(x), rtol=1e-4, atol=1e-5)  # the remedy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = quantization.prepare_qat(net)
    told = said(net, x)
    assert re.match(r"test_refusals\.py:\d+ \(in forward\) in module 'first", told), told
    assert "train the network by tiles before prepare_qat" in told
    other = accelerate(copy.deepcopy(net), tile=8, fallback="untiled")
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-5)
