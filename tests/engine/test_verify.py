"""The self-check, and what it is for: hooks, shared modules and in-place changes are right or refused."""

import copy
import sys
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import GigamorphError, UnsupportedError, accelerate
from gigamorph.engine.lowering.ops import Local
from gigamorph.engine.lowering.ops.base import RULES
from gigamorph.engine.verify import verify


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.norm(self.stem(x))))
        return self.head((self.body(x).tanh() + x).mean((2, 3)))


def image() -> Tensor:
    return torch.randn(2, 3, 33, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wrong_tanh(monkeypatch):
    """A rule with a mistake at the borders of tiles."""
    plain = RULES["tanh"]

    def rule(op, maps) -> Local:
        local = plain(op, maps)
        run = local.run
        local.run = lambda env, block: tuple(t * (1 + 1e-8 * (block.rows[0] > 0)) for t in run(env, block))
        return local

    monkeypatch.setitem(RULES, "tanh", rule)


@pytest.mark.parametrize("training", [False, True])
def test_right_networks_pass_and_nothing_changes(training):
    model = randomize(Net()).train(training)
    before, dice = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net = accelerate(model, verify=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
    assert torch.equal(torch.get_rng_state(), dice)
    net(image().float()).sum().backward()


def test_mistakes_are_found_at_construction(wrong_tanh):
    with pytest.raises(GigamorphError, match=r"verify: .*(output|gradient).* differs by [0-9.]+e-0\d"):
        accelerate(Net().eval(), verify=True)
    accelerate(Net().eval())  # not asked for


def test_mistakes_are_found_at_the_first_image(wrong_tanh):
    """Without a convolution that tells the channels; and in a mode that was not checked before."""

    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.tanh() if self.training else x.relu()).mean((2, 3))

    net = accelerate(Late(), verify=True).eval()
    net(image())
    net.train()
    with pytest.raises(GigamorphError, match="verify"):
        net(image().requires_grad_())


def test_networks_that_cannot_be_checked():
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] == 33, "33 rows, please"
            return x.mean((2, 3))

    with pytest.raises(GigamorphError, match=r"33 rows.*verify=True"):
        accelerate(Picky(), tile=16, verify=True)(image())

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5).mean((2, 3))

    with pytest.raises(GigamorphError, match="random numbers"):
        accelerate(Noisy(), tile=16, verify=True)(image())


def test_refused_networks_are_refused_at_construction():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Softmin(-1))
    with pytest.raises(UnsupportedError):
        accelerate(nn.Sequential(model[0], nn.LPPool2d(2, 2)), verify=True)


# -- all that a step leaves -------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Leaves something behind in every way that there is."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("mean", torch.zeros(4))
        self.average, self.calls, self.seen = torch.zeros(4), 0, []

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x.mul_(2))
        moments = y.detach().mean((0, 2, 3))
        self.mean = 0.9 * self.mean + 0.1 * moments
        self.average = self.average + moments
        self.calls += 1
        self.seen.append(moments.sum())
        self.last = y
        return {"map": y * self.gate.detach(), "means": (y.mean((2, 3)), y.detach().amax((2, 3))), "classes": 2}


class Restored(Stateful):
    """With one thing after each call as it was before."""

    def __init__(self, twin: Stateful, fault: str):
        self.__dict__.update(fault=fault, twin=twin, weights=twin.conv.weight.detach().clone())
        nn.Module.__init__(self)

    def forward(self, x: Tensor) -> dict[str, Any]:
        twin, fault = self.twin, self.fault
        before, image = {"mean": twin.mean, "average": twin.average, "calls": twin.calls}, x.clone()
        if fault == "stale":
            twin.conv.weight.data = self.weights.clone()
        out = twin(x)
        if fault in before:
            setattr(twin, fault, before[fault])
        elif fault == "seen":
            twin.seen.pop()
        elif fault == "last":
            del twin.last
        elif fault == "image":
            x.data.copy_(image)
        elif fault == "zeros":
            out["map"] = out["map"] + 0 * twin.gate
        elif fault == "type":
            out["means"] = list(out["means"])
        elif fault == "flag":
            out["means"] = (out["means"][0], out["means"][1] + 0 * out["means"][0])
        elif fault == "number":
            out["classes"] = 3
        return out


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("mean", "buffer 'mean'"),
        ("average", "attribute 'average'"),
        ("calls", "'calls' .* is 0 instead of 1"),
        ("seen", "attribute 'seen'"),
        ("last", "attribute 'last' .* missing"),
        ("image", "image after the call"),
        ("zeros", "gradient of 'gate'"),
        ("type", "list instead of builtins.tuple"),
        ("flag", "requires_grad"),
        ("number", "'classes'] is 3 instead of 2"),
        ("stale", r"\(step 2\)"),
        ("none", None),
    ],
)
def test_all_that_a_step_leaves_is_compared(fault, named):
    """Also what only the second step shows: weights that were taken over once."""
    network = Stateful()
    check = lambda: verify(network, lambda twin, _tile: Restored(twin, fault), (3,), torch.device("cpu"))  # noqa: E731
    if named is None:
        check()
    else:
        with pytest.raises(GigamorphError, match=named):
            check()
    assert network.calls == 0 and not network.seen and not network.mean.any()


