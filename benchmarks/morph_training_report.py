"""Report of the training benchmark: means and ranges over seeds, the table in the docs, and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GROWN = ("widened", "deepened")
RIVALS = ("from scratch, same epochs", "from scratch, same time", "from scratch, time of growing alone")
CONTROL = "parent, trained on"

Run = dict[str, Any]


def summary(sets: Sequence[Run]) -> Run:
    """Return the mean final state of each run, and the differences of grown networks to rivals with their range."""
    keys = ("seconds", "epoch", "test_loss", "test_accuracy")
    ends = {
        name: {key: statistics.fmean(s["curves"][name][-1][key] for s in sets) for key in keys}
        for name in sets[0]["curves"]
    }
    gaps: Run = {}
    for name in GROWN:
        for rival in (*(f"{name}, {rival}" for rival in RIVALS), CONTROL):
            for key in ("test_accuracy", "test_loss"):
                values = [s["curves"][name][-1][key] - s["curves"][rival][-1][key] for s in sets]
                range_ = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
                gaps.setdefault(f"{name} - {rival.removeprefix(f'{name}, ')}", {})[key] = range_
    checks = [check for s in sets for check in s["checks"].values()]
    first = {name: statistics.fmean(s["curves"][name][1]["test_loss"] for s in sets) for name in (*GROWN, CONTROL)}
    return {
        "ends": ends,
        "differences": gaps,
        "first_evaluation": first,
        "largest_jump": max(check["jump"] for check in checks),
        "least_share_with_gradient": min(check["share_with_gradient"] for check in checks),
    }


def differences(result: Run) -> list[str]:
    """Return one line per comparison."""
    lines = []
    for name, gap in result["summary"]["differences"].items():
        accuracy, loss = gap["test_accuracy"], gap["test_loss"]
        lines.append(
            f"{name}: accuracy {accuracy['mean']:+.2%} ({accuracy['least']:+.2%} to {accuracy['most']:+.2%}), "
            f"loss {loss['mean']:+.3f} ({loss['least']:+.3f} to {loss['most']:+.3f})"
        )
    return lines


def table(result: Run) -> str:
    """Return the Markdown table in docs/morph.md."""
    found = result["summary"]
    lines = [
        "| | epochs | seconds | test accuracy | test loss | grown network's lead in accuracy, range over seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("parent", CONTROL, *(n for grown in GROWN for n in (grown, *(f"{grown}, {r}" for r in RIVALS)))):
        end = found["ends"][name]
        grown = next((g for g in GROWN if name.startswith(f"{g}, ")), "")
        gap = found["differences"].get(f"{grown} - {name.removeprefix(f'{grown}, ')}", {}).get("test_accuracy")
        lead = f"{gap['mean']:+.1%} ({gap['least']:+.1%} to {gap['most']:+.1%})" if gap else ""
        lines.append(
            f"| {name} | {end['epoch']:.0f} | {end['seconds']:.1f} | {end['test_accuracy']:.1%} | "
            f"{end['test_loss']:.3f} | {lead} |"
        )
    return "\n".join(lines)


def draw(result: Run, path: Path) -> None:
    """Draw test loss against seconds of one core: a panel for the widened and one for the deepened network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "parent": ("#777777", "-"),
        CONTROL: ("#777777", ":"),
        "{}": ("#b03a2e", "-"),
        f"{{}}, {RIVALS[0]}": ("#1f5f99", ":"),
        f"{{}}, {RIVALS[1]}": ("#1f5f99", "-"),
        f"{{}}, {RIVALS[2]}": ("#3d8f5f", "-"),
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, name in zip(panels, GROWN, strict=True):
        for pattern, (colour, style) in looks.items():
            curves = [s["curves"][pattern.format(name)] for s in result["seeds"]]
            for curve in curves:
                x, y = [p["seconds"] for p in curve], [p["test_loss"] for p in curve]
                panel.plot(x, y, style, color=colour, linewidth=0.5, alpha=0.35)
            length = min(len(curve) for curve in curves)
            x, y = (
                [statistics.fmean(curve[i][key] for curve in curves) for i in range(length)]
                for key in ("seconds", "test_loss")
            )
            panel.plot(x, y, style, color=colour, linewidth=1.7, label=pattern.format("").lstrip(", ") or "grown")
        panel.set_yscale("log")
        panel.set_title(name)
        panel.set_xlabel("seconds of one core, the parent's included")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss on the test images")
    panels[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
