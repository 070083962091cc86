"""Writes the page docs/coverage.md from the JSON of coverage.py."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
CLASSES = {
    "a": "nothing but the last pooling looks at the whole image",
    "b": "statistics of the whole image inside: squeeze-and-excite, group norm, response norm, linear attention",
    "c": "attention over all positions, in windows, or another mixing of positions somewhere",
    "fixed": "takes images of one size alone",
}
MODES = {"eval": "frozen", "live": "live"}  # names on the page
VERDICTS = {
    "exact": "computed tile by tile, and the same as stock PyTorch",
    "taken whole": 'the same, with `fallback="untiled"`: an op in the middle takes a whole map',
    "refused": "an error that names the module and the line",
    "unclear": "it differs by no more than four times what stock PyTorch itself does when it rounds otherwise, which "
    "is more than 1e-9, so that an error could hide in it",
    "wrong": "anything else",
}

LONG = 10  # times stock's step: slower rows are named on the page

Row = dict[str, Any]


def page(result: dict[str, Any]) -> str:
    """Return the page; the same JSON gives the same page."""
    rows = result["networks"]
    return "\n".join([_head(result), _counts(rows), _reading(result), _networks(rows), _remarks(rows)])


def _head(result: dict[str, Any]) -> str:
    wrong = sum(row["verdict"] == "wrong" for row in result["networks"])
    names = {row["network"] for row in result["networks"]}
    tiles = " or ".join(str(tile) for tile in sorted({row["tile"] for row in result["networks"] if "tile" in row}))
    return f"""# Which networks are exact

Written by `python benchmarks/coverage.py --markdown` from `benchmarks/results/coverage_census.json`; do not edit.

{len(names)} networks (timm {result["timm"]}, torchvision {result["torchvision"]}, and small U-Nets and a feature
pyramid of our own), unmodified, in tiles of {tiles} pixels: outputs, the gradient of every parameter and of the image,
and every buffer after one training step, against stock PyTorch {result["torch"]} on the CPU. Wrong: {wrong}.
{_commits(result["networks"])}
"""


def _commits(rows: list[Row]) -> str:
    """Name the commits of the rows."""
    counted = Counter(row["commit"] for row in rows).most_common()
    if len(counted) == 1:
        return f"All {len(rows)} rows are of commit {counted[0][0]}."
    return "Rows by commit: " + ", ".join(f"{number} of {commit}" for commit, number in counted) + "."


def _counts(rows: list[Row]) -> str:
    lines = ["| class | norms | networks | " + " | ".join(VERDICTS) + " |", "|---|---|---|" + "---|" * len(VERDICTS)]
    groups = [
        *(([kind], mode) for kind, mode in itertools.product(CLASSES, MODES)),
        *((list(CLASSES), mode) for mode in MODES),
    ]
    for kinds, mode in groups:
        own = [row["verdict"] for row in rows if row["class"] in kinds and row["mode"] == mode]
        name = kinds[0] if len(kinds) == 1 else "all"
        found = [str(own.count(verdict)) for verdict in VERDICTS]
        lines.append(f"| {name} | {MODES[mode]} | {len(own)} | " + " | ".join(found) + " |")
    by = {(row["network"], row["mode"]) for row in rows}
    names = dict.fromkeys(row["network"] for row in rows)
    for mode, name in MODES.items():
        missing = ", ".join(network for network in names if (network, mode) not in by)
        lines += ["", f"No verdict yet with {name} norms: {missing}."] if missing else []
    return "\n".join(lines) + "\n"


def _reading(result: dict[str, Any]) -> str:
    kinds = "\n".join(f"- **{name}**: {what}." for name, what in CLASSES.items())
    verdicts = "\n".join(f"- **{name}**: {what}." for name, what in VERDICTS.items())
    return f"""## How to read it

Classes:

{kinds}

Norms are frozen (the network in evaluation mode, one image) or live (every module in training mode, four images).
Weights are random, and so are the running statistics of frozen norms.

Verdicts:

{verdicts}

*Error* is the largest relative error of any output, gradient or buffer in float64, of a network that casts to float32
itself with these casts made float64. The limit is {result["limit"]:.0e}. Where it is passed, stock PyTorch's own
rounding decides: its step is repeated with the result of every operation changed in the last bit at random, with maps
in another memory order, and with its live BatchNorm written out; a tensor may differ by four times what that moves it,
and never by more than 1e-9.

PyTorch's BatchNorm on the CPU computes wrong gradients for some memory orders of a single image
(`engine/capture/corrected.py`). Where that happens in stock's step, it is stock that is given contiguous tensors, so
that it is right; the remark says so. Where stock's rounding is beyond 1e-9 with random statistics, those of a batch
are tried.

