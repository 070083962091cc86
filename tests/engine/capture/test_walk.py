"""engine/capture/walk.py: which code of a network's files a forward can reach, and things there that resist a look."""

import collections
import functools
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.capture import walk as engine_walk
from gigamorph.engine.capture.walk import walk
from gigamorph.engine.errors import UnsupportedError

library = types.ModuleType("a_library_that_is_not_known")
exec(
    """
import random

CALLS, LOG, ENTROPY, SCALE = 0, [], random.SystemRandom(), 1.0
FIRST = SECOND = THIRD = FOURTH = 1.0

class Missing:
    def __getattr__(self, name):
        raise ImportError(f"install what is missing to have {name}")

missing = Missing()

def download(name):
    return missing.fetch(ENTROPY.random(), LOG, CALLS)

def scaled(x):
    return x * SCALE

def scaled_by_three(x):
    return x * SCALE * 3
""",
    vars(library),
)


class Mixin:
    """As networks have it that are published on a hub."""

    def push_to_hub(self, name: str) -> Any:
        return library.download(name)


class Published(Mixin, nn.Module):
    """A convolution, pooling and `last`, beside methods that no forward calls."""

    def __init__(self, last: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last, self.kind = nn.Conv2d(1, 2, 3, stride=2), last, "three"
        self.double()

    def scale_three(self, x: Tensor) -> Tensor:
        return library.scaled_by_three(x)

    @property
    def scale(self) -> float:
        return library.SCALE

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self, self.conv(x).mean((2, 3)))


IMAGE = torch.linspace(0, 1, 21 * 17, dtype=torch.float64).reshape(1, 1, 21, 17)


