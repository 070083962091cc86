"""Identity layers, pairs and residual blocks: the same function in the modes they promise, and live gradients."""

import copy
import os
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import ResNet
from gigamorph.engine.morph.activation import activation, insert_activation
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual

PAIRS = ["ReLU", "GELU", "GELU(approximate='tanh')", "SiLU", "Hardswish", "Softplus", "LogSigmoid"]
PAIRS += ["LeakyReLU(negative_slope=0.2)", "PReLU", "Softplus(beta=3.0, threshold=20.0)"]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@st.composite
def cases(draw: Any) -> tuple[nn.Module, Tensor, str, int]:
    """A small network of 0 to 3 image axes with random statistics, its input, a path, and an odd kernel."""
    dims = draw(st.sampled_from([0, 1, 2, 2, 3]))
    channels = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 99)))
    first = CONVS[dims - 1](2, channels, 3, padding=1) if dims else nn.Linear(2, channels)
    last = CONVS[dims - 1](channels, 3, 1) if dims else nn.Linear(channels, 3)
    act = activation(draw(st.sampled_from(["ReLU", "GELU", "Tanh"])))
    model = randomize(nn.Sequential(first, NORMS[max(dims, 1) - 1](channels), act, last))
    x = torch.randn(5, 2, *[draw(st.integers(2, 7)) for _ in range(dims)])
    return model, x, draw(st.sampled_from("0123")), draw(st.sampled_from([1, 3, 5])) if dims else 1


