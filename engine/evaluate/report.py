"""An evaluation as files: ``metrics.json``, plots, and one page of HTML that holds them all."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from . import plots
from .cases import Cases

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid #ccc}
h3{font-size:1.05em;margin-bottom:.3em}table{border-collapse:collapse;margin:.5em 0}
th,td{padding:.15em 1.2em .15em 0;text-align:right;border-bottom:1px solid #eee;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{font-weight:600;border-bottom-color:#999}
img{max-width:100%}.note{color:#666;font-size:.92em}
"""
_NAMES = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "positive_predictive_value": "positive predictive value",
    "negative_predictive_value": "negative predictive value",
    "called": "share called",
}


def write_report(out: str | Path, images: Cases, found: dict[str, Any]) -> Path:
    """Write ``metrics.json``, the plots as PNG and ``report.html`` into `out`; returns the page's path.

    Args:
        images: what was evaluated.
        found: what `evaluate` returned of it, with whatever was added.

    Raises:
        GigamorphError: if a file cannot be written.
    """
    out = Path(out)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_atomically(out / "metrics.json", lambda p: p.write_text(text), "metrics")
    pictures = _pictures(images, found)
    for name, data in pictures.items():
        write_atomically(out / f"{name}.png", lambda p, data=data: p.write_bytes(data), "plot")
    page = _page(found, pictures)
    write_atomically(out / "report.html", lambda p: p.write_text(page, encoding="utf-8"), "report")
    return out / "report.html"


def headline(found: dict[str, Any]) -> list[str]:
    """A line for each level and output: the area with its interval over patients."""
    lines = []
    for level, one in found["levels"].items():
        for name, output in one["outputs"].items():
            of = f"{level} level, {name}: " if len(one["outputs"]) > 1 else f"{level} level: "
            if "undefined" in output:
                lines.append(of + output["undefined"])
            else:
                counts = f"{output['rows']} {level}s, {output['positives']} positive, {one['patients']} patients"
                lines.append(f"{of}AUC {_value(output['auc'])}, {counts}")
        if "mean_auc" in one:
            lines.append(f"{level} level: mean AUC {_value(one['mean_auc'])}")
        for name, pair in _pairs(one):
            p = pair.get("undefined") or (pair.get("why") if pair["p"] is None else f"p {_p(pair['p'])} (DeLong)")
            areas = "" if "undefined" in pair else f"AUC {pair['first']:.3f} and {pair['second']:.3f}, "
            lines.append(f"{level} level, {name}, compared: {areas}{p}")
    if "mean_sensitivity" in found.get("froc", {}):
        lines.append(f"FROC: mean sensitivity {_value(found['froc']['mean_sensitivity'])} per lesion")
    return lines


def _pictures(images: Cases, found: dict[str, Any]) -> dict[str, bytes]:
    pictures = {}
    for level, one in found["levels"].items():
        cases = images.at(level).labelled()
        pictures[f"{level}_curves"] = plots.curves_figure(cases, one["outputs"], found["seed"])
        if any("calibration" in output for output in one["outputs"].values()):
            pictures[f"{level}_calibration"] = plots.calibration_figure(one["outputs"])
        for by, outputs in one.get("subgroups", {}).items():
            for name, part in outputs.items():
                if any(row.get("auc") for row in part["rows"]):
                    pictures[_subgroup_picture(level, by, name)] = plots.subgroups_figure(part["rows"], by)
    if "curve" in found.get("froc", {}):
        pictures["froc"] = plots.froc_figure(found["froc"])
    return {name: plots.png(figure) for name, figure in pictures.items()}


def _subgroup_picture(level: str, by: str, output: str) -> str:
    words = "".join(c if c.isalnum() else "_" for c in f"{by}_{output}")
    return f"{level}_by_{words}"


