"""Generator of the page docs/morph_table.md from the JSON of morph_table.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "morph_table.md"

WHAT = {  # transform -> description
    "widen x2": "`widen(factor=2)`: every space that can grow, Sterbenz split",
    "widen x1.5": "`widen(factor=1.5)`: random channels are copied",
    "random counts": "`widen(counts)`: every channel 1 to 3 times at random, Kraft split",
    "new channels": "`widen(free=...)`: three random channels in the first space that accepts single channels",
    "merge back": "`merge` of the network widened by 1.5: the old size and the old function",
    "identity": "`insert_identity` with a P-activation (SiLU)",
    "identity, BatchNorm": "`insert_identity(norm=True)`: exact in eval mode only",
    "pair": "`insert_pair`, GELU",
    "residual": "`insert_residual`",
    "in sequence": "`decompose`, a 3x3 convolution (or a linear layer) into 1x1 and 3x3, with a P-activation",
    "in parallel": "`split_parallel`",
    "kernel": "`grow_kernel` by a ring of taps, all convolutions of the most common size above 1",
    "grey": "`to_grey` from ImageNet's normalisation",
    "front x2": '`front(r=2, mode="fold")`',
    "front x4": '`front(r=4, mode="stages")`',
}
GROUPS = {
    "Wider, and back": ("widen x2", "widen x1.5", "random counts", "new channels", "merge back"),
    "Deeper": ("identity", "identity, BatchNorm", "pair", "residual", "in sequence", "in parallel"),
    "Kernels, inputs and fronts": ("kernel", "grey", "front x2", "front x4"),
}
OUTPUT = "an output of the network"

Row = dict[str, Any]


def page(result: dict[str, Any]) -> str:
    """Return the whole page; the same JSON gives the same page."""
    networks, source, limits = result["networks"], result["provenance"], result["limits"]
    commits = Counter(row["commit"][:12] for network in networks for row in network["transforms"].values())
    reasons = _reasons(networks)
    parts = [_head(result), _summary(networks)]
    parts += [_group(title, names, networks, reasons) for title, names in GROUPS.items()]
    parts += [_refusals(reasons), _frozen(networks)]
    parts.append(
        f"Rows by commit: {', '.join(f'{commit} {rows}' for commit, rows in commits.most_common())}. The last rows "
        f"were measured on {source['date'][:10]} with torch {source['torch']}, {source['cpu']}, one thread for each "
        f"network. Limits: float64 {limits['float64']:.0e}, float32 "
        f"{limits['ratio']:g} times the noise.\n"
    )
    return "\n".join(parts)


def _head(result: dict[str, Any]) -> str:
    counts, networks = result["counts"], result["networks"]
    return f"""# Every morph on real networks

Written by `python benchmarks/morph_table.py --write` from `benchmarks/results/morph_table.json`; do not edit.

**{len(networks)} networks, {sum(counts.values())} rows: {counts["exact"]} exact, {counts["refused"]} refused, \
{counts["wrong"]} wrong, {counts["none"]} with nothing to do.**

