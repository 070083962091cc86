"""Writes an evaluation: ``metrics.json``, plots, and one HTML page with all results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..report.figure import png
from ..report.page import TextTable, write_page
from . import plots
from .cases import Cases
from .evaluate import at_levels

SOURCES = {
    "date": "date of the predictions",
    "model": "model",
    "predictions": "predictions",
    "table": "data set",
    "split": "split",
    "compared_with": "compared with",
    "marks": "marks",
}
_HASHES = {"model_sha256": "SHA-256 of the model", "predictions_sha256": "SHA-256 of the predictions"}


def write_report(out: str | Path, images: Cases, found: dict[str, Any]) -> Path:
    """Write ``metrics.json``, the plots as PNG and ``report.html`` into `out`; returns the page's path.

    Args:
        out: the folder.
        images: the evaluated images.
        found: the result of `evaluate`, with any additions, and with the sources under the keys of `SOURCES`.

    Raises:
        GigamorphError: if a file cannot be written.
    """
    return write_results(out, found, "evaluation.html", _pictures(images, found), **_content(found))


def write_results(
    out: str | Path, found: Mapping[str, Any], template: str, pictures: Mapping[str, bytes], **content: Any
) -> Path:
    """Write ``metrics.json``, the pictures and ``report.html``; returns the page's path.

    Args:
        out: the folder.
        found: the results, with the sources under the keys of `SOURCES`.
        template: of the page; it gets `content`, the title and the sources.
        pictures: PNG files by name without ``.png``.
    """
    out = Path(out)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_atomically(out / "metrics.json", lambda p: p.write_text(text), "metrics")
    title = found.get("predictions") or "predictions"
    content |= {name: found[name] for name in ("resamples", "seed") if name in found}
    used = ", ".join(f"{name} {text}" for name, text in found.get("versions", {}).items())
    used += "".join(f"; {text} {found[name]}" for name, text in _HASHES.items() if found.get(name))
    return write_page(
        out / "report.html", template, pictures, title=title, facts_of=facts_of(found), versions=used, **content
    )


def rows_line(rows: Mapping[str, Any]) -> str:
    """The first line of a report: the rows that were measured, left out, and used for fitting.

    Args:
        rows: "measured" and "left_out", see `read.TableParts`; and "fitted", if anything was, with "what" and the
            number of "rows".
    """

    def by_split(counts: Mapping[str, int]) -> list[str]:
        return [f"{count} of {name}" if name else f"{count} without a split" for name, count in counts.items()]

    first, *others = by_split(rows["measured"])
    number, _, rest = first.partition(" ")
    rest = rest.replace("of ", "of split ", 1) if rest.startswith("of ") else rest
    lines = [", ".join([f"measured: {number} rows {rest}", *others])]
    if rows["left_out"]:
        lines.append(f"left out: {', '.join(by_split(rows['left_out']))}")
    fitted = rows.get("fitted")
    lines.append(
        f"fitted on {fitted['rows']} rows of split val: {', '.join(fitted['what'])}" if fitted else "nothing is fitted"
    )
    return "; ".join(lines)


def order_line(found: Mapping[str, Any]) -> str | None:
    """A line on the order of several classes; None for other kinds."""
    if found.get("kind") != "classes":
        return None
    if found["ordered"]:
        return f"classes in the order {' < '.join(found['outputs'])}"
    return (
        f"the names of the classes do not determine an order: no kappa, and breasts and exams take the last of "
        f"{', '.join(found['outputs'])}; state the order, lowest first, with --classes"
    )


def facts_of(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The sources of a report's figures: rows, order of classes, then `SOURCES`."""
    rows = [("rows", rows_line(found["rows"]))] if "rows" in found else []
    rows += [("order", line)] if (line := order_line(found)) else []
    return rows + [(name, found[key]) for key, name in SOURCES.items() if found.get(key)]


