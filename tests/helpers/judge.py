"""The judgement on one random module: accelerated, it does what stock PyTorch does, or it is refused.

After every visit all that can be seen is compared: outputs and their types, gradients and where there are none,
inputs, buffers, parameters, attributes, modes, what was left outside of the network, random generators, the process.
Tensors may differ by 1e-10, or by a hundred times what a change of the image's last bits makes in stock.
"""

from __future__ import annotations

import re
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from random_modules import Spec, changes, state
from random_modules.play import Player, Seen
from random_modules.spec import smaller
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import GigamorphError, accelerate

LIMIT = 1e-10
NOISE = 100
FLOOR = 1e-3
ROUGH = 1e-7  # a network whose own noise is larger says nothing
FALLBACK: str | None = None  # of the networks that are judged
KINDS = ("exact", "refused", "unclear", "wrong", "traceback", "lenient", "stock fails")
BAD = ("wrong", "traceback", "unclear")

Make = Callable[[nn.Module, tuple[int, int]], nn.Module]
_PLACE = re.compile(r"module '|the model|the network|the image|image|input|argument|output|attribute|line \d|\.py:\d")


@dataclass(frozen=True)
class Verdict:
    """The judgement, one of `KINDS`, and why: what differs, or the message, and at which visit.

    A refusal whose message names no place or no remedy is "unclear"; a run where stock fails is "lenient". What cannot
    be judged, because stock fails as well or its numbers say nothing, is "stock fails".
    """

    kind: str
    reason: str = ""
    visit: int = -1
    details: str = ""

    @property
    def group(self) -> str:
        """The reason without numbers, for counting."""
        return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", f"{self.kind}: {self.reason}")[:160]


@dataclass
class _Run:
    """What was seen at each visit, and the exception that ended it."""

    seen: list[Seen]
    error: BaseException | None = None
    phase: str = ""


def tiled(net: nn.Module, tile: tuple[int, int]) -> nn.Module:
    """The engine."""
    return accelerate(net, tile=tile, fallback=FALLBACK)


def _reset() -> None:
    state.reset()
    changes.reset()


def _play(spec: Spec, net: nn.Module, bits: int = 0) -> _Run:
    """All visits, up to an exception."""
    _reset()
    player, seen = Player(spec, net, bits), []
    try:
        for number in range(len(spec.visits)):
            player.change(number)
            seen.append(player.visit(number))
    except Exception as error:
        return _Run(seen, error, player.phase)
    return _Run(seen)


def play_stock(spec: Spec) -> None:
    """The scenario with stock PyTorch, whatever comes of it."""
    _play(spec, spec.build())


def judge(spec: Spec, make: Make = tiled) -> Verdict:
    """Run the scenario with stock PyTorch and with the accelerated network, and compare.

    Args:
        spec: of the network and of what is done to it.
        make: what is judged.
    """
    stock = _play(spec, spec.build())
    if stock.error is not None and stock.phase == "change":
        spec = replace(spec, visits=spec.visits[: len(stock.seen)])
    if any(not t.isfinite().all() for seen in stock.seen for t in _floats(seen)):
        return Verdict("stock fails", "stock's numbers are not finite")
    try:
        return _compare(spec, stock, make)
    finally:
        _reset()


def _floats(seen: Seen) -> list[Tensor]:
    kinds = [tensors for kind, tensors in seen.tensors.items() if kind in ("gradient", "buffer") or "output" in kind]
    return [t for tensors in kinds for t in tensors.values() if t.is_floating_point()]


def _compare(spec: Spec, stock: _Run, make: Make) -> Verdict:
    _reset()
    try:
        player = Player(spec, make(spec.build(), spec.tile))
    except GigamorphError as error:
        return _refused(str(error), -1, "when accelerated: ")
    refusal, judged, states = "", _Noise(spec, stock), list[Seen]()
    for number in range(len(spec.visits)):
        fails = number >= len(stock.seen)
        try:
            player.change(number)
            player.before_call = lambda: states.__setitem__(slice(None), [_state(player)])
            try:
                seen = player.visit(number)
            except GigamorphError as error:
                if fails:
                    return Verdict("stock fails", _told(error), number)
                if player.phase != "forward":
                    return _refused(str(error), number, f"late, in the {player.phase}: ")
                changed = _unequal(states[0], _state(player))
                if changed:
                    return Verdict("wrong", f"after the refusal: {changed}", number, str(error))
                if player.call:  # stock has not made the earlier calls of this visit
                    return _refused(str(error), number)
                refusal = refusal or str(error)
                player.before_call = None
                if "forward" in vars(player.net):  # set on the accelerated network, of which stock knows nothing
                    return _refused(refusal, number)
                player.net = player.network
                seen = player.visit(number)
                if number == 0:
                    changed = _unequal(stock.seen[0], seen)
                    if changed:
                        return Verdict("wrong", f"stock after the refusal: {changed}", number, str(error))
        except Exception as error:
            if fails:
                return Verdict("stock fails", _told(error), number)
            if isinstance(error, GigamorphError):
                return _refused(str(error), number, f"in the {player.phase}: ")
            after = "after a refusal: " if refusal else ""
            return Verdict(
                "traceback",
                f"{after}{player.phase}: {_told(error)}",
                number,
                "".join(traceback.format_exception(error)),
            )
        if fails:
            return Verdict("lenient", f"stock says {_told(stock.error)}", number)
        differs = judged.differences(number, seen)
        if differs:
            after = "after a refusal: " if refusal else ""
            return Verdict("wrong", after + differs[0], number, "\n".join(differs[:12]))
        if judged.rough:
            return Verdict("stock fails", "stock's own noise is too large", number)
    return _refused(refusal, number) if refusal else Verdict("exact")


