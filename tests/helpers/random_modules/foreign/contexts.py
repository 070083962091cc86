"""Contexts of PyTorch and of the author, exceptions, threads, and operations that take functions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import logging
import queue
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .base import VALUES, Foreign
from .harness import watch

PACKED: list[Any] = []
STARTED: list[str] = []
watch("packed tensors", sys.modules[__name__], "PACKED")
watch("started contexts", sys.modules[__name__], "STARTED")


class SavedTensorHooks(Foreign):
    """Hooks on the tensors that are saved for the backward."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def disabled(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not in this part"):
            return self.second(y).tanh()

    def identity(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return self.second(y).tanh()

    def altered(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t):
            return y.exp().tanh()

    def recorded(self, y: Tensor) -> Tensor:
        def pack(t: Tensor) -> Tensor:
            PACKED.append(t.dim())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return y * self.second(y).tanh()

    def rounded(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.float(), lambda t: t.double()):
            return y.tanh()

    def on_cpu(self, y: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.second(y).tanh()


class FunctionalOperations(Foreign):
    """Operations that take functions, and gradients inside of the forward."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def cond_on_value(self, y: Tensor) -> Tensor:
        return torch.cond(y.mean() > 0, lambda t: t.relu(), lambda t: t.tanh(), (y,))

    def cond_on_shape(self, y: Tensor) -> Tensor:
        return torch.cond(y.shape[-1] > 10, lambda t: t * 2, lambda t: t.sin(), (y,))

    def while_loop(self, y: Tensor) -> Tensor:
        from torch._higher_order_ops import while_loop

        count = torch.zeros((), dtype=torch.long)
        with torch.no_grad():
            factor = y.detach().abs().mean() + 1
            _, factor = while_loop(lambda n, _f: n < 3, lambda n, f: (n + 1, f * 0.5), (count, factor))
        return y * factor

    def vmap(self, y: Tensor) -> Tensor:
        return torch.vmap(lambda t: t - t.mean())(y)

    def vmap_over_channels(self, y: Tensor) -> Tensor:
        return torch.vmap(torch.tanh, in_dims=1, out_dims=1)(y)

    def gradient_inside(self, y: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return y
        with torch.enable_grad():
            z = y.detach().requires_grad_()
            (found,) = torch.autograd.grad(z.pow(3).sum(), z)
        return y + 0.1 * found

    def gradient_of_gradient(self, y: Tensor) -> Tensor:
        if not y.requires_grad:
            return y
        (found,) = torch.autograd.grad(y.square().sum(), y, create_graph=True)
        return y + 0.1 * found

    def func_grad(self, y: Tensor) -> Tensor:
        return y + torch.func.grad(lambda t: t.sin().sum())(y)

    def functional_call(self, y: Tensor) -> Tensor:
        state = {name: value * 0.5 for name, value in self.second.named_parameters()}
        return torch.func.functional_call(self.second, state, (y,))

    def jvp(self, y: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (y,), (torch.ones_like(y),))[1]


class _Scope:
    """A context manager, as a class."""

    def __init__(self, owner: nn.Module, swallows: bool = False):
        self.owner, self.swallows = owner, swallows

    def __enter__(self) -> float:
        self.owner.depth += 1
        return 0.5 * self.owner.depth

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.owner.depth -= 1
        self.owner.left.append(kind.__name__ if kind else "")
        return self.swallows


@contextlib.contextmanager
def _started(name: str) -> Iterator[int]:
    STARTED.append(name)
    try:
        yield len(STARTED)
    finally:
        STARTED.append(f"end of {name}")


class _Decorates(contextlib.ContextDecorator):
    def __enter__(self) -> None:
        STARTED.append("decorated")

    def __exit__(self, *args: Any) -> None:
        return None


@_Decorates()
def _decorated(x: Tensor) -> Tensor:
    return x.relu()


class OwnContext(Foreign):
    """Context managers of the author."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.depth, self.left, self.scope = 1, [], None
        self.verbose = False

    def of_class(self, y: Tensor) -> Tensor:
        with _Scope(self) as factor:
            return y * factor

    def nested(self, y: Tensor) -> Tensor:
        with _Scope(self) as first, _Scope(self) as second:
            return y * first + second

    def swallows(self, y: Tensor) -> Tensor:
        with _Scope(self, swallows=True):
            y = y.relu()
            raise ValueError("not reported")
        return y * 2

    def generator(self, y: Tensor) -> Tensor:
        with _started("part") as count:
            return y * (1 + 0.1 * count)

    def decorator(self, y: Tensor) -> Tensor:
        return _decorated(y)

    def optional(self, y: Tensor) -> Tensor:
        with _started("verbose") if self.verbose else contextlib.nullcontext():
            return y.tanh()

    def kept(self, y: Tensor) -> Tensor:
        self.scope = self.scope or _Scope(self)
        with self.scope as factor:
            return y * factor

    def exit_stack(self, y: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            factors = [stack.enter_context(_Scope(self)) for _ in range(3)]
            stack.callback(self.left.append, "callback")
            return y * sum(factors)

    def change(self, net: nn.Module, number: int) -> None:
        self.verbose, self.depth = number == 1, number + 1


class _WithTensor(Exception):
    def __init__(self, tensor: Tensor):
        super().__init__("early exit")
        self.tensor = tensor


class Exceptions(Foreign):
    """Exceptions that are raised and caught."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.log, self.option = [], {"scale": VALUES[0]}

    def _raises(self, y: Tensor) -> Tensor:
        raise _WithTensor(y.relu())

    def carries_a_tensor(self, y: Tensor) -> Tensor:
        try:
            return self._raises(y)
        except _WithTensor as error:
            self.log.append(str(error))
            return error.tensor

    def all_clauses(self, y: Tensor) -> Tensor:
        try:
            scale = self.option["scale"]
        except KeyError:
            self.log.append("except")
            scale = 0.25
        else:
            self.log.append("else")
        finally:
            self.log.append("finally")
        return y * scale

    def attribute_missing(self, y: Tensor) -> Tensor:
        try:
            return self.second(y)
        except AttributeError:
            return y.relu()

    def assertion(self, y: Tensor) -> Tensor:
        assert y.shape[1] == self.conv.out_channels, "channels"
        return y.relu()

    def shape_error(self, y: Tensor) -> Tensor:
        try:
            return y + torch.ones(7, 5, 3, 2, 1, dtype=y.dtype)
        except RuntimeError:
            return y.relu()

    def reraised(self, y: Tensor) -> Tensor:
        try:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error
        except ValueError as error:
            self.log.append(type(error.__cause__).__name__)
        return y.relu()

    def returns_in_finally(self, y: Tensor) -> Tensor:
        try:
            y = y.relu()
        finally:
            self.log.append(len(self.log))
        return y

    def stops(self, y: Tensor) -> Tensor:
        values = iter((1.0, 2.0))
        try:
            while True:
                y = y * next(values)
        except StopIteration:
            return y

    def change(self, net: nn.Module, number: int) -> None:
        self.option = {} if number == 1 else {"scale": 3.0}


_LOCAL = threading.local()


class Threads(Foreign):
    """Work in other threads, and in an event loop."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.found = nn.Conv2d(width, width, 3, padding=1), []

    def tensor_in_thread(self, y: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(self.second(y)))
        thread.start()
        thread.join()
        return found[0] + y

    def number_in_thread(self, y: Tensor) -> Tensor:
        found: list[int] = []
        thread = threading.Thread(target=found.append, args=(y.shape[1],))
        thread.start()
        thread.join()
        return y * found[0]

    def pool(self, y: Tensor) -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda call: call(y), (torch.tanh, torch.relu))
        return first - second

    def side_effect(self, y: Tensor) -> Tensor:
        thread = threading.Thread(target=self.found.append, args=(len(self.found),))
        thread.start()
        thread.join()
        return y.relu()

    def local_storage(self, y: Tensor) -> Tensor:
        _LOCAL.factor = y.shape[1]
        return y * getattr(_LOCAL, "factor", 1)

    def lock(self, y: Tensor) -> Tensor:
        with threading.Lock():
            return self.second(y)

    def queue(self, y: Tensor) -> Tensor:
        waiting: queue.Queue[Tensor] = queue.Queue()
        waiting.put(y.relu())
        waiting.put(y)
        return waiting.get() + waiting.get() * waiting.qsize()

    def name_of_thread(self, y: Tensor) -> Tensor:
        return y.relu() if threading.current_thread() is threading.main_thread() else y.tanh()

    def event_loop(self, y: Tensor) -> Tensor:
        async def part(scale: float) -> Tensor:
            await asyncio.sleep(0)
            return y * scale

        async def both() -> list[Tensor]:
            return await asyncio.gather(part(1.0), part(0.5))

        return sum(asyncio.run(both()))


class GradientModes(Foreign):
    """Parts without gradients."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.frozen = True

    def part(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.second(y)
        return y + z

    @torch.no_grad()
    def _decorated(self, y: Tensor) -> Tensor:
        return self.second(y).sigmoid()

    def decorated(self, y: Tensor) -> Tensor:
        return y * self._decorated(y)

    def nested(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.second(y)
            with torch.enable_grad():
                z = z + y.tanh()
        return z

    def by_flag(self, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            z = self.second(y)
        return y + z

    def decorated_in_place(self, y: Tensor) -> Tensor:
        return y + torch.no_grad()(self.second)(y)

    def read_inside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            off = not torch.is_grad_enabled()
        return y.relu() if off and not torch.is_inference_mode_enabled() else y.tanh()

    def change(self, net: nn.Module, number: int) -> None:
        self.frozen = number == 2


class Autocast(Foreign):
    """Autocast inside of the forward. It leaves float64 as it is, so that a part is computed in float32."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.on = nn.Linear(width, width), True

    def _gated(self, y: Tensor) -> Tensor:
        gate = F.linear(y.mean((2, 3)).float(), self.second.weight.float())
        return y * (2.0 if gate.dtype is torch.bfloat16 else 3.0) + (gate > 0)[:, :, None, None]

    def bfloat16(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._gated(y)

    def switched(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self._gated(y)

    def off_inside(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            return self._gated(y)

    def decorated(self, y: Tensor) -> Tensor:
        return torch.autocast("cpu", torch.bfloat16)(self._gated)(y)

    def for_another_device(self, y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autocast("cuda", enabled=False):
                return self._gated(y)

    def asked(self, y: Tensor) -> Tensor:
        return y.relu() if torch.is_autocast_enabled("cpu") else y.tanh()

    def change(self, net: nn.Module, number: int) -> None:
        self.on = number == 2


class Checkpoints(Foreign):
    """Parts that are computed again in the backward."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(width))
        self.calls, self.use, self.reentrant = 0, True, dice.random() < 0.3

    def module(self, y: Tensor) -> Tensor:
        return checkpoint(self.second, y, use_reentrant=self.reentrant)

    def closure(self, y: Tensor) -> Tensor:
        scale = y.mean((2, 3), keepdim=True)
        return checkpoint(lambda t: self.second[:2](t) * scale, y, use_reentrant=False)

    def counted(self, y: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            self.calls += 1
            return self.second[0](t).tanh()

        return checkpoint(part, y, use_reentrant=False)

    def sequential(self, y: Tensor) -> Tensor:
        return checkpoint_sequential(self.second, 2, y, use_reentrant=False)

    def optional(self, y: Tensor) -> Tensor:
        if self.use and self.training:
            return checkpoint(self.second, y, use_reentrant=False)
        return self.second(y)

    def partial(self, y: Tensor) -> Tensor:
        call = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return call(self.second[0], y)

    def change(self, net: nn.Module, number: int) -> None:
        self.use = number == 2


class Profiling(Foreign):
    """Contexts that only measure or set something of PyTorch."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def record_function(self, y: Tensor) -> Tensor:
        with torch.profiler.record_function("part"):
            return self.second(y)

    def detect_anomaly(self, y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.set_detect_anomaly(True):
                return self.second(y).tanh()

    def backend_flags(self, y: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return self.second(y)

    def default_type(self, y: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return self.second(y) + torch.ones(1)
        finally:
            torch.set_default_dtype(torch.float32)

    def default_type_read(self, y: Tensor) -> Tensor:
        return y.relu() if torch.get_default_dtype() is torch.float32 else y.tanh()

    def seed_forked(self, y: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return y + torch.rand(1, dtype=y.dtype)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


HANDLER = _Lines()
_LOGGER = logging.getLogger("gigamorph.foreign.output")
_LOGGER.addHandler(HANDLER)
_LOGGER.propagate = False
watch("logged lines", HANDLER, "lines")


class Reports(Foreign):
    """Log lines, warnings and printed text."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.lines: list[Any] = []

    def logged(self, y: Tensor) -> Tensor:
        _LOGGER.warning("shape %s", tuple(y.shape))
        return y.relu()

    def logged_mean(self, y: Tensor) -> Tensor:
        _LOGGER.error("mean %.2e", y.detach().mean().item() * 0 + 1)
        return y.relu()

    def printed(self, y: Tensor) -> Tensor:
        text = io.StringIO()
        print("channels", y.shape[1], file=text)
        self.lines.append(text.getvalue())
        return y.relu()

    def redirected(self, y: Tensor) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            print(f"map of {y.dim()} dimensions")
        self.lines.append(text.getvalue())
        return y * len(text.getvalue())

    def warned(self, y: Tensor) -> Tensor:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warnings.warn("a part is untrained", stacklevel=1)
        self.lines.append([str(one.message) for one in found])
        return y.relu()

    def printed_tensor(self, y: Tensor) -> Tensor:
        self.lines.append(str(y.detach().mean() * 0))
        return y.relu()
