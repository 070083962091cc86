"""The memory of a network's steps, measured in this process, and what was predicted of it."""

import gc
import json

import torch
from torch import nn

from gigamorph import accelerate, plan
from gigamorph.engine.models import create_model
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, return_free_pages, used_bytes


def measure(name: str, mode: str, budget: int) -> None:
    """Prints bytes: the peak of two steps, or of a prediction, on a square of a megapixel, and that of the plan."""
    torch.set_num_threads(1)
    accelerate(create_model("lesionnet", in_channels=1).eval(), tile=32)(torch.rand(1, 1, 64, 64)).sum().backward()
    net = create_model(f"timm:{name}", in_channels=3, num_classes=1000).train(mode == "live")
    image = torch.rand(1, 3, 1024, 1024)
    fast = accelerate(net, memory_budget=budget)
    gc.collect()
    return_free_pages()
    before = used_bytes()
    reset_peak()
    with torch.set_grad_enabled(mode != "inference"):
        for _ in range(1 if mode == "inference" else 2):
            net.zero_grad()
            result = fast(image).sum()
            if mode != "inference":
                result.backward()
    measured = peak_bytes() - before + own_bytes(net)
    print(json.dumps([measured, plan(net, image.shape, budget, training=mode != "inference").peak_bytes]))


def own_bytes(net: nn.Module) -> int:
    """Bytes of parameters and buffers, those that the state_dict leaves out among them."""
    return sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