def test_what_no_forward_reaches_may_be_anything() -> None:
    """Lazy imports that raise at any look, the system's entropy, a log: they once ended the recording."""
    torch.manual_seed(0)
    net = Published(lambda _net, x: x)
    found = walk(net)
    assert not found.generators and not any(f.__name__ == "download" for f in found.functions)
    torch.testing.assert_close(accelerate(net, tile=8)(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)


def test_things_that_raise_at_any_look_are_passed_by() -> None:
    """Also where the forward mentions them."""
    torch.manual_seed(0)
    net = Published(lambda _net, x: x if library.missing is not None else library.ENTROPY.random())
    torch.testing.assert_close(accelerate(net, tile=8)(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)


def test_a_compiled_class_of_classes_is_passed_by() -> None:
    """Cython's has a descriptor where others have the name of their file; transformers leads to one."""

    class Compiled(type):
        pass

    kind = Compiled("kind", (), {"SCALE": 2.0})
    Compiled.__module__ = property(lambda _kind: __name__)  # pyright: ignore[reportAttributeAccessIssue]
    net = Published(lambda _net, x: x * kind.SCALE)
    torch.testing.assert_close(accelerate(net, tile=8)(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)


def test_iterators_of_installed_packages_are_no_networks_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose code is reached by its names alone counts its locks (filelock, from transformers' hub client)."""
    own = types.ModuleType("a_library_that_is_installed")
    exec("import itertools\nTOKENS = itertools.count()\ndef fetch(name):\n    return next(TOKENS)", vars(own))
    monkeypatch.setattr(library, "client", own, raising=False)
    net = Published(lambda net, x: x if net.kind else library.client.fetch(net.kind))
    with pytest.raises(UnsupportedError, match="TOKENS"):
        accelerate(net, tile=8)(IMAGE)
    monkeypatch.setattr(engine_walk, "_distributions", lambda: {own.__name__: ["of-it"]})
    torch.testing.assert_close(accelerate(net, tile=8)(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)


script = types.ModuleType("a_script_with_a_network")
exec(
    """
import sys
import torch
from torch import nn

SIZE = 1.0

class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.head, self.how = nn.Conv2d(1, 2, 3), nn.Linear(2, 2), how

    def forward(self, x):
        y = self.head(self.conv(x.to(next(self.parameters()).dtype)).mean((2, 3)))
        return self.how(y)

def by_its_own_name(y):
    return y * sys.modules[__name__].SIZE

def by_the_file_of_a_class(y):
    return y * sys.modules[Net.__module__].SIZE

def by_a_function(y):
    return y * sys.modules[by_an_import.__module__].SIZE

def by_an_import(y):
    import a_script_with_a_network as own
    return y * own.SIZE

def as_a_global(y):
    return y * SIZE
""",
    vars(script),
)
sys.modules.setdefault(script.__name__, script)


def test_globals_that_are_called_as_attributes_of_the_forward_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a script beside its network: an iterator that is used up, counters, lists that grow."""
    net = script.Net(nn.Identity()).double()
    monkeypatch.setattr(script, "parameters", filter(None, net.parameters()), raising=False)
    fast = accelerate(net, tile=8)
    for number in range(3):
        monkeypatch.setattr(script, "head", number, raising=False)
        monkeypatch.setattr(script, "mean", [0.0] * number, raising=False)
        torch.testing.assert_close(fast(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)
    assert [len(known) for known in fast._programs.kept.values()] == [1]  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("name", [name for name in vars(script) if name.startswith(("by_", "as_"))])
def test_globals_of_the_forwards_file_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = script.Net(vars(script)[name]).double()
    fast = accelerate(net, tile=8)
    for size in (1.0, 2.0):
        monkeypatch.setattr(script, "SIZE", size)
        torch.testing.assert_close(fast(IMAGE), net(IMAGE), rtol=1e-12, atol=1e-12)


def test_numbers_of_the_systems_entropy_are_refused() -> None:
    net = Published(lambda _net, x: x * library.ENTROPY.random())
    with pytest.raises(UnsupportedError, match="system's entropy"):
        accelerate(net, tile=8)(IMAGE)
    assert 0 <= random.SystemRandom().random() < 1


class OfALibrary(nn.TransformerEncoderLayer):
    """PyTorch's own forward calls a method of this class, whose name no code of ours mentions."""

    def __init__(self) -> None:
        super().__init__(2, 1, 4, dropout=0.0, batch_first=True, norm_first=True)

    def _ff_block(self, x: Tensor) -> Tensor:
        return library.scaled(super()._ff_block(x))


class Called:
    def __call__(self, x: Tensor) -> Tensor:
        return library.scaled(x)


def by_a_composed_name(net: Any, x: Tensor) -> Tensor:
    return getattr(net, f"scale_{net.kind}")(x)


def imported_within(net: Any, x: Tensor) -> Tensor:
    import a_library_that_is_not_known  # pyright: ignore[reportMissingImports]

    return x * a_library_that_is_not_known.SCALE


def imported_from(net: Any, x: Tensor) -> Tensor:
    from a_library_that_is_not_known import SCALE  # pyright: ignore[reportMissingImports]

    return x * SCALE


def imported_by_name(net: Any, x: Tensor) -> Tensor:
    return x * sys.modules["a_library_that_is_not_known"].FOURTH


@functools.singledispatch
def by_type(kind: Any, x: Tensor) -> Tensor:
    return x


@by_type.register
def _(kind: nn.Module, x: Tensor) -> Tensor:
    return x * library.FIRST


class Parts:
    def part(self, how: int, x: Tensor) -> Tensor:
        return x * library.SECOND * how

    twice = functools.partialmethod(part, 2)

    @functools.singledispatchmethod
    def by_type(self, kind: Any, x: Tensor) -> Tensor:
        return x

    @by_type.register
    def _of_a_float(self, kind: float, x: Tensor) -> Tensor:
        return x * library.THIRD


def by_a_constant_name(net: Any, x: Tensor) -> Tensor:
    return getattr(net, "scale_three")(x)  # noqa: B009


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return library.scaled(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return library.scaled(grads[0])


REACHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a method": lambda net, x: net.scale_three(x),
    "a property": lambda net, x: x * net.scale,
    "a composed name": by_a_composed_name,
    "a constant name": by_a_constant_name,
    "an operator": lambda net, x: net.called(x),
    "a constructor": lambda net, x: Made(x).value,
    "a constructor under another name": lambda net, x: net.make(x).value,
    "a method that a library calls": lambda net, x: net.layer(x[:, None])[:, 0],
    "an autograd function": lambda net, x: Own.apply(x),
    "an import in the forward": imported_within,
    "a name imported in the forward": imported_from,
    "a file by its name": imported_by_name,
    "a global by its name": lambda net, x: globals()["by_" + "type"](net, x),
    "a partial method": lambda net, x: net.parts.twice(x),
    "a function by type": lambda net, x: by_type(net, x),
    "a method by type": lambda net, x: net.parts.by_type(1.0, x),
}


class Made:
    def __init__(self, x: Tensor) -> None:
        self.value = library.scaled(x)


@pytest.mark.parametrize("name", REACHED)
def test_what_a_forward_reaches_is_noticed(name: str) -> None:
    """However it comes to a method: a number in the file that the method reads is changed between two calls."""
    torch.manual_seed(0)
    net = Published(REACHED[name])
    net.called, net.parts, net.make, net.layer = Called(), Parts(), Made, OfALibrary().double()
    fast, found = accelerate(net, tile=8), collections.defaultdict[str, list[Tensor]](list)
    try:
        for scale in (1.0, 2.0):
            vars(library).update(SCALE=scale, FIRST=scale, SECOND=scale, THIRD=scale, FOURTH=scale)
            found["stock"].append(net(IMAGE).detach())
            found["tiles"].append(fast(IMAGE).detach())
    finally:
        vars(library).update(SCALE=1.0, FIRST=1.0, SECOND=1.0, THIRD=1.0, FOURTH=1.0)
    first, second = found["stock"]
    assert not torch.allclose(first, second)
    for one, other in zip(found["stock"], found["tiles"], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_what_is_imported_by_the_first_forward_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file_of_a_forward.py").write_text("SCALE = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    def last(_net: Any, x: Tensor) -> Tensor:
        import file_of_a_forward  # pyright: ignore[reportMissingImports]

        return x * file_of_a_forward.SCALE

    torch.manual_seed(0)
    fast = accelerate(Published(last), tile=8)
    first = fast(IMAGE)
    monkeypatch.setattr(sys.modules["file_of_a_forward"], "SCALE", 2.0)
    torch.testing.assert_close(fast(IMAGE), 2 * first, rtol=1e-12, atol=1e-12)


sys.modules.setdefault(library.__name__, library)
