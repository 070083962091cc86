"""A ViT-S/16 on the tiles of an image under gated attention: `tilewise` beside ordinary code, memory and time.

    all        one graph of all tiles
    two passes embeddings without a graph, the head, then batch by batch again with the gradient of the embeddings
    tilewise   ours

Each runs in a process of its own: memory is the highest resident set of a step over what was there before it. Gradients
of all parameters, the encoder's and the head's, are compared value by value with those of "two passes": of each
parameter the largest difference over its largest value, or over a thousandth of the largest of all, and the worst of
these. In float64 two ways are enough (`--ways`): one graph of all tiles takes 25 GB there.

    python benchmarks/tilewise.py [--tiles 10 20] [--batch 8] [--json benchmarks/results/tilewise_cpu.json]
    python benchmarks/tilewise.py --dtype float64 --ways "two passes" tilewise --json FILE
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gigamorph import tilewise
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.models.compat import make_torchvision_importable

SIZE = 224
WAYS = ("all", "two passes", "tilewise")
ORDINARY = "two passes"
FLOOR = 1e-3  # of the largest value of all, what a parameter's own largest one counts for at least


class Gated(nn.Module):
    """Gated attention over instances (Ilse et al., 2018)."""

    def __init__(self, width: int):
        super().__init__()
        self.v, self.u, self.w = nn.Linear(width, 128), nn.Linear(width, 128), nn.Linear(128, 1)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.w(self.v(x).tanh() * self.u(x).sigmoid()).softmax(0) * x).sum(0))


def one(way: str, rows: int, cols: int, batch: int, dtype: torch.dtype, path: Path) -> dict[str, float]:
    """Memory in MiB, seconds and CPU seconds of a step; its gradients go to a file."""
    make_torchvision_importable()
    import timm

    torch.manual_seed(0)
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0).to(dtype)
    head, image = Gated(384).to(dtype), torch.randn(1, 3, rows * SIZE, cols * SIZE, dtype=dtype)
    tiles = image.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)[0].permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)
    encoder(tiles[:1]).sum().backward()  # what is made once
    encoder.zero_grad(set_to_none=False)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    if way == "all":
        head(torch.cat([encoder(part) for part in tiles.split(batch)])).square().sum().backward()
    elif way == ORDINARY:
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
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    torch.save({name: p.grad for net in (encoder, head) for name, p in net.named_parameters()}, path)
    return {"MiB": (after.ru_maxrss - before.ru_maxrss) / 1024, "seconds": seconds, "cpu": cpu}


def difference(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> float:
    """The worst parameter's, as the top of this file says."""
    assert wanted.keys() == given.keys()
    least = FLOOR * max(float(t.abs().max()) for t in wanted.values())
    return max(float((given[n] - t).abs().max()) / max(float(t.abs().max()), least) for n, t in wanted.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=int, nargs=2, default=(10, 20), help="rows and columns of tiles")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help="run the one way in this process; its gradients go to this file")
    options = parser.parse_args()
    if options.alone:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(one(options.ways[0], *options.tiles, options.batch, dtype, options.alone)))
        return 0
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {way: Path(folder) / f"{way}.pt" for way in options.ways}
        for way, path in paths.items():
            command = [sys.executable, str(Path(__file__)), "--ways", way, "--alone", str(path)]
            command += ["--dtype", options.dtype, "--batch", str(options.batch), "--tiles", *map(str, options.tiles)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{way:10} failed: {done.stderr.strip().splitlines()[-1:]}")
                continue
            found = rows[way] = json.loads(done.stdout.splitlines()[-1])
            print(f"{way:10}", "  ".join(f"{name} {value:10.4g}" for name, value in found.items()), flush=True)
        for way in rows.keys() - {ORDINARY} if ORDINARY in rows else ():
            rows[way]["gradients"] = difference(torch.load(paths[ORDINARY]), torch.load(paths[way]))
            print(f"{way:10} gradients differ from those of {ORDINARY!r} by {rows[way]['gradients']:.1e}")
    if options.json:
        what = {"what": "benchmarks/tilewise.py", "tiles": options.tiles, "batch": options.batch}
        what |= {"dtype": options.dtype, "ways": rows, "provenance": provenance()}
        options.json.write_text(json.dumps(what, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