def _refused(message: str, number: int, when: str = "") -> Verdict:
    clear = "\n" not in message and _PLACE.search(message) and len(message.rpartition(";")[0]) > 0
    return Verdict("refused" if clear else "unclear", when + message, number)


def _told(error: BaseException | None) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _state(player: Player) -> Seen:
    from random_modules.play import look

    return look(player.network, frozenset())


def _unequal(a: Seen, b: Seen) -> str:
    """The first thing that differs, in any bit."""
    for name in {**a.facts, **b.facts}:
        if a.facts.get(name) != b.facts.get(name):
            return f"{name} is {b.facts.get(name)} instead of {a.facts.get(name)}"
    for kind, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            if not torch.equal(tensor.nan_to_num(), b.tensors[kind][name].nan_to_num()):
                return f"{kind} {name} is changed"
    return ""


class _Noise:
    """Compares with stock's run; how much rounding may explain is measured when it is first asked for."""

    def __init__(self, spec: Spec, stock: _Run):
        self.spec, self.truth = spec, stock.seen
        self.noise: list[dict[str, float]] | None = None
        self.plain: list[Seen] | None = None
        self.rough = False

    def differences(self, number: int, seen: Seen) -> list[str]:
        """What differs from stock, the worst first."""
        want = self.truth[number]
        facts = [
            f"{name}: {seen.facts.get(name, 'missing')} instead of {want.facts.get(name, 'missing')}"
            for name in {**want.facts, **seen.facts}
            if seen.facts.get(name, "missing") != want.facts.get(name, "missing")
        ]
        if facts:
            return facts
        errors = distances(want, seen)
        if max(errors.values(), default=0.0) <= LIMIT:
            return []
        if self.noise is None:
            restore = state.saved()
            self._measure()
            restore()
        assert self.noise is not None
        if self.plain is not None and number < len(self.plain):
            # Either may be seen: stock itself runs on after a refusal, with its errors.
            corrected = distances(self.plain[number], seen)
            errors = {name: min(error, corrected.get(name, error)) for name, error in errors.items()}
        noise = self.noise[number]
        bad = {n: e for n, e in errors.items() if e > max(LIMIT, NOISE * noise.get(n, 0.0))}
        if bad and max(noise.values(), default=0.0) > ROUGH:
            self.rough = True
            return []
        return [f"{n}: differs by {e:.1e}" for n, e in sorted(bad.items(), key=lambda item: -item[1])]

    def _measure(self) -> None:
        # Some of stock's own gradients are wrong where a norm gets them in another order in memory.
        with plain_order():
            plain = _play(self.spec, self.spec.build()).seen
        moved = max((max(distances(a, b).values()) for a, b in zip(self.truth, plain, strict=False)), default=0.0)
        if moved > 1e-7:
            self.plain = plain
        truth = self.plain or self.truth
        self.noise = [defaultdict(float) for _ in self.truth]
        # By the bits of the image, and by those of sums: where one is zero but for rounding (a norm of a constant, the
        # mean of what has been centred), its sign is rounding's, and a ReLU or a comparison behind it passes on that.
        variants = ((1, nullcontext()), (2, nullcontext()), (0, RoundedSums(1.0)), (0, RoundedSums(-1.0)))
        for bits, rounding in variants:
            with rounding, plain_order() if self.plain else nullcontext():
                seen = _play(self.spec, self.spec.build(), bits).seen
            for noise, want, got in zip(self.noise, truth, seen, strict=False):
                for name, error in distances(want, got).items():
                    noise[name] = max(noise[name], error)


def distances(want: Seen, got: Seen) -> dict[str, float]:
    """Relative errors by name; infinite where shapes, or the places of what is not finite, differ."""
    found: dict[str, float] = {}
    for kind, tensors in want.tensors.items():
        others = got.tensors.get(kind, {})
        norms = {name: _plain(t).norm().item() for name, t in tensors.items()}
        largest = max(norms.values(), default=0.0)
        for name, tensor in tensors.items():
            other, full = others.get(name), f"{kind} {name}".strip()
            if other is not None and torch.equal(tensor, other):
                found[full] = 0.0
                continue
            if other is None or other.shape != tensor.shape or not torch.equal(other.isfinite(), tensor.isfinite()):
                found[full] = float("inf")
                continue
            distance = (_plain(other) - _plain(tensor)).norm().item()
            scale = max(norms[name], FLOOR * largest)
            found[full] = distance / scale if scale else distance
    return found