def headline(found: dict[str, Any]) -> list[str]:
    """A summary line for each level and output: the AUC with its interval over patients."""
    lines = []
    for level, one in found["levels"].items():
        for name, output in one["outputs"].items():
            of = f"{level} level, {name}: " if len(one["outputs"]) > 1 else f"{level} level: "
            if "undefined" in output:
                lines.append(of + output["undefined"])
            else:
                counts = f"{output['rows']} {level}s, {output['positives']} positive, {_patients(one)}"
                lines.append(f"{of}AUC {format_value(output['auc'])}, {counts}{_why(output['auc'])}")
        if "mean_auc" in one:
            without = ", ".join(one["mean_auc"].get("left_out", ()))
            line = f"{level} level: mean AUC {format_value(one['mean_auc'])}{without and f' without {without}'}"
            lines.append(f"{line}, {one['rows']} {level}s, {_patients(one)}")
        unpaired = one.get("comparison", {}).get("unpaired")
        if unpaired:
            lines.append(f"{level} level, not compared: {unpaired}")
        for name, pair in _pairs(one):
            p = pair.get("undefined") or (pair.get("why") if pair["p"] is None else f"p {format_p(pair['p'])} (DeLong)")
            areas = "" if "undefined" in pair else f"AUC {pair['first']:.3f} and {pair['second']:.3f}, "
            lines.append(f"{level} level, {name}, compared{_shared(level, one)}: {areas}{p}")
    if "mean_sensitivity" in found.get("froc", {}):
        mean = found["froc"]["mean_sensitivity"]
        lines.append(f"FROC: mean sensitivity {format_value(mean)} per lesion{_why(mean)}")
    return lines


