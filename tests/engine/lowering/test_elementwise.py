"""PyTorch's pointwise functions, one by one, as function, as method and in place, against stock."""

import copy
import operator

import pytest
import torch
from around import image
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.lowering.ops import names
from gigamorph.engine.lowering.ops.base import RULES

# How a function is called where it takes more than one map: `x` between 0.1 and 0.9, `y` another map like it.
CALLS = {
    **dict.fromkeys("addcmul addcdiv".split(), lambda f, x, y: f(x, y, x + 1, value=0.5)),
    **dict.fromkeys(
        "add sub subtract mul multiply div divide true_divide floor_divide atan2 arctan2 copysign hypot fmax fmin fmod "
        "remainder maximum minimum logaddexp logaddexp2 xlogy xlog1py nextafter pow float_power rsub eq ne lt le gt ge "
        "greater greater_equal less less_equal not_equal logical_and logical_or logical_xor ldexp isclose igamma "
        "igammac gammainc gammaincc".split(),
        lambda f, x, y: f(x, y),
    ),
    **dict.fromkeys(
        "bitwise_and bitwise_or bitwise_xor gcd lcm __xor__".split(), lambda f, x, y: f(integer(x), integer(y))
    ),
    **dict.fromkeys(
        "bitwise_left_shift bitwise_right_shift __lshift__ __rshift__".split(),
        lambda f, x, y: f(integer(x), integer(y) % 3),
    ),
    **dict.fromkeys("acosh arccosh".split(), lambda f, x, y: f(x + 1)),
    "bitwise_not": lambda f, x, y: f(integer(x)),
    "zeta": lambda f, x, y: f(x + 1.5, y.detach() + 0.5),
    "heaviside": lambda f, x, y: f(x - 0.5, y),
    "clamp": lambda f, x, y: f(x, 0.3, 0.7),
    "clip": lambda f, x, y: f(x, max=y),
    "clamp_min": lambda f, x, y: f(x, y),
    "clamp_max": lambda f, x, y: f(x, 0.6),
    "lerp": lambda f, x, y: f(x, y, x * y),
    "masked_fill": lambda f, x, y: f(x, y > 0.5, 0.25),
    "mvlgamma": lambda f, x, y: f(x + 1, 2),
    "multigammaln": lambda f, x, y: f(x + 1, 2),
    "threshold": lambda f, x, y: f(x, 0.5, 0.2),
    "where": lambda f, x, y: f(x > 0.5, x, y),
    "round": lambda f, x, y: f(x, decimals=1),
    "logit": lambda f, x, y: f(x, eps=0.2),
    "full_like": lambda f, x, y: f(x, 0.5),
    "fake_quantize_per_tensor_affine": lambda f, x, y: f(x, 0.1, 1, 0, 7),
    "empty_like": lambda f, x, y: f(x).copy_(y),
    **{
        f"{kind}_polynomial_{letter}": lambda f, x, y: f(x, 3)
        for kind in ("chebyshev", "shifted_chebyshev", "hermite", "laguerre", "legendre")
        for letter in ("t", "u", "v", "w", "h", "he", "l", "p")
    },
}
OTHER_TYPE = ("bitwise_left_shift", "bitwise_right_shift", "float_power", "ldexp")  # no in-place form for these inputs


def integer(x: Tensor) -> Tensor:
    return (x * 20).long()


ASSIGNMENTS = {
    "+=": operator.iadd,
    "-=": operator.isub,
    "*=": operator.imul,
    "/=": operator.itruediv,
    "//=": operator.ifloordiv,
    "%=": operator.imod,
    "**=": operator.ipow,
    "&=": operator.iand,
    "|=": operator.ior,
    "^=": operator.ixor,
    "<<=": operator.ilshift,
    ">>=": operator.irshift,
}


