"""PAct is the identity bit for bit at a = 0 and phi at a = 1; the pairs are exactly those that the table names."""

import copy
import pickle

import pytest
import torch
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.activation import ACTIVATIONS, PAct, activation, insert_activation, pair_scale, paired

VALUES = torch.cat([torch.linspace(-60, 60, 20001, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(inplace=True), nn.Conv2d(5, 3, 3))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pact_is_the_identity_at_0_and_phi_at_1(name: str, dtype: torch.dtype) -> None:
    pact = PAct(activation(name), channels=4).to(dtype)
    x = (torch.randn(3, 4, 7, 5) * 10).to(dtype)
    assert torch.equal(pact(x), x)
    pact.a.data.fill_(1)
    assert torch.equal(pact(x), pact.phi(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_coefficients_get_a_gradient_from_the_first_step(name: str) -> None:
    pact = PAct(activation(name), channels=4)
    pact(torch.randn(3, 4, 7, 5) * 10).sum().backward()
    assert pact.a.grad is not None and (pact.a.grad != 0).all()


def test_pact_on_the_last_axis_scales_each_channel() -> None:
    pact = PAct(nn.Tanh(), channels=3, dims=0)
    pact.a.data[1] = 1
    x = torch.randn(2, 6, 3)
    assert torch.equal(pact(x)[..., [0, 2]], x[..., [0, 2]])
    assert torch.equal(pact(x)[..., 1], x[..., 1].tanh())


def test_pact_under_autocast() -> None:
    pact = PAct(nn.Softplus(), channels=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert pact(torch.randn(1, 4, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pairs_are_those_whose_difference_is_linear(name: str) -> None:
    phi = activation(name).double()
    odd = (phi(VALUES) - phi(-VALUES)).detach()
    slope = (odd * VALUES).sum() / (odd * odd).sum()
    linear = bool(((slope * odd - VALUES).abs() <= 1e-8).all())
    assert linear == (pair_scale(phi) is not None)
    if linear:
        phi, scale = paired(name)
        plus, minus = phi.double()(VALUES).detach(), phi.double()(-VALUES).detach()
        ulps = 4 * torch.finfo(torch.float64).eps
        assert ((scale * (plus - minus) - VALUES).abs() <= ulps * (plus.abs() + minus.abs())).all()


@pytest.mark.parametrize("text", ["LeakyReLU(negative_slope=-1.0)", "PReLU(num_parameters=4)", "Tanh", "Mish", "ELU"])
def test_no_pair(text: str) -> None:
    with pytest.raises(MorphError, match="not a multiple"):
        paired(text)


@pytest.mark.parametrize(
    "module", [nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.Softplus(2.0, 30.0), nn.ELU(0.5), nn.PReLU(init=0.1), nn.Tanh()]
)
def test_text_is_what_torch_prints(module: nn.Module) -> None:
    assert repr(activation(repr(module))) == repr(module)


def test_in_place_is_dropped() -> None:
    assert repr(activation("ReLU(inplace=True)")) == "ReLU()"


@pytest.mark.parametrize("text", ["Softmax", "RReLU", "relu", "GELU(3)", "GELU(", "os.system", "__import__('os')", ""])
def test_unknown_activations_are_refused(text: str) -> None:
    with pytest.raises(MorphError, match="is not an activation"):
        activation(text)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(ACTIVATIONS)), st.sampled_from("0123"), st.booleans())
def test_insertion_is_bit_exact(act: str, path: str, training: bool) -> None:
    model, x = net(), torch.randn(2, 2, 9, 8)
    child, report = insert_activation(model, x, path, act)
    assert report.difference.float64 == report.difference.float32 == 0
    child = copy.deepcopy(child).train(training)
    assert torch.equal(child(x), copy.deepcopy(model).train(training)(x))
    child(x).square().sum().backward()
    assert (child.get_submodule(path)[1].a.grad != 0).any()


def test_in_place_changes_the_model_and_keeps_its_parameters() -> None:
    model = net()
    first = model[0].weight
    child, report = insert_activation(model, torch.randn(2, 2, 9, 8), "0", "GELU", inplace=True)
    assert child is model and model[0][0].weight is first and report.step.op == "activation"
    assert isinstance(pickle.loads(pickle.dumps(model))[0][1], PAct)


def test_the_original_is_untouched() -> None:
    model = net()
    before = repr(model), copy.deepcopy(model.state_dict())
    insert_activation(model, torch.randn(2, 2, 9, 8), "0", "GELU")
    assert repr(model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values(), strict=True))


def test_the_scan_runs_it() -> None:
    child, _ = insert_activation(net(), torch.randn(2, 2, 9, 8), "0", "SiLU")
    child[0][1].a.data.uniform_(0, 1)
    assert_exact(child.double().eval(), torch.randn(1, 2, 21, 17, dtype=torch.float64), tile=8)


class Branches(nn.Module):
    """Modules whose place is doubtful."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.wide = nn.Conv2d(4, 6, 1)
        self.relu = nn.ReLU()
        self.unused = nn.ReLU()
        self.linear = nn.Linear(6, 6)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.wide(self.relu(self.conv(x))))
        return self.act(self.last(self.linear(y.permute(0, 2, 3, 1))))

    def last(self, y: torch.Tensor) -> torch.Tensor:
        return y


class Mixed(Branches):
    """After its last layer no channel is followed."""

    def last(self, y: torch.Tensor) -> torch.Tensor:
        return y.cumsum(-1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "no module 'nothing'"),
        ("", "the model itself"),
        ("relu", "several times with different widths"),
        ("unused", "not called"),
    ],
)
def test_refusals_name_the_module(path: str, message: str) -> None:
    with pytest.raises(MorphError, match=message):
        insert_activation(Branches(), torch.randn(1, 2, 5, 5), path, "GELU")


def test_channels_on_the_last_axis_are_found() -> None:
    child, report = insert_activation(Branches(), torch.randn(1, 2, 5, 4), "act", "Tanh")
    assert (report.step.channels, report.step.dims) == (6, 0)
    assert child.act[1].a.shape == (6,)
    square = torch.randn(1, 2, 6, 4)  # 6 rows as well as 6 channels
    _, report = insert_activation(Branches(), square, "act", "Tanh")
    assert (report.step.channels, report.step.dims) == (6, 0)
    with pytest.raises(MorphError, match="ambiguous channel axis"):
        insert_activation(Mixed(), square, "act", "Tanh")
