"""A ViT-S/16 on the tiles of an image under gated attention: `tilewise` beside ordinary code, memory and time.

    all        one graph of all tiles
    two passes embeddings without a graph, the head, then batch by batch again with the gradient of the embeddings
    tilewise   ours

Each runs in a process of its own: memory is the highest resident set of a step over what was there before it.

    python benchmarks/tilewise.py [--tiles 10 20] [--batch 8] [--json benchmarks/results/tilewise_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gigamorph import tilewise
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.models.compat import make_torchvision_importable

SIZE = 224
WAYS = ("all", "two passes", "tilewise")


class Gated(nn.Module):
    """Gated attention over instances (Ilse et al., 2018)."""

    def __init__(self, width: int):
        super().__init__()
        self.v, self.u, self.w = nn.Linear(width, 128), nn.Linear(width, 128), nn.Linear(128, 1)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.w(self.v(x).tanh() * self.u(x).sigmoid()).softmax(0) * x).sum(0))


def one(way: str, rows: int, cols: int, batch: int) -> dict[str, float]:
    """Memory in MiB, seconds and CPU seconds of a step, and the norm of the gradient."""
    make_torchvision_importable()
    import timm

    torch.manual_seed(0)
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0)
    head, image = Gated(384), torch.randn(1, 3, rows * SIZE, cols * SIZE)
    tiles = image.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)[0].permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)
    encoder(tiles[:1]).sum().backward()  # what is made once
    encoder.zero_grad(set_to_none=False)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    if way == "all":
        head(torch.cat([encoder(part) for part in tiles.split(batch)])).square().sum().backward()
    elif way == "two passes":
        with torch.no_grad():
            found = torch.cat([encoder(part) for part in tiles.split(batch)])
        found.requires_grad_()
        head(found).square().sum().backward()
        assert found.grad is not None
        for part, grad in zip(tiles.split(batch), found.grad.split(batch), strict=True):
            encoder(part).backward(grad)
    else:
        net = tilewise(encoder, SIZE, batch_size=batch)
        head(net(image).flatten(2)[0].T).square().sum().backward()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    norm = torch.stack([p.grad.double().norm() for p in encoder.parameters() if p.grad is not None]).norm().item()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"MiB": (after.ru_maxrss - before.ru_maxrss) / 1024, "seconds": seconds, "cpu": cpu, "gradient": norm}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=int, nargs=2, default=(10, 20), help="rows and columns of tiles")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one(options.way, options.tiles[0], options.tiles[1], options.batch)))
        return 0
    rows = {}
    for way in WAYS:
        command = [sys.executable, str(Path(__file__)), "--way", way, "--batch", str(options.batch), "--tiles"]
        done = subprocess.run([*command, *map(str, options.tiles)], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{way:10} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        found = rows[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:10}", "  ".join(f"{name} {value:10.4g}" for name, value in found.items()), flush=True)
    if options.json:
        what = {"what": "benchmarks/tilewise.py", "tiles": options.tiles, "batch": options.batch, "ways": rows}
        options.json.write_text(json.dumps(what | {"provenance": provenance()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