def spellings(name: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """The results of every way to call a function."""
    call = CALLS.get(name, lambda f, x, y: f(x))
    homes = [home for home in (torch, torch.special, F) if hasattr(home, name)]
    forms = [getattr(homes[0], name)] if homes else []
    if hasattr(Tensor, name) and name != "where":  # that begins with the condition
        forms.append(lambda first, *rest, **options: getattr(first, name)(*rest, **options))
    if hasattr(Tensor, f"{name}_") and name not in OTHER_TYPE:
        forms.append(lambda first, *rest, **options: getattr(first.clone(), f"{name}_")(*rest, **options))
    return [made for form in forms for made in _tensors(call(form, x, y))]


def _tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


class Net(nn.Module):
    """Functions between two convolutions, each with a path beside it for functions without a gradient."""

    def __init__(self, *functions):
        super().__init__()
        self.first, self.functions = nn.Conv2d(2, 2, 3, padding=1), functions
        self.last = nn.ModuleList(nn.LazyConv2d(2, 3) for _ in functions)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x).sigmoid() * 0.8 + 0.1
        y = x.flip(1) * 0.5 + 0.2
        made = [torch.cat([x, *(t.to(x.dtype) for t in function(x, y))], 1) for function in self.functions]
        return [last(t) for last, t in zip(self.last, made, strict=True)]


def exact(*functions, inference: bool = True) -> None:
    assert_exact(network(*functions), image(1, 2, 9, 8), tile=(5, 4), inference=inference)


def network(*functions) -> Net:
    """Of functions that PyTorch cannot differentiate the arguments are detached."""
    net = Net(*functions).double()
    net(image())
    try:
        torch.stack([one.sum() for one in net(image())]).sum().backward()
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        if len(functions) == 1:
            return network(lambda x, y: functions[0](x.detach(), y.detach()))
        return network(*(function for one in functions for function in network(one).functions))
    return net


NAMES = [n for n in (*names.TAGGED, *names.ALIASES, *names.COMPOSED) if n != "polygamma"]
GROUPS = [NAMES[start : start + 8] for start in range(0, len(NAMES), 8)]


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_function(group):
    """Several beside each other, which is one recording.

    Inference, for which all of them are replayed alike, is compared for every other group.
    """
    functions = [lambda x, y, name=name: spellings(name, x, y) for name in group]
    for function in functions:  # what is not finite would hide the others
        assert all(t.isfinite().all() for t in function(torch.rand(9, 9) * 0.8 + 0.1, torch.rand(9, 9) * 0.4 + 0.25))
    exact(*functions, inference=GROUPS.index(group) % 2 == 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x + y, 1 + x, x - y, 1 - x, x * y, 2 * x, x / y, 2 / x, x // y, 2 // x, x % y, 2 % x],
        lambda x, y: [x**y, x**2, 2**x, -x, +x, abs(x), x > y, x < 0.5, x >= y, x <= y, x == y, x != y],
        lambda x, y: [~(x > y), (x > y) & (x < 0.5), True | (x > y), False ^ (x > y), integer(x) << 1, 1 << integer(x)],
        lambda x, y: [integer(x) >> 1, 64 >> integer(x) % 5, 5 & integer(x), integer(x) ^ 3, 7 | integer(x)],
        lambda x, y: (
            [assigned(x, y, kind) for kind in ("+=", "-=", "*=", "/=", "//=", "%=", "**=")]
            + [assigned(integer(x), integer(y) % 3, kind) for kind in ("&=", "|=", "^=", "<<=", ">>=")]
        ),
        lambda x, y: [x.data, x.detach() * x, x.type(torch.float32), x.to(torch.float32).type_as(y), x.half().to(y)],
        lambda x, y: [torch.polygamma(2, x), x.polygamma(1), x.clone().polygamma_(1)],
        lambda x, y: [F.relu(x.clone(), True), F.leaky_relu_(x - 0.5), torch.relu_(x - 0.5), F.elu(x - 0.5, 1.0, True)],
        lambda x, y: [torch.bucketize(x, torch.tensor([0.2, 0.4, 0.8], dtype=x.dtype)), torch.isin(integer(x), 3)],
    ],
)
def test_operators(function):
    exact(function)