The networks have random weights and statistics, none of them zero. After the engine's own checks, the benchmark
measures each child against its parent with independent code on other images: in eval mode, in train mode with dropout
off, and in eval mode with the running statistics after train mode. A cell shows the largest relative float64 error, and
the float32 error as a multiple of the parent's own float32 rounding noise. `0` is bit equality, `-` means that the
transform does not apply, and a number in brackets refers to a refusal below. A P-activation, a pair or a block follows
the middle convolution of the forward in every network. The images have the first size at which each map of a
convolution has at least 3 x 3 pixels and each BatchNorm gets at least 18 values per channel. With two values, as at
1 x 1 pixels, train mode would magnify rounding without bound.
"""


def _summary(networks: list[Row]) -> str:
    lines = [
        "## By transform\n",
        "| transform | | exact | refused | wrong | float64, eval | float64, train | float32 / noise | certificate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, what in WHAT.items():
        rows = [n["transforms"][name] for n in networks if name in n["transforms"]]
        measured = [row for row in rows if "float64_eval" in row]
        verdicts = [row["verdict"] for row in rows]
        cells = [name, what, *(str(verdicts.count(v)) for v in ("exact", "refused", "wrong"))]
        if measured:
            train = [row for row in measured if row["promises_train"]]
            cells.append(_number(max(row["float64_eval"] for row in measured)))
            cells.append(_number(max(row["float64_train"] for row in train)) if train else "not promised")
            cells.append(f"{max(_worst(row, 'ratio') for row in measured):.1f}")
        cells += [""] * (8 - len(cells))
        sums = [row["certificate"] for row in measured if row["certificate"]]
        cells.append(f"{sum(s[1] for s in sums):,} of {sum(s[0] for s in sums):,} off" if sums else "")
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _group(title: str, names: Iterable[str], networks: list[Row], reasons: dict[str, list[str]]) -> str:
    names = list(names)
    numbers = {reason: number for number, reason in enumerate(reasons, 1)}
    lines = [f"## {title}\n", _line(["network", "input", *names]), "|---" * (2 + len(names)) + "|"]
    for network in networks:
        size = "x".join(str(n) for n in network.get("input", []))
        cells = [_cell(network["transforms"].get(name), numbers) for name in names]
        lines.append(_line([network["network"], size, *cells]))
    return "\n".join([*lines, ""])


def _cell(row: Row | None, numbers: dict[str, int]) -> str:
    if row is None:
        return ""
    if row["verdict"] == "none":
        return "-"
    if "float64_eval" not in row:
        word = "refused" if row["verdict"] == "refused" else "**WRONG**"
        return f"{word} [{numbers[row['reason']]}]"
    float64, ratio = _worst(row, "float64"), _worst(row, "ratio")
    text = "0" if float64 == ratio == 0 else f"{_number(float64)}, {ratio:.1f}"
    return text if row["verdict"] == "exact" else f"**WRONG** {text}"


def _worst(row: Row, kind: str) -> float:
    """Return the largest value over the modes in which the morph is exact."""
    return max(row[f"{kind}_eval"], row[f"{kind}_train"]) if row["promises_train"] else row[f"{kind}_eval"]


def _reasons(networks: list[Row]) -> dict[str, list[str]]:
    """Return reason -> network and transform, in the order of the tables."""
    found: dict[str, list[str]] = {}
    for names in GROUPS.values():
        for network in networks:
            for name in names:
                row = network["transforms"].get(name, {})
                if row.get("verdict") != "none" and "reason" in row:
                    found.setdefault(row["reason"], []).append(f"{network['network']}: {name}")
    for network in networks:  # a process that died has only the row "all"
        reason = network["transforms"].get("all", {}).get("reason")
        if reason:
            found.setdefault(reason, []).append(f"{network['network']}: all")
    return found


def _refusals(reasons: dict[str, list[str]]) -> str:
    lines = ["## Refusals\n", "Nothing was changed.\n"]
    for number, (reason, sources) in enumerate(reasons.items(), 1):
        lines.append(f"{number}. {_escape(reason)} ({'; '.join(sources)})")
    return "\n".join([*lines, ""])


def _frozen(networks: list[Row]) -> str:
    lines = ["## What cannot be widened\n", "Spaces and channels other than the network's outputs, with the reason.\n"]
    lines += ["| network | can grow | cannot | why |", "|---|---|---|---|"]
    for network in networks:
        spaces = network.get("spaces", {})
        if "frozen" not in spaces:
            if "reason" in spaces:
                lines.append(_line([network["network"], "0", "all", _escape(spaces["reason"])]))
            continue
        frozen = [space for space in spaces["frozen"] if OUTPUT not in space["reason"]]
        grows = spaces["total"] - len(spaces["frozen"])
        groups: dict[str, list[Row]] = {}
        for space in frozen:
            groups.setdefault(_normalised(space["reason"]), []).append(space)
        if not groups:
            lines.append(_line([network["network"], _spaces(grows), "", ""]))
        for number, members in enumerate(groups.values()):
            first = [network["network"], _spaces(grows)] if number == 0 else ["", ""]
            channels = sum(space["width"] for space in members)
            reason = _escape(members[0]["reason"]) + (", and similar ones" if len(members) > 1 else "")
            lines.append(_line([*first, f"{_spaces(len(members))}, {channels:,} channels", reason]))
    return "\n".join([*lines, ""])


def _normalised(reason: str) -> str:
    """Return the reason without its module and numbers."""
    return re.sub(r"\d+|in module '[^']*'", "", reason)


def _spaces(number: int) -> str:
    return f"{number} space{'s' * (number != 1)}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """Escape plain text for a Markdown table."""
    return text.translate(str.maketrans({"|": "\\|", "<": "&lt;", "*": "\\*", "_": "\\_"}))