def verdict(found: dict[str, Any]) -> str:
    """The result of exams, otherwise of breasts or images, in a sentence.

    Sensitivity and specificity are those of a threshold that was fixed before, otherwise the sensitivity at the middle
    of the specificities. Several outputs have a mean AUC.
    """
    places = sorted(found["levels"], key=("exam", "breast", "image").index)
    defined = (name for name in places if any("auc" in one for one in found["levels"][name]["outputs"].values()))
    level = next(defined, places[0])
    one = found["levels"][level]
    lines = headline({"levels": {level: one}})
    line = next((line for line in lines if "mean AUC" in line), lines[0])
    output = next(iter(one["outputs"].values()))
    if len(one["outputs"]) > 1 or "undefined" in output:
        return line[:1].upper() + line[1:]
    source, measured = output.get("threshold", {}).get("from"), found.get("rows", {}).get("measured", {})
    if output.get("at_threshold") and (source == "given" or "val" not in measured):  # else it was fitted on these rows
        rates = (f"{name} {format_value(output['at_threshold'][name])}" for name in ("sensitivity", "specificity"))
        return f"{' and '.join(rates).capitalize()} at {_which(source)}; {line}"
    points = output["sensitivity_at_specificity"]
    point = points[len(points) // 2]
    return f"Sensitivity {format_value(point)} at specificity {point['at']:g}; {line}"


def _which(source: str) -> str:
    return "the threshold given" if source == "given" else f"the threshold of {source}"


def _pictures(images: Cases, found: dict[str, Any]) -> dict[str, bytes]:
    figures = {}
    for level, cases in at_levels(images, list(found["levels"])).items():
        one, cases = found["levels"][level], cases.labelled()
        figures[f"{level}_curves"] = plots.curves_figure(cases, one["outputs"], found["seed"])
        if any("calibration" in output for output in one["outputs"].values()):
            figures[f"{level}_calibration"] = plots.calibration_figure(one["outputs"])
        for by, outputs in one.get("subgroups", {}).items():
            for name, part in outputs.items():
                if any(row.get("auc") for row in part["rows"]):
                    figures[_subgroup_picture(level, by, name)] = plots.subgroups_figure(part["rows"], by)
    if "curve" in found.get("froc", {}):
        figures["froc"] = plots.froc_figure(found["froc"])
    return {name: png(figure) for name, figure in figures.items()}


def _subgroup_picture(level: str, by: str, output: str) -> str:
    words = "".join(c if c.isalnum() else "_" for c in f"{by}_{output}")
    return f"{level}_by_{words}"


def _content(found: dict[str, Any]) -> dict[str, Any]:
    """The variables of the page's template."""
    froc = found.get("froc")
    return {
        "verdict": verdict(found),
        "overview": _overview(found),
        "compared": _compared(found),
        "levels": [_level(level, one) for level, one in found["levels"].items()],
        "froc": froc,
        "froc_table": None if froc is None or "undefined" in froc else _froc(froc),
    }


def _overview(found: dict[str, Any]) -> TextTable:
    rows = []
    for level, one in found["levels"].items():
        for name, output in one["outputs"].items():
            row = [f"{level}, {name}", output["rows"], one["patients"] or "unknown", output["positives"]]
            if "undefined" in output:
                rows.append([*row, output["undefined"], "", ""])
            else:
                delong = _interval(output["auc"]["delong"])
                rows.append([*row, format_value(output["auc"]), delong, format_value(output["average_precision"])])
        if "mean_auc" in one:
            left_out = one["mean_auc"].get("left_out")
            note = f" without {', '.join(left_out)}" if left_out else ""
            mean = format_value(one["mean_auc"])
            rows.append([f"{level}, mean{note}", one["rows"], one["patients"] or "unknown", "", mean, "", ""])
    header = ["level, output", "rows", "patients", "positive", "AUC", "DeLong's interval", "average precision"]
    return TextTable(header, rows)


def _compared(found: dict[str, Any]) -> TextTable:
    rows = []
    for level, one in found["levels"].items():
        if "unpaired" in one.get("comparison", {}):
            rows.append([level, one["comparison"]["unpaired"], "", "", "", "", ""])
        for name, pair in _pairs(one):
            if "undefined" in pair:
                rows.append([f"{level}, {name}{_shared(level, one)}", pair["undefined"], "", "", "", "", ""])
                continue
            areas = [f"{pair['first']:.3f}", f"{pair['second']:.3f}", f"{pair['difference']:+.3f}"]
            test = [_interval(pair["bootstrap"]), _interval(pair["interval"]), format_p(pair["p"])]
            rows.append([f"{level}, {name}{_shared(level, one)}", *areas, *test])
    header = ["level, output", "AUC", "other", "difference", "over patients", "DeLong's interval", "p (DeLong)"]
    return TextTable(header, rows)


def _level(level: str, one: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": level,
        "rule": one["rule"],
        "notes": _notes(one),
        "without_label": one["without_label"],
        "outputs": {name: _output(output) for name, output in one["outputs"].items() if "undefined" not in output},
        "kappa": format_value(one["kappa"]) if "kappa" in one and len(one["outputs"]) > 1 else "",
        "confusion": _confusion(one) if "kappa" in one else None,
        "subgroups": [
            _subgroups(level, by, name, part)
            for by, outputs in one.get("subgroups", {}).items()
            for name, part in outputs.items()
        ],
    }


def _output(output: dict[str, Any]) -> TextTable:
    rows = []
    for key, fixed, measured in (
        ("sensitivity_at_specificity", "specificity", "sensitivity"),
        ("specificity_at_sensitivity", "sensitivity", "specificity"),
    ):
        for point in output[key]:
            limit = _threshold(point) if "threshold" in point else ""
            rows.append([f"{measured} at {fixed} {point['at']:g}", format_value(point), limit])
    for area in output["partial_auc"]:
        name = f"partial AUC, {area['over']} {area['from']:g} to 1"
        raw = f"{area['raw']['value']:.4f} of {1 - area['from']:.4g}"
        rows.append([name, f"{format_value(area)}; raw {raw}", ""])
    for key, measure in output.get("at_threshold", {}).items():
        limit = output["threshold"]
        name = "share called" if key == "called" else key.replace("_", " ")
        rows.append([f"{name} at {_which(limit['from'])}", format_value(measure), _threshold(limit)])
    for key, text in (("pf1", "probabilistic F1"), ("brier", "Brier score"), ("ece", "expected calibration error")):
        if key in output:
            rows.append([text, format_value(output[key]), ""])
    if "calibration" in output:
        line = output["calibration"]
        for key in ("slope", "intercept", "in_the_large"):
            words = {"slope": "calibration slope", "intercept": "calibration intercept"}.get(key, "shift of log-odds")
            rows.append([words, line.get("why", "") if line[key] is None else f"{line[key]:.3f}", ""])
    return TextTable(["", "value (95 % interval over patients)", "threshold"], rows)


def _threshold(point: dict[str, Any]) -> str:
    """A threshold with all its digits, for ``--threshold``."""
    if point["threshold"] is not None:
        return str(point["threshold"])
    return "above all scores" if point.get("log_odds") is None else f"log_odds={point['log_odds']}"


def _notes(one: dict[str, Any]) -> list[str]:
    """Notes on left out images, rows without patients, and missing intervals."""
    notes = []
    if one["left_out"]:
        which = "whose side or exam is unknown, but known for other images of the patient"
        notes.append(f"Images left out, {which}: {one['left_out']}.")
    if one["rows_without_patient"]:
        notes.append(f"{_patients(one)[0].upper()}{_patients(one)[1:]}.")
    for name, output in one["outputs"].items():
        if "undefined" not in output:
            reasons = [output["auc"].get("why"), output["auc"].get("delong_why")]
            notes += [f"Output {name}: {reason}." for reason in reasons if reason]
    return notes


def _confusion(one: dict[str, Any]) -> TextTable:
    names = list(one["outputs"])
    if len(names) == 1:
        names = [f"not {names[0]}", names[0]]
    return TextTable(["", *names], [[name, *counts] for name, counts in zip(names, one["confusion"], strict=True)])


def _subgroups(level: str, by: str, name: str, part: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in part["rows"]:
        area = format_value(row["auc"]) if row.get("auc") else row["undefined"]
        rates = ["" if row.get(key) is None else f"{row[key]:.3f}" for key in ("sensitivity", "specificity")]
        rows.append([row["value"], row["rows"], row["patients"], row["positives"], area, *rates])
    return {
        "name": name,
        "by": by,
        "table": TextTable([by, "rows", "patients", "positive", "AUC", "sensitivity", "specificity"], rows),
        "threshold": "" if part["threshold"] is None and part["log_odds"] is None else _threshold(part),
        "picture": _subgroup_picture(level, by, name),
    }


def _froc(found: dict[str, Any]) -> TextTable:
    rows = [[f"{row['false_marks_per_image']:g}", format_value(row)] for row in found["sensitivity"]]
    return TextTable(
        ["false marks per image", "lesions found"], [*rows, ["mean", format_value(found["mean_sensitivity"])]]
    )


def _pairs(one: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The comparisons of a level, by output."""
    return ((name, one["comparison"][name]) for name in one["outputs"] if name in one.get("comparison", {}))


def _shared(level: str, one: dict[str, Any]) -> str:
    """A note on the number of rows if not all are in both predictions: AUCs then differ from those of all rows."""
    found = one["comparison"]
    return f" (the {found['rows']} {level}s in both; {found['left_out']} are in one only)" if found["left_out"] else ""


def format_value(measure: dict[str, Any]) -> str:
    """A value with its interval over patients, or the reason why there is none."""
    if measure["value"] is None:
        return str(measure.get("why", "not defined"))
    interval = _interval(measure.get("bootstrap"))
    if not interval and "exact" in measure:
        interval = f"{_interval(measure['exact'])}, exact"
    return f"{measure['value']:.3f} ({interval})" if interval else f"{measure['value']:.3f}"


def no_interval(measure: dict[str, Any]) -> str:
    """The reason why a value has no interval over patients; "" if it has one."""
    return "" if measure["value"] is None else str(measure.get("why", ""))


def _why(measure: dict[str, Any]) -> str:
    reason = no_interval(measure)
    return f"; {reason}" if reason else ""


def _patients(one: dict[str, Any]) -> str:
    """A text on the number of patients; rows without a patient count as one each, so intervals are too narrow."""
    without = one["rows_without_patient"]
    if not one["patients"]:
        return "patients unknown, so intervals treat each row as one"
    return f"{one['patients']} patients" + (f" and {without} rows without one, each treated as one" if without else "")


def _interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def format_p(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