def assigned(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """`x` after an assignment."""
    return ASSIGNMENTS[kind](x.clone(), y)


def test_the_list_is_that_of_pytorch():
    """Whatever PyTorch tags as pointwise has a rule, or is named as not taken."""
    tagged = set()
    for name in torch._C._dispatch_get_all_op_names():
        home, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if home == "aten" and torch.Tag.pointwise in getattr(getattr(torch.ops.aten, base), overload or "default").tags:
            tagged.add(base if base.endswith("__") else base.removeprefix("special_").rstrip("_"))
    assert not tagged - set(RULES) - names.NOT_TAKEN
    if torch.__version__.startswith("2.13"):
        assert {n for n in names.TAGGED if n not in tagged} == set()


def test_an_average_of_images_in_a_buffer():
    """A buffer with a value for each position is written to as a whole, once per call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(1, 3, 16, 12, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.average.mul_(0.9).add_(x, alpha=0.1)

    stock, fast = Net(), accelerate(Net(), tile=8)
    for _ in range(3):
        x = torch.rand(1, 3, 16, 12, dtype=torch.float64)
        assert torch.equal(fast(x), stock(x))
        assert torch.equal(fast.average, stock.average)


def test_a_tensor_in_the_dtype_of_a_map():
    """`.to(map)` and `.type_as(map)` read the dtype alone, also where the tensor's own is another."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.observers = nn.Conv2d(2, 4, 3), nn.Parameter(torch.tensor([1.0, 2.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            kernel = (self.observers[:, None] * self.observers).to(x).expand(4, 1, 3, 3)
            x = F.conv2d(x, kernel / 16, groups=4) * torch.arange(4).type_as(x)[:, None, None]
            ramp = torch.arange(x.shape[-1]).type_as(x).repeat(2, 4, x.shape[-2])
            x = x + ramp[..., : x.shape[-2] * x.shape[-1]].view_as(x) * ramp[0, 0, : x.shape[-1]].expand_as(x)
            return (x.to(self.observers) + x.type_as(kernel)).tanh()

    net = Net().double()
    net.observers.data = net.observers.data.float()
    assert_exact(net, image(), tile=(5, 4), limit=1e-6)  # the gradient of `observers` is float32


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(1, 9, (2, 7, 1)), (8, 1, (5,)), (1, 1, (6, 5)), (1, 9, (7, 9))]
)
def test_a_tensor_with_more_rows_or_columns_than_the_map(height, width, shape):
    """A map of one row or column is repeated where the result has more, between ops that read neighbours."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
            self.other = nn.Parameter(torch.rand(shape) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).sigmoid()
            y = torch.hypot(self.other - x, torch.where(self.other > 1, x, self.other) / 2)
            return self.last(y) * y.mean()

    for tile in ((1, 4), (3, 2), (9, 9)):
        assert_exact(Net().double(), image(2, 2, height, width), tile=tile)


def nothing_written(x: Tensor, p: Tensor) -> Tensor:
    y = x * 1
    y[:, :, 5:5] = p
    return y


@pytest.mark.parametrize(
    ("call", "outputs"),
    [
        (lambda x, p: x.clone().logical_and_(p), 2),
        (lambda x, p: x.clone().logical_xor_(p > 0), 2),
        (lambda x, p: x.nanquantile(p.sigmoid(), dim=1, interpolation="midpoint").movedim(0, 1), 1),
        (lambda x, p: torch.linalg.vector_norm(x, 0, dim=1, keepdim=True), 1),
        (lambda x, p: nothing_written(x, p), 2),  # zeros
        (lambda x, p: x.clone().eq_(p), 2),  # zeros
        (lambda x, p: F.pad((x * p)[..., :0], (4, 4)), 2),  # zeros
    ],
)
def test_an_input_that_an_op_has_no_gradient_for(call, outputs):
    """Stock leaves no gradient there, not even one of zeros: neither has the tensor, nor has the image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(outputs, 2, 3)
            self.given = nn.Parameter(torch.full((1,), 0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(call(self.first(x), self.given))

    stock = Net().double()
    fast = accelerate(copy.deepcopy(stock), tile=(5, 4))
    found = []
    for net in (stock, fast):
        x = image(1, 2, 9, 8).requires_grad_()
        net(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert [g is None for g in found[1]] == [g is None for g in found[0]]
    for want, got in zip(*found, strict=True):
        assert want is None or torch.allclose(got, want, rtol=1e-12, atol=1e-12)