# -- hooks ----------------------------------------------------------------------------------------------------------

HOOKS = {
    "output of a layer": lambda m: m.stem.register_forward_hook(lambda _m, _x, y: y * 1.5),
    "output of a layer, in place": lambda m: m.body.register_forward_hook(_halve),
    "input of a layer": lambda m: m.body.register_forward_pre_hook(lambda _m, x: (x[0] - 0.25,)),
    "input of the network": lambda m: m.register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
    "output of the network": lambda m: m.register_forward_hook(lambda _m, _x, y: y.square()),
}


def _halve(_module, _inputs, output: Tensor) -> None:
    output.mul_(0.5)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_tensors(name):
    model = randomize(Net()).double()
    model.dropout.eval()
    HOOKS[name](model)
    assert_exact(model, image(), tile=(9, 12))


def test_hooks_that_come_and_go():
    model = Net().double().eval()
    net, x = accelerate(model, tile=12), image()
    for change in (lambda: None, lambda: HOOKS["input of a layer"](model), lambda: HOOKS["output of a layer"](model)):
        change()
        torch.testing.assert_close(net(x), model(x))
    model.stem._forward_hooks.clear()
    torch.testing.assert_close(net(x), model(x))


def test_hooks_on_gradients_of_the_old_kind_are_refused():
    model = Net().double()
    hook = model.body.register_backward_hook(lambda *_: None)
    net = accelerate(model, tile=12)
    with pytest.raises(UnsupportedError, match=r"'body'.*register_full_backward_hook"):
        net(image())
    with torch.no_grad():
        net(image())
    hook.remove()
    net(image())


def test_hooks_on_parameters_run():
    models = [Net().double().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.body.weight.register_hook(lambda grad: grad * 3)
    for network in (models[0], accelerate(models[1], tile=12)):
        network(image()).sum().backward()
    torch.testing.assert_close(models[0].body.weight.grad, models[1].body.weight.grad)


# -- modules at two scales, and changes in place ----------------------------------------------------------------------


def test_a_module_at_two_scales():
    """A head shared by two levels, its BatchNorm counting both."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)])
            self.head = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.down[0](x)
            b = self.down[1](a)
            return self.head(a).mean((2, 3)), self.head(b) + 1

    assert_exact(randomize(Shared()).double().train(), image(), tile=(9, 12))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).mean((2, 3))


def alias(x: Tensor) -> Tensor:
    y = x
    y.mul_(2)
    return x + y


def own_statistics(x: Tensor) -> Tensor:
    return (x + 1).add_(x.mean((2, 3), keepdim=True))


def view_of_channels(x: Tensor) -> Tensor:
    y = x[:, :2]
    y.mul_(3)
    return x + 1


def view_behind(x: Tensor) -> Tensor:
    y = x.view(x.shape)
    x.mul_(3)
    return y + 1


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 0
    return y * x


@pytest.mark.parametrize("function", [alias, own_statistics, view_of_channels, view_behind, assigned])
def test_changes_in_place_are_exact_or_refused(function):
    """The refusal names the module and the line."""
    model = Call(function).double()
    try:
        assert_exact(model, image(), tile=(9, 12))
    except UnsupportedError as refusal:
        assert "in place" in str(refusal) or "__setitem__" in str(refusal)
        assert "test_verify.py" in str(refusal)
        assert function in (view_of_channels, assigned)


def test_refusals_name_the_line():
    model = Call(lambda x: x.sort(3).values).double()
    line = sys._getframe().f_lineno - 1
    with pytest.raises(UnsupportedError, match=rf"the model \(test_verify.py:{line}\).*'sort'"):
        accelerate(model, tile=12)(image())