def _page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    parts = ["<h1>Evaluation</h1>", *_overview(found)]
    for level, one in found["levels"].items():
        parts += _level(level, one, pictures)
    if "froc" in found:
        parts += _froc(found["froc"], pictures)
    parts += _methods(found)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>gigamorph evaluation</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _overview(found: dict[str, Any]) -> list[str]:
    rows = []
    for level, one in found["levels"].items():
        for name, output in one["outputs"].items():
            row = [f"{level}, {name}", output["rows"], one["patients"], output["positives"]]
            if "undefined" in output:
                rows.append([*row, output["undefined"], "", ""])
            else:
                delong = _interval(output["auc"]["delong"])
                rows.append([*row, _value(output["auc"]), delong, _value(output["average_precision"])])
        if "mean_auc" in one:
            left_out = one["mean_auc"].get("left_out")
            note = f" without {', '.join(left_out)}" if left_out else ""
            rows.append([f"{level}, mean{note}", one["rows"], one["patients"], "", _value(one["mean_auc"]), "", ""])
    header = ["level, output", "rows", "patients", "positive", "AUC", "DeLong's interval", "average precision"]
    parts = [_table(header, rows)]
    for level, one in found["levels"].items():
        parts.append(f'<p class="note">{html.escape(level)} level: {html.escape(one["rule"])}.</p>')
    pairs = []
    for level, one in found["levels"].items():
        for name, pair in _pairs(one):
            if "undefined" in pair:
                pairs.append([f"{level}, {name}", pair["undefined"], "", "", "", "", ""])
                continue
            areas = [f"{pair['first']:.3f}", f"{pair['second']:.3f}", f"{pair['difference']:+.3f}"]
            test = [_interval(pair["bootstrap"]), _interval(pair["interval"]), _p(pair["p"])]
            pairs.append([f"{level}, {name}", *areas, *test])
    if pairs:
        header = ["level, output", "AUC", "other", "difference", "over patients", "DeLong's interval", "p (DeLong)"]
        parts += ["<h2>Compared with the other prediction</h2>", _table(header, pairs)]
    return parts


