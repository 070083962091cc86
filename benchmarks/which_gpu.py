"""Which GPU a step fits on: writes docs/which-gpu.md from plans, which need no GPU.

python benchmarks/which_gpu.py --json benchmarks/results/which_gpu.json   # resumes
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from gigamorph.engine.accelerate import freeze_batch_norm
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.files import write_json
from gigamorph.engine.models import create_model
from gigamorph.engine.planning.constants import FREE_SHARE
from gigamorph.engine.planning.preview import searching
from gigamorph.engine.planning.request import Request

_OF_TIMM = [*(f"efficientnet_b{number}" for number in range(8)), "convnext_tiny", "convnext_small"]
NETWORKS = ("resnet18", "resnet50", *(f"timm:{name}" for name in _OF_TIMM), "unet")
SIZES = ((2294, 1914), (3328, 2560), (4096, 3328), (8192, 8192), (16384, 16384), (32768, 32768))
MODES = {"live": "Training, norms in training mode", "frozen": "Training, frozen norms", "inference": "Prediction"}
CARDS = (16, 24, 40, 80, 141)  # GiB
MOST_WORK = 3
_HEAD = """# Which GPU

Written by `python benchmarks/which_gpu.py` (commit {commit:.8}, torch {torch}); do not edit. These are plans, not
measurements.

Each cell is the smallest of five GPUs (16, 24, 40, 80 and 141 GiB) for a step with one grey image, in bf16 autocast,
with all maps on the GPU and at most {work} times the work of stock PyTorch (stated if over 1.05). A step may use
{share} of it: the CUDA context and an optimizer's state need the rest. In parentheses: the smallest GPU for stock's
tensors, frozen norms folded, without checkpoints of blocks, which an expert would add on a smaller GPU.

Other networks, sizes and batches: `gigamorph plan --model NAME --size 4096x3328 --device cuda:24GiB`, and with
`--largest size` or `--largest batch`."""
PAGE = Path(__file__).parents[1] / "docs" / "which-gpu.md"


def plans_of(name: str, mode: str, size: tuple[int, int]) -> dict[str, Any]:
    """The peak and work of the plan for each card, and the tensors of stock PyTorch, also with folded norms."""
    began, row = time.process_time(), {"network": name, "mode": mode, "size": size, "cards": {}}
    net = create_model(name, 2, 1).train(mode == "live")
    if mode == "frozen":
        freeze_batch_norm(net.train())
    shape, request = (1, 1, *size), Request(None, None, mode != "inference")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with searching(net, shape, request, device="cuda") as search:
            row["stock_bytes"] = search.stock_bytes
            if mode == "frozen":
                row["folded_bytes"] = search.folded_bytes
            for card in CARDS:
                if made := search.plan_or_none(int(FREE_SHARE * card * 2**30)):
                    row["cards"][str(card)] = {"work": made.work, "peak_bytes": made.peak_bytes, "maps": made.maps}
                    if made.work <= 1.01 and made.maps == "device":
                        break  # larger cards take the same plan
    except GigamorphError as error:
        row["error"] = str(error)
    return row | {"seconds": time.process_time() - began}


def cell(row: dict[str, Any]) -> str:
    """The smallest card of our step, and of stock PyTorch's."""
    if "stock_bytes" not in row:
        return "refused"
    there = {card: one["work"] for card, one in row["cards"].items() if one["maps"] == "device"}
    ours = next((card for card, work in there.items() if work <= MOST_WORK), "none")
    ours += f", work {there[ours]:.2g}" if there.get(ours, 0) > 1.05 else ""
    least = min(row["stock_bytes"], row.get("folded_bytes", row["stock_bytes"]))
    stock = next((f"{card}" for card in CARDS if least <= FREE_SHARE * card * 2**30), "none")
    return f"{ours} ({stock})"


def page(found: dict[str, Any]) -> str:
    """The page; the same JSON gives the same page."""
    lines = [_HEAD.format(work=MOST_WORK, share=f"{FREE_SHARE:.0%}", **found["provenance"])]
    rows = {(row["network"], row["mode"], *row["size"]): row for row in found["rows"]}
    for mode, title in MODES.items():
        head = " | ".join(f"{height} x {width}" for height, width in SIZES)
        lines += ["", f"## {title}", "", f"| network | {head} |", "|---" * 7 + "|"]
        for name in NETWORKS:
            cells = [cell(rows[name, mode, *size]) if (name, mode, *size) in rows else "" for size in SIZES]
            lines += [f"| {name.removeprefix('timm:')} | {' | '.join(cells)} |"] if any(cells) else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    found = json.loads(given.json.read_text()) if given.json.exists() else {"provenance": provenance(), "rows": []}
    there = {(row["network"], row["mode"], *row["size"]) for row in found["rows"]}
    for size, name, mode in itertools.product(SIZES, NETWORKS, MODES):
        if (name, mode, *size) in there:
            continue
        found["rows"].append(plans_of(name, mode, size))
        print(found["rows"][-1], flush=True)
        write_json(given.json, found, "plans")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