def _plain(t: Tensor) -> Tensor:
    return t.double().nan_to_num(posinf=0, neginf=0)


def size_of_mean(x: Tensor, count: float) -> Tensor:
    """By how much a mean of so many elements may be off that is summed in one go."""
    return 4 * count**0.5 * torch.finfo(x.dtype).eps * x.detach().abs().amax()


# Where the backward of a norm has 1 / deviation and weight among its arguments.
_BACKWARD = {"aten::native_batch_norm_backward": (6, 2), "aten::native_group_norm_backward": (3, 4)}


class RoundedSums(TorchDispatchMode):
    """Means, sums and norms are off by a few last bits of what went into them, in a direction of each channel's own.

    Convolutions are off by the last bit of each value, in a direction of its own: places with equal patches, as in a
    flat image, are equal maxima only if the same loop computes them.

    Args:
        sign: 1.0 or -1.0; the two errors are opposite, so that one of them moves any zero over a kink.
    """

    sees_tiles = True

    def __init__(self, sign: float):
        super().__init__()
        self.sign, self.dice = sign, torch.Generator().manual_seed(3)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::convolution":
            bits = torch.randint(0, 2, result.shape, generator=self.dice, dtype=torch.int8).mul_(2).sub_(1)
            result.add_(self.sign * bits * torch.finfo(result.dtype).eps * result.detach())
        norms = ("aten::native_batch_norm", "aten::native_group_norm")
        if name.removesuffix("_backward") in norms or name in ("aten::mean", "aten::sum"):
            first = result[0] if isinstance(result, tuple) else result
            source = args[0] if name in ("aten::mean", "aten::sum") else first
            if first is not None and first.is_floating_point() and source.numel():
                channels = first.shape[1] if first is source else first.shape[-1] if first.dim() else 1
                signs = torch.randint(0, 2, (channels,), generator=self.dice, dtype=torch.float64) * 2 - 1
                if first is source:
                    signs = signs.reshape(-1, *[1] * (first.dim() - 2))
                size = 4 * torch.finfo(first.dtype).eps * source.detach().abs().amax()
                deviation, weight = (None, None) if name not in _BACKWARD else (args[n] for n in _BACKWARD[name])
                if deviation is not None and deviation.numel():  # what goes in is stretched, and may cancel then
                    stretch = deviation.abs().amax() * (1 if weight is None else weight.detach().abs().amax())
                    size = torch.maximum(size, 4 * torch.finfo(first.dtype).eps * args[0].abs().amax() * stretch)
                if name in norms and result[2].numel():
                    # A mean is off by what its sum has rounded, and so is what the norm subtracts and then stretches.
                    pixels = args[0].numel() / max(1, channels)
                    size = torch.maximum(size, size_of_mean(args[0], pixels) * result[2].detach().abs().amax())
                first.add_((self.sign * signs * size).to(first.dtype).reshape(signs.shape if first.dim() else ()))
        return result


def plain_order() -> AbstractContextManager[Any]:
    """Norms get maps and gradients in the plain order: PyTorch's own on the CPU misread some others."""

    def in_order(original: Any) -> Any:
        def norm(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(x.contiguous(), *args, **kwargs)
            if result.requires_grad:
                result.register_hook(lambda grad: grad.contiguous())
            return result

        return norm

    names = ("batch_norm", "instance_norm", "group_norm")
    return mock.patch.multiple(F, **{name: in_order(getattr(F, name)) for name in names})


def shrink(spec: Spec, verdict: Verdict, make: Make = tiled, tries: int = 150) -> tuple[Spec, Verdict]:
    """A smaller spec with a bad verdict of the same kind."""
    again = True
    while again and tries > 0:
        again = False
        for candidate in smaller(spec):
            tries -= 1
            if tries <= 0:
                break
            try:
                found = judge(candidate, make)
            except Exception:
                continue
            if found.kind == verdict.kind and _same(found, verdict):
                spec, verdict, again = candidate, found, True
                break
    return spec, verdict


def _same(a: Verdict, b: Verdict) -> bool:
    """Whether two verdicts are likely of one cause: of the same kind of thing, with the same exception."""
    if a.kind in ("traceback", "unclear"):
        return a.group[:60] == b.group[:60]
    kind = re.compile(r"^(after a refusal: |after the refusal: )?(\w+( \w+)?)")
    one, other = kind.match(a.reason), kind.match(b.reason)
    missing = ("NoneType" in a.reason) == ("NoneType" in b.reason)
    return bool(one and other and one.group(2) == other.group(2) and missing)