def _level(level: str, one: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    parts = [f"<h2>{html.escape(level.capitalize())} level</h2>", _image(pictures, f"{level}_curves")]
    if one["without_label"]:
        parts.append(f'<p class="note">{one["without_label"]} {level}s without a label are left out.</p>')
    for name, output in one["outputs"].items():
        if "undefined" not in output:
            parts += _output(name, output)
    parts.append(_image(pictures, f"{level}_calibration"))
    if "kappa" in one:
        parts += [
            "<h3>Most probable class</h3>",
            f"<p>Quadratic weighted kappa {_value(one['kappa'])}; rows of the table are the truth.</p>",
            _confusion(one),
        ]
    for by, outputs in one.get("subgroups", {}).items():
        for name, part in outputs.items():
            parts += _subgroups(level, by, name, part, pictures)
    return parts


def _output(name: str, output: dict[str, Any]) -> list[str]:
    parts = [f"<h3>{html.escape(name)}</h3>"]
    rows = []
    for key, fixed, told in (
        ("sensitivity_at_specificity", "specificity", "sensitivity"),
        ("specificity_at_sensitivity", "sensitivity", "specificity"),
    ):
        for point in output[key]:
            threshold = "above all scores" if point["threshold"] is None else f"{point['threshold']:.4g}"
            rows.append([f"{told} at {fixed} {point['at']:g}", _value(point), threshold])
    for key, measure in output.get("at_threshold", {}).items():
        rows.append([f"{_NAMES[key]} at the threshold given", _value(measure), ""])
    for key, text in (("pf1", "probabilistic F1"), ("brier", "Brier score"), ("ece", "expected calibration error")):
        if key in output:
            rows.append([text, _value(output[key]), ""])
    if "calibration" in output:
        line = output["calibration"]
        for key in ("slope", "intercept", "in_the_large"):
            words = {"slope": "calibration slope", "intercept": "calibration intercept"}.get(key, "shift of log-odds")
            rows.append([words, line.get("why", "") if line[key] is None else f"{line[key]:.3f}", ""])
    return [*parts, _table(["", "value (95 % interval over patients)", "threshold"], rows)]


def _confusion(one: dict[str, Any]) -> str:
    names = list(one["outputs"])
    if len(names) == 1:
        names = [f"not {names[0]}", names[0]]
    rows = [[name, *counts] for name, counts in zip(names, one["confusion"], strict=True)]
    return _table(["", *names], rows)


def _subgroups(level: str, by: str, name: str, part: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    rows = []
    for row in part["rows"]:
        area = _value(row["auc"]) if row.get("auc") else row["undefined"]
        rates = ["" if row.get(key) is None else f"{row[key]:.3f}" for key in ("sensitivity", "specificity")]
        rows.append([row["value"], row["rows"], row["patients"], row["positives"], area, *rates])
    header = [by, "rows", "patients", "positive", "AUC", "sensitivity", "specificity"]
    shared = "" if part["threshold"] is None else f" Sensitivity and specificity at {part['threshold']:.4g} for all."
    return [
        f"<h3>{html.escape(name)} by {html.escape(by)}</h3>",
        _table(header, rows),
        f'<p class="note">{shared}</p>' if shared else "",
        _image(pictures, _subgroup_picture(level, by, name)),
    ]


def _froc(found: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    parts = ["<h2>Lesions found (FROC)</h2>"]
    if "undefined" in found:
        return [*parts, f"<p>{html.escape(found['undefined'])}.</p>"]
    counts = f"{found['lesions']} lesions in {found['images_with_lesions']} of {found['images']} images"
    rows = [[f"{row['false_marks_per_image']:g}", _value(row)] for row in found["sensitivity"]]
    rows.append(["mean", _value(found["mean_sensitivity"])])
    parts.append(f"<p>{counts}, {found['marks']} marks.</p>")
    return [*parts, _image(pictures, "froc"), _table(["false marks per image", "lesions found"], rows)]


def _methods(found: dict[str, Any]) -> list[str]:
    texts = [
        f"Intervals in parentheses: 95 %, percentiles of {found['resamples']} resamples of patients (all rows of a "
        f"patient together; seed {found['seed']}). DeLong's intervals and test take rows as independent.",
        "AUC: area under the ROC curve, ties counting half. Average precision: sum over thresholds of (step of recall) "
        "times precision; it is no trapezoidal area.",
        "Sensitivity at a specificity: the highest of the thresholds that reach that specificity; no interpolation.",
        "Expected calibration error: 15 bins of equal width, of the positive class. Brier score: mean square of "
        "probability minus label. Slope and intercept: logistic regression on the log-odds. Shift: what makes the mean "
        "probability the frequency.",
        "Probabilistic F1: positives count with their probability (RSNA screening mammography challenge).",
        "FROC: a mark finds a lesion if it lies in the box around it; the mean is over 1/8, 1/4, 1/2, 1, 2, 4 and 8 "
        "false marks per image.",
    ]
    if "froc" not in found:
        texts.pop()
    versions = ", ".join(f"{name} {text}" for name, text in found.get("versions", {}).items())
    items = "".join(f"<li>{html.escape(text)}</li>" for text in [*texts, versions] if text)
    return ["<h2>How it was computed</h2>", f'<ul class="note">{items}</ul>']


def _pairs(one: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The comparisons of a level, by output."""
    return ((name, one["comparison"][name]) for name in one["outputs"] if name in one.get("comparison", {}))


def _image(pictures: dict[str, bytes], name: str) -> str:
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _value(measure: dict[str, Any]) -> str:
    """A value with its interval over patients, or why there is none."""
    if measure["value"] is None:
        return str(measure.get("why", "not defined"))
    interval = _interval(measure.get("bootstrap"))
    return f"{measure['value']:.3f} ({interval})" if interval else f"{measure['value']:.3f}"


def _interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