*float32* is the error of the outputs in float32, measured against float64, as a multiple of stock PyTorch's own.
Below 1 the tiles are nearer to the truth than stock is. {_gradients(result["networks"])}

*time* is a training step's CPU time in float64, as a multiple of stock PyTorch's: the best of some in turns, after
the recording. {_slowest(result["networks"])} Images are small here and tiles smaller, so that seams are many and the
halos as large as the tiles; what a step takes at real sizes is in `docs/benchmarks.md`.
"""


def slowdown(row: Row) -> float | None:
    """Return a tiled step's time as a multiple of stock's; None for a row without times."""
    return row["steps"]["tiled"] / row["steps"]["stock"] if row.get("steps") else None


def _slowest(rows: list[Row]) -> str:
    timed = [(ratio, row) for row in rows if (ratio := slowdown(row)) is not None]
    if not timed:
        return "None was timed."
    slowest, row = max(timed, key=lambda pair: pair[0])
    median = statistics.median(ratio for ratio, _ in timed)
    long = [f"{row['network']} {ratio:.1f} ({MODES[row['mode']]})" for ratio, row in timed if ratio >= LONG]
    return f"""Median {median:.1f}; the longest, {slowest:.1f}, is {row["network"]}'s
with {MODES[row["mode"]]} norms.""" + (f"\nTen times and more: {', '.join(long)}." if long else "")


def _gradients(rows: list[Row]) -> str:
    ratios = [row["float32"]["gradients"] for row in rows if "float32" in row]
    above, below = sum(ratio > 3 for ratio in ratios), sum(ratio < 1 / 3 for ratio in ratios)
    return f"""That of the gradients is {statistics.median(ratios):.2f} in the median of
{len(ratios)} rows, above 3 in {above} and below 1/3 in {below}: it is of one step each, where a single ReLU or maximum
that rounding turns over, in stock or in the tiles, outweighs all else."""


def _numbered(rows: list[Row]) -> dict[str, int]:
    """Number the remarks in the order of their first occurrence, by text."""
    found = dict.fromkeys(text for row in rows for text in _texts(row))
    return {text: number for number, text in enumerate(found, 1)}


def _texts(row: Row) -> list[str]:
    """Return the remarks on a row, in wording that rows share."""
    texts = [row.get("message", ""), *row.get("notes", "").split("; ")]
    if "statistics" in row:
        texts.append(f"running statistics {row['statistics']}")
    if "dropout off" in row:
        texts.append("dropout is switched off on both sides: of whole maps it is drawn tile by tile")
    beyond = row["verdict"] in ("unclear", "wrong")
    return [_shared(text, beyond) for text in texts if text and not text.startswith("it differs by")]


def _shared(text: str, beyond: bool) -> str:
    text = re.sub(r'; or [a-z ]+: accelerate\(\.\.\., fallback="\w+"\)$', "", text)
    text = re.sub(r" \(\w+\.py:\d+\)| \(it differs by .*\)", "", text)
    if beyond:
        return text
    return re.sub(r"^[0-9.]+ times stock's own noise, which is .*", "within four times stock's own rounding", text)


def _cells(row: Row | None, numbers: dict[str, int]) -> str:
    if row is None:
        return "not measured | | |"
    error = f"{row['error']:.0e}" if "error" in row else ""
    single = f"{row['float32']['outputs']:.2f}" if "float32" in row else ""
    remarks = ", ".join(f"[{numbers[text]}](#remarks)" for text in _texts(row))
    ratio = slowdown(row)
    time = f"{ratio:.1f}" if ratio is not None else ""
    verdict = "**wrong**" if row["verdict"] == "wrong" else row["verdict"]
    return f"{verdict} {remarks}".strip() + f" | {error} | {single} | {time}"


def _networks(rows: list[Row]) -> str:
    numbers = _numbered(rows)
    by = {(row["network"], row["mode"]): row for row in rows}
    lines = [
        "## Networks",
        "",
        "| network | class | size | frozen | error | float32 | time | live | error | float32 | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        both = [by.get((name, mode)) for mode in MODES]
        any_row = next(row for row in both if row is not None)
        size = next((" x ".join(map(str, row["size"])) for row in both if row is not None and "size" in row), "")
        cells = " | ".join(_cells(row, numbers) for row in both)
        lines.append(f"| {name} | {any_row['class']} | {size} | {cells} |")
    return "\n".join(lines) + "\n"


def _remarks(rows: list[Row]) -> str:
    return "\n".join(["## Remarks", "", *(f"{number}. {text}" for text, number in _numbered(rows).items())]) + "\n"
