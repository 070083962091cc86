"""The self-check: a small image through copies of the network, tile by tile and in ordinary PyTorch, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import GigamorphError

# Tried in this order, for networks that take no odd or no small sizes. Three tiles each way.
_SIZES = ((97, 75), (128, 96), (224, 224))
_IMAGES = 2
_LIMIT = 1e-10
_NOISE = 100  # a difference may be this many times what a last-bit change of the image makes
_FLOOR = 1e-3  # of the largest tensor of a kind: smaller ones are measured against that


@dataclass(frozen=True)
class _Step:
    """What a step leaves: outputs, gradients and buffers by name."""

    tensors: dict[str, dict[str, Tensor]]


class CannotVerify(GigamorphError):
    """The network cannot be copied, or ordinary PyTorch does not run it on any of the small images."""


def verify(
    network: nn.Module, accelerated: Callable[[nn.Module, tuple[int, int]], nn.Module], channels: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Compare outputs, gradients and buffers of a small image; nothing of the network or of random generators changes.

    Layers of element-wise dropout are left out: they draw others in other tiles. Hooks run, on the copies.

    Args:
        network: the network in the mode that is to be checked.
        accelerated: makes the accelerated form of a copy, for a tile.
        channels: of the image.

    Raises:
        CannotVerify: if it cannot be copied, or ordinary PyTorch fails on the small images.
        GigamorphError: naming the tensor that differs most.
        UnsupportedError: if the network is refused.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        image, expected = _first_that_runs(_twin(network), channels, device)
        tile = tuple(-(-side // 3) for side in image.shape[2:])
        last_bits = 1 + torch.finfo(image.dtype).eps * torch.randn_like(image)
        noise = _distance(expected, _step(_twin(network), image * last_bits))
        got = _distance(expected, _step(accelerated(_twin(network), tile), image))  # pyright: ignore[reportArgumentType]
        worst = max(got, key=lambda name: got[name] / max(_LIMIT, _NOISE * noise[name]))
        if got[worst] <= max(_LIMIT, _NOISE * noise[worst]):
            return
        other = _distance(expected, _step(_twin(network), image, seed=1))
    if max(other.values()) > _LIMIT:
        raise GigamorphError(
            "verify: the network draws random numbers for each pixel, so no two runs agree; check it in eval() mode"
        )
    raise GigamorphError(
        f"verify: {worst} differs by {got[worst]:.1e} from ordinary PyTorch (image {tuple(image.shape)}, tile "
        f"{tile[0]} x {tile[1]}); do not use the accelerated network, and report this"
    )


def _twin(network: nn.Module) -> nn.Module:
    """A copy in float64, without dropout by position."""
    try:
        twin = copy.deepcopy(network).double()
    except RuntimeError as error:
        raise CannotVerify(
            f"verify: the network cannot be copied ({str(error).splitlines()[0]}); leave verify=True away"
        ) from error
    for module in twin.modules():
        if isinstance(module, nn.Dropout | nn.AlphaDropout):
            module.eval()
    return twin


def _first_that_runs(twin: nn.Module, channels: int, device: torch.device) -> tuple[Tensor, _Step]:
    """A small image, and what ordinary PyTorch makes of it."""
    failure: Exception | None = None
    before = copy.deepcopy(twin.state_dict())
    for height, width in _SIZES:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(_IMAGES, channels, height, width, dtype=torch.float64, generator=generator).to(device)
        try:
            return image, _step(twin, image)
        except Exception as error:  # whatever a network says of sizes that it does not take
            failure = error
            twin.load_state_dict(before)
    raise CannotVerify(
        f"verify: the network does not run on small images in float64 ({str(failure).splitlines()[0]}); "
        "leave verify=True away"
    )


def _step(network: nn.Module, image: Tensor, seed: int = 0) -> _Step:
    torch.manual_seed(seed)
    leaf = image.clone().requires_grad_()
    outputs = [t for t in tree_leaves(network(leaf)) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (t * torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device)).sum()
        for t in outputs
        if t.requires_grad
    )
    wanted = {"the image": leaf, **{n: p for n, p in network.named_parameters() if p.requires_grad}}
    grads = [None] * len(wanted)
    if isinstance(loss, Tensor):
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    buffers = {f"buffer '{n}'": b.detach().clone() for n, b in network.named_buffers()}
    pairs = zip(wanted.items(), grads, strict=True)
    gradients = {f"gradient of '{n}'": torch.zeros_like(t) if g is None else g for (n, t), g in pairs}
    torch.manual_seed(seed)
    with torch.no_grad():
        inferred = [t for t in tree_leaves(network(image)) if isinstance(t, Tensor)]
    results = {f"output {n}": t.detach() for n, t in enumerate(outputs)}
    results |= {f"output {n} without gradients": t for n, t in enumerate(inferred)}
    return _Step({"output": results, "gradient": gradients, "buffer": buffers})


def _distance(expected: _Step, got: _Step) -> dict[str, float]:
    """Relative errors by name; infinite where shapes, or the places of what is not finite, differ."""
    found: dict[str, float] = {}
    for kind, tensors in expected.tensors.items():
        others = got.tensors[kind]
        if tensors.keys() != others.keys():
            return {f"the number of {kind}s": float("inf")}
        largest = max((_plain(t).norm().item() for t in tensors.values()), default=0.0)
        for name, want in tensors.items():
            have = others[name]
            if have.shape != want.shape or not torch.equal(have.isfinite(), want.isfinite()):
                found[name] = float("inf")
                continue
            scale = max(_plain(want).norm().item(), _FLOOR * largest)
            distance = (_plain(have) - _plain(want)).norm().item()
            found[name] = distance / scale if scale else distance
    return found


def _plain(t: Tensor) -> Tensor:
    return t.double().nan_to_num(posinf=0, neginf=0)
