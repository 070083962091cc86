"""Writes the page docs/coverage.md from the JSON of coverage.py."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
DYNAMO = Path(__file__).parent / "results" / "coverage_census_dynamo.json"
CLASSES = {
    "a": "only the last pooling reads the whole image",
    "b": "inner layers use statistics of the image: squeeze-and-excite, group norm, response norm, linear attention",
    "c": "some layer mixes positions: attention over all positions or in windows, or another form",
    "fixed": "accepts images of one size only",
}
MODES = {"eval": "frozen", "live": "live"}  # names on the page
VERDICTS = {
    "exact": "computed tile by tile, and equal to stock PyTorch",
    "taken whole": 'equal, but only with `fallback="untiled"`: an op in the middle needs an untiled map',
    "refused": "not computed; the error names the module and the line",
    "unclear": "the difference is at most four times that between two roundings of stock PyTorch; as that is more "
    "than 1e-9, it could hide an error",
    "wrong": "any other result",
}

LONG = 10  # times stock's step: slower rows are named on the page

Row = dict[str, Any]


def page(result: dict[str, Any]) -> str:
    """Return the page; the same JSON gives the same page."""
    rows = result["networks"]
    text = "\n".join([_head(result), _counts(rows), _reading(result), _networks(rows), _remarks(rows)])
    # The files of results have older words.
    return text.replace("taken whole", "untiled map").replace('fallback="whole"', 'fallback="untiled"')


def _head(result: dict[str, Any]) -> str:
    wrong = sum(row["verdict"] == "wrong" for row in result["networks"])
    again = json.loads(DYNAMO.read_text())["counts"]
    names = {row["network"] for row in result["networks"]}
    tiles = " or ".join(str(tile) for tile in sorted({row["tile"] for row in result["networks"] if "tile" in row}))
    return f"""# Which networks are exact

Written by `python benchmarks/coverage.py --markdown` from `benchmarks/results/coverage_census.json`; do not edit.

{len(names)} networks (timm {result["timm"]}, torchvision {result["torchvision"]}, and small U-Nets and a feature
pyramid of our own), unmodified, in tiles of {tiles} pixels. Outputs, gradients of all parameters and of the image, and
buffers after one training step are compared with stock PyTorch {result["torch"]} on the CPU. Wrong: {wrong}.
{_commits(result["networks"])}

TorchDynamo has replaced the recorder of these tables. All networks were compared again (`{DYNAMO.name}`):
{again["eval"]["exact"]} are exact by tiles with frozen norms, {again["live"]["exact"]} in training mode; none was lost.
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

*Error* is the largest relative error of any output, gradient or buffer in float64. If a network casts to float32
itself, these casts are replaced by casts to float64. The limit is {result["limit"]:.0e}. Above it, stock PyTorch's
own rounding decides: stock's step is repeated with a random change in the last bit of every result, with maps in
another memory order, and with BatchNorm in training mode written out. A tensor may then differ by four times the
change that this causes, but never by more than 1e-9.

For some memory orders of a single image, PyTorch's BatchNorm computes wrong gradients on the CPU
(`engine/capture/gradient_fixes.py`). If that happens in stock's step, stock gets contiguous tensors, which is correct;
a remark reports this. If stock's rounding exceeds 1e-9 with random statistics, the statistics of a batch are used.

*float32* is the error of the outputs in float32, measured against float64, as a multiple of stock PyTorch's own.
Below 1, the tiles are more accurate than stock. {_gradients(result["networks"])}

*time* is the CPU time of a training step in float64, after the recording, as a multiple of stock PyTorch's: the
minimum of several interleaved steps. {_slowest(result["networks"])} Images are small here and tiles even
smaller, so that halos are as large as tiles; `docs/results.md` contains times for real sizes.
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
    return f"""The median is {median:.1f}; the maximum is {slowest:.1f}, for
{row["network"]} with {MODES[row["mode"]]} norms.""" + (f"\nTen times and more: {', '.join(long)}." if long else "")


def _gradients(rows: list[Row]) -> str:
    ratios = [row["float32"]["gradients"] for row in rows if "float32" in row]
    above, below = sum(ratio > 3 for ratio in ratios), sum(ratio < 1 / 3 for ratio in ratios)
    return f"""The corresponding error of the gradients has a median of
{statistics.median(ratios):.2f} over {len(ratios)} rows; it is above 3 in {above} and below 1/3 in {below}. Each row is
a single step, and one ReLU or maximum whose choice rounding changes, in stock or in the tiles, dominates the error."""


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
        texts.append("dropout is off in both, because it is drawn tile by tile")
    beyond = row["verdict"] in ("unclear", "wrong")
    return [_shared(text, beyond) for text in texts if text and not text.startswith("it differs by")]


def _shared(text: str, beyond: bool) -> str:
    text = re.sub("; or (have the map whole|(run|compute) it untiled): accelerate.*", "", text)
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