def small_resnet() -> ResNet:
    return half_resnet(2, 1, 8)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def both(model: nn.Module, child: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Outputs of copies, which keep their statistics."""
    return copy.deepcopy(child).train(training)(x), copy.deepcopy(model).train(training)(x)


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([None, "ReLU", "SiLU", "Tanh"]))
def test_identity_is_bit_exact_in_both_modes(case: Any, act: str | None) -> None:
    model, x, path, kernel = case
    child, _ = insert_identity(model, x, path, kernel, act=act)
    for training in (False, True):
        assert torch.equal(*both(model, child, x, training))
    child(x).square().sum().backward()
    assert any((p.grad != 0).any() for p in child.get_submodule(path)[1].parameters())


@settings(max_examples=25, deadline=None)
@given(cases(), st.booleans())
def test_identity_with_batchnorm_in_eval_mode(case: Any, double: bool) -> None:
    model, x, path, kernel = case
    child, report = insert_identity(model, x, path, kernel, norm=True)
    assert child.get_submodule(path)[1].bias is None
    if double:
        model, child, x = model.double(), insert_identity(model.double(), x, path, kernel, norm=True)[0], x.double()
    here, there = both(model, child, x, False)
    if path == "1":  # after another BatchNorm, whose statistics it has
        assert relative(here, there) <= (1e-12 if double else 1e-5)
    else:
        assert torch.equal(here, there)
    assert report.difference.float64_eval <= 1e-12


@pytest.mark.parametrize("eps", [1e-3, 1e-4, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_neutral_statistics_are_bit_exact_for_every_eps(eps: float, dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(3, eps=eps).to(dtype).eval()
    norm.running_var.fill_(1 - eps)  # pyright: ignore
    x = torch.randn(2, 3, 50, 50, dtype=dtype)
    assert torch.equal(norm(x), x)


def test_batchnorm_after_batchnorm_nearly_keeps_train_mode() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3)))
    x = torch.randn(8, 2, 16, 16)
    _, report = insert_identity(model, x, "1", norm=True)
    assert report.difference.float64_train < 1e-4
    _, naive = insert_identity(model, x, "3", norm=True)
    assert naive.difference.float64_train > 0.1  # said, not hidden


def test_relu_after_relu_needs_no_pact() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 2, 8, 8)
    child, _ = insert_identity(model, x, "1", act="ReLU")
    assert isinstance(child[1][2], nn.ReLU) and torch.equal(child(x), model(x))


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from(PAIRS))
def test_pair(case: Any, act: str) -> None:
    model, x, path, kernel = case
    model, x = model.double(), x.double()
    child, report = insert_pair(model, x, path, act, kernel)
    assert report.difference.float64 <= 1e-12
    for training in (False, True):
        assert relative(*both(model, child, x, training)) <= 1e-12
    if act == "ReLU":
        assert torch.equal(*both(model, child, x, False))
    child(x).square().sum().backward()
    for layer in (child.get_submodule(path)[1], child.get_submodule(path)[3]):
        assert (layer.weight.grad != 0).any()
    added = child.get_submodule(path)[1].weight
    assert added.shape[0] == 2 * added.shape[1]


@pytest.mark.parametrize("act", PAIRS)
def test_pair_is_within_four_ulps(act: str) -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 40, 40) * 3
    child, _ = insert_pair(model, x, "0", act)
    first, phi, last = child[0][1:]
    hidden = phi(first(x)).detach().abs()
    size = torch.maximum(hidden[:, :4], hidden[:, 4:]) * last.weight.abs().max()
    assert ((last(phi(first(x))) - x).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


def test_pair_trains_densely_where_its_parts_are_alive() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 2, 9, 9)
    child, _ = insert_pair(model, x, "0", "GELU", 3)
    child(x).square().sum().backward()
    assert (child[0][1].weight.grad != 0).all() and (child[0][3].weight.grad != 0).all()


@settings(max_examples=12, deadline=None)
@given(cases(), st.sampled_from(["ReLU", "GELU", "SiLU", "Tanh"]), st.booleans(), st.integers(1, 6))
def test_residual_is_bit_exact_in_both_modes(case: Any, act: str, norm: bool, hidden: int) -> None:
    model, x, path, kernel = case
    child, _ = insert_residual(model, x, path, act, kernel, hidden=hidden, norm=norm)
    for training in (False, True):
        assert torch.equal(*both(model, child, x, training))


@pytest.mark.parametrize("norm", [False, True])
def test_residual_learns_at_the_second_step(norm: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)), torch.randn(2, 2, 9, 9)
    child, _ = insert_residual(model, x, "0", "GELU", norm=norm)
    body = child[0][1].body
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        child(x).square().sum().backward()
        assert (body[-1].weight.grad != 0).any()
        assert bool((body[0].weight.grad != 0).any()) == (step == 1)
        optimizer.step()


@pytest.mark.parametrize("path", ["2", "3", "4"])
def test_norms_that_are_new_are_checked_on_the_example_s_batch(path: str) -> None:
    """One image gives a BatchNorm behind the pooling a single value, which train mode refuses."""
    torch.manual_seed(0)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *pooled)
    child, report = insert_residual(model, torch.zeros(2, 1, 8, 8), path)
    assert report.difference.float64_train == 0
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(*both(model, child, x, True))


def test_all_in_a_resnet_and_the_step_on_a_fresh_one() -> None:
    torch.manual_seed(0)
    model = randomize(small_resnet()).eval()
    x = torch.randn(2, 1, 40, 36)
    child, fresh = model, small_resnet()
    for insert, path, options in (
        (insert_identity, "layer1.0.conv1", {"act": "GELU"}),
        (insert_pair, "layer2.0.bn1", {"act": "SiLU"}),
        (insert_identity, "layer2.0.downsample.0", {"norm": True}),
        (insert_residual, "layer2", {"hidden": 8}),
        (insert_pair, "avgpool", {"act": "GELU"}),
        (insert_pair, "fc", {"act": "Softplus"}),
    ):
        child, report = insert(child, x, path, **options)
        assert report.difference.float64_eval <= 1e-12
        report.step.edit(fresh)
    assert relative(child(x), model(x)) < 1e-5
    fresh.load_state_dict(child.state_dict())
    assert torch.equal(fresh.eval()(x), child.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(child))(x), child(x))
    assert_exact(child.double(), torch.randn(1, 1, 64, 56, dtype=torch.float64), tile=32)


class ChannelsLast(nn.Module):
    """A convolution, then a linear layer on the last axis, as in a ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("insert", "options"), [(insert_pair, {}), (insert_residual, {"norm": False})])
