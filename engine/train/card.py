"""The model card of a trained network (Mitchell et al., 2019), from known facts only.

The card is passed on with the weights, so it contains counts, settings, figures and versions, but no patient or path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..datasets.tables import Record
from ..errors import DataError
from ..evaluate.cases import LEVELS, Cases
from ..evaluate.evaluate import Settings, evaluate
from ..evaluate.numbers import evaluate_numbers, numbers_headline
from ..evaluate.report import format_value, no_interval
from ..files import write_atomically
from ..report.markdown import markdown
from ..versions import versions_of_results

_COUNTED = ("view", "laterality", "density", "manufacturer")


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        title: purpose of the network, in a few words.
        model: facts about the network by name: architecture, parameters, input.
        training: facts about the training by name: recipe, settings, memory, time.
        records: the images of each split.
        classes: names of the labels, in order.
        predictions: scores of the images, for each predicted split ("val", "test").
        resamples: bootstrap resamples of the intervals.
        measured: lines of results, for a network without predictions per image.
        pictures: lines on the image regions that the network uses.
        labelled: whether the classes are labels of images.
    """

    title: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    records: Mapping[str, Sequence[Record]]
    classes: Sequence[str]
    predictions: Mapping[str, Cases] = field(default_factory=dict)
    resamples: int = 2000
    measured: Sequence[str] = ()
    pictures: Sequence[str] = ()
    labelled: bool = True


def write_card(path: str | Path, card: Card) -> Path:
    """Write the card as markdown; returns its path.

    Raises:
        GigamorphError: if it cannot be written.
    """
    path, text = Path(path), "\n".join(_lines(card)) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"), "model card")
    return path


def _lines(card: Card) -> list[str]:
    measured = [*map(markdown, card.measured or _numbers(card))]
    found = {
        name: _evaluated(cases, card.resamples) for name, cases in card.predictions.items() if cases.kind != "numbers"
    }
    return [
        f"# Model card: {markdown(card.title)}",
        "",
        "Written by gigamorph at the end of training, from the facts of the run. It names no patient and no file.",
        *_section("Model", _facts(card.model)),
        *_section("Training", _facts(card.training)),
        *_section("Data", _data(card)),
        *_section("Results", measured or _results(found, card.resamples)),
        *(_section("Image regions that the network uses", [*map(markdown, card.pictures)]) if card.pictures else ()),
        *_section("Intended use and limits", _limits(card, found)),
        *_section("Versions", _facts(versions_of_results())),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _facts(facts: Mapping[str, Any]) -> list[str]:
    return [markdown(f"- {name}: {value}") for name, value in facts.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(markdown, cells)) + " |" for cells in lines]


def _data(card: Card) -> list[str]:
    rows = []
    labels = card.classes if card.labelled else ()
    for split, records in card.records.items():
        counts = [sum(_is(record, number, name) for record in records) for number, name in enumerate(labels)]
        rows.append([split, len(records), len({record.patient_id for record in records}), *counts])
    lines = _table(["split", "images", "patients", *(f"label {name}" for name in labels)], rows)
    everything = [record for records in card.records.values() for record in records]
    known = []
    for column in _COUNTED:
        values = Counter(getattr(record, column) for record in everything)
        counted = ", ".join(f"{value} {count}" for value, count in sorted(values.items(), key=str) if value is not None)
        if counted:
            missing = f", unknown {values[None]}" if values[None] else ""
            known.append(markdown(f"- {column}: {counted}{missing}"))
    unknown = sum(not record.patient_known for part in card.records.values() for record in part)
    leaks = "No patient is in two splits."
    if unknown:
        leaks = f"The patient of {unknown} images is unknown, so a patient may be in two splits."
    return [*lines, "", leaks, "", *(known or ["Views, densities and manufacturers are unknown."])]


def _is(record: Record, number: int, name: str) -> bool:
    """Whether an image has this class or label."""
    return record.label == number or (record.label < 0 and record.labels.get(name) == 1)


def _numbers(card: Card) -> list[str]:
    """A line of results for each predicted number."""
    lines = []
    for split, cases in card.predictions.items():
        if cases.kind == "numbers":
            found = evaluate_numbers(cases, Settings(resamples=card.resamples))
            lines += [f"- {split}, {line}" for line in numbers_headline(found)]
    return lines


def _evaluated(cases: Cases, resamples: int) -> dict[str, Any] | str:
    """The result of `evaluate`, or the reason why there is none."""
    try:
        return evaluate(cases, Settings(resamples=resamples))
    except DataError as error:
        return str(error)


def _results(found: Mapping[str, dict[str, Any] | str], resamples: int) -> list[str]:
    rows: list[list[Any]] = []
    notes: list[str] = []
    for split, one in found.items():
        if isinstance(one, str):
            notes.append(f"- {split}: {one}.")
            continue
        for level, at in one["levels"].items():
            for name, output in at["outputs"].items():
                if "undefined" in output:
                    notes.append(f"- {split}, {level}, {name}: {output['undefined']}.")
                else:
                    rows.append([split, level, name, *_row(output)])
                    if no_interval(output["auc"]):
                        notes.append(f"- {split}, {level}, {name}: AUC with {no_interval(output['auc'])}.")
            if "mean_auc" in at:
                rows.append([split, level, "mean", at["rows"], "", format_value(at["mean_auc"]), "", "", "", ""])
            if at["rows_without_patient"]:
                notes.append(
                    f"- {split}, {level}: {at['rows_without_patient']} rows without a patient count as one each."
                )
    notes = list(dict.fromkeys(map(markdown, notes)))
    if not rows:
        return [*(notes or ["No images were held out, so nothing was measured."])]
    header = ["split", "level", "output", "rows", "positive", "AUC", "average precision", "sensitivity at 0.9"]
    used = dict.fromkeys(level for _, level, *_ in rows)
    return [
        *_table([*header, "Brier score", "ECE"], rows),
        "",
        f"In parentheses: 95 % intervals, {resamples} resamples of patients. Sensitivity at specificity 0.9 or more. "
        + " ".join(f"{level.capitalize()} level: {LEVELS[level]}." for level in used),
        *(["", *notes] if notes else []),
    ]


def _row(output: dict[str, Any]) -> list[object]:
    [at] = [point for point in output["sensitivity_at_specificity"] if point["at"] == 0.9]
    measures = [output["auc"], output["average_precision"], at, output.get("brier"), output.get("ece")]
    return [output["rows"], output["positives"], *("" if one is None else format_value(one) for one in measures)]


def _limits(card: Card, found: Mapping[str, dict[str, Any] | str]) -> list[str]:
    """Lines on limits that follow from the data; only the author can state the intended use."""
    patients = len({record.patient_id for record in card.records.get("test", ())})
    lines = ["- Intended use: not stated. State it here before you pass the model on."]
    if patients:
        lines.append(f"- Tested on {patients} patients of the table that it was trained on, and on no other data.")
    else:
        lines.append("- Not tested: no test images. Validation scores are optimistic: they selected the epoch.")
    if any(not isinstance(one, str) for one in found.values()):
        lines.append(
            "- Probabilities hold for the prevalence in this table; at another prevalence, recalibrate them and choose "
            "new thresholds."
        )
    everything = [record for records in card.records.values() for record in records]
    unknown = [column for column in _COUNTED[2:] if all(getattr(record, column) is None for record in everything)]
    if unknown:
        lines.append(f"- Performance by {' and '.join(unknown)} is unknown: the table does not record it.")
    lines.append("- The software that wrote this card knows of no clinical study of this network.")
    return lines