def test_channels_on_the_last_axis(insert: Any, options: Any) -> None:
    x = torch.randn(2, 2, 5, 6)
    child, report = insert(ChannelsLast(), x, "linear", "GELU", 1, **options)
    assert report.step.dims == 0 and child(x).shape == (2, 5, 6, 6)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda m, x: insert_identity(m, x, "conv", 2),
            r"'conv': kernel \(2, 2\) must be odd, so that it has a centre tap",
        ),
        (lambda m, x: insert_identity(m, x, "linear", 1, norm=True), "'linear' has its channels on the last axis"),
        (lambda m, x: insert_identity(m, x, "linear", (3, 3)), "does not fit 0 image axes"),
        (lambda m, x: insert_pair(m, x, "conv", "Tanh"), "not a multiple of x"),
        (lambda m, x: insert_pair(m, x, "conv.weight"), "no module 'conv.weight'"),
        (lambda m, x: insert_residual(m, x, "conv", hidden=0), "hidden must be at least 1, not 0"),
        (lambda m, x: insert_residual(m, x[:, :1], "conv"), "cannot be run on the example"),
    ],
)
def test_refusals_leave_the_model_untouched(run: Any, message: str) -> None:
    model = ChannelsLast()
    before = repr(model), copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=message):
        run(model, torch.randn(2, 2, 5, 6))
    assert repr(model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values(), strict=True))


# The network, the layers of it that are run, and the block.
BLOCKS = [
    ("resnet10t", "conv1 bn1 act1 maxpool layer1 layer2", "layer2.0"),
    ("densenet121", "features", "features.denseblock2.denselayer3"),
    ("mobilenetv2_050", "conv_stem bn1 blocks", "blocks.2.0"),
    ("test_efficientnet", "conv_stem bn1 blocks", "blocks.1.0.se"),
    ("convnext_atto", "stem stages", "stages.1.blocks.0.mlp.fc1"),
]
MORE_BLOCKS = [
    ("resnet18", "", "layer2.0"),
    ("efficientnet_b0", "", "blocks.2.1.se"),
    ("resnet26", "", "layer2.0.bn2"),
    ("resnetv2_50", "", "stages.1.blocks.0"),
    ("regnety_002", "", "s2.b1"),
    ("vgg11_bn", "", "features.6"),
]
LENGTHS = {"features": 7, "blocks": 3, "stages": 2}  # of the containers that are cut
DEEP = "GIGAMORPH_PROGRAMS" in os.environ  # as for random programs: more of everything


@pytest.mark.parametrize(("name", "layers", "path"), BLOCKS + (MORE_BLOCKS if DEEP else []))
def test_every_block_of_real_networks(name: str, layers: str, path: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if name.startswith("vgg"):
        options["mlp_ratio"] = 1 / 32  # else a hundred million weights in the head
    if name.startswith("densenet") and not DEEP:
        options["block_config"] = (1, 3, 1, 1)
    if name.startswith("mobilenetv2") and not DEEP:
        options["depth_multiplier"] = 0.5
    if name.startswith("convnext") and not DEEP:
        options["depths"] = (1, 1, 1, 1)
    model = timm.create_model(name, num_classes=3, **options)
    if layers and not DEEP:
        parts = {layer: model.get_submodule(layer) for layer in layers.split()}
        cut = {layer: part[: LENGTHS[layer]] if layer in LENGTHS else part for layer, part in parts.items()}
        model = nn.Sequential(OrderedDict(cut))
    randomize(model)
    x = torch.randn(2, 3, 32, 32)
    last = path.endswith("fc1")
    for act in ("GELU", "SiLU", "ReLU", "Hardswish", "Tanh") if DEEP else ("GELU",):
        zero = insert_residual(model, x, path, act, 1, norm=not last, hidden=4)[1].difference
        assert zero.float64 == zero.float32 == 0
        pact = insert_activation(model, x, path, act)[1].difference
        assert pact.float64 == pact.float32 == 0
        if act != "Tanh":
            assert insert_pair(model, x, path, act)[1].difference.float64 <= 1e-12
