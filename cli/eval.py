"""``gigamorph eval``: measures of predictions with confidence intervals, plots and a report."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.errors import DataError, GigamorphError
from . import options
from .messages import warn

if TYPE_CHECKING:
    from ..engine.datasets.tables.cells import Rows
    from ..engine.evaluate.cases import Cases
    from ..engine.evaluate.evaluate import Settings
    from ..engine.evaluate.read import TableParts


def _parse_rates(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    rates = options.parse_numbers(ctx, param, value, "rates", "0.8,0.9")
    if not all(0 < rate < 1 for rate in rates):
        raise click.BadParameter(f"{value!r}: rates must be between 0 and 1", ctx, param)
    return rates


@options.parsed
def _parse_threshold(value: str) -> dict[str, float]:
    name, _, number = value.rpartition("=")
    try:
        if name not in ("", "log_odds"):
            raise ValueError(name)
        return {name or "threshold": float(number)}
    except ValueError as error:
        raise GigamorphError(f"{value!r} is not a threshold; write 0.31 or log_odds=-0.8") from error


@options.parsed
def _parse_splits(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    if value != "all" and not set(parts) <= {"train", "val", "test"}:
        raise GigamorphError(f"{value!r}: write all, or train, val and test with commas between")
    return ",".join(parts)


@options.parsed
def _parse_classes(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(","))


@click.command()
@click.argument("predictions", type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for metrics, plots and report.")
@click.option(
    "--table",
    type=click.Path(exists=True, dir_okay=False),
    help="The csv with the predicted images: labels, splits, exams and columns that the predictions lack.",
)
@options.columns
@click.option("--label", metavar="COLUMN", help="Column of the truth, 1 or 0; by default label, or every label_NAME.")
@click.option(
    "--score",
    metavar="COLUMN",
    help="Column of the score, larger for label 1; by default log_odds_NAME, else p_NAME, else score_NAME.",
)
@click.option(
    "--classes",
    callback=_parse_classes,
    metavar="NAMES",
    help="Order of three or more classes, lowest first, with commas between; kappa and the highest class of an exam "
    "use it. By default, the order stated in training, or that of numbers.",
)
@click.option(
    "--split",
    callback=_parse_splits,
    metavar="SPLIT",
    help="Rows to measure: train, val or test, several with commas between, or all, which excludes train. Thresholds "
    "and calibration are fitted on the rows of val.",
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["image", "breast", "exam"]),
    help="Unit that is measured. Repeatable. By default images, and breasts and exams if there are fewer of them.",
)
@click.option("--by", multiple=True, metavar="COLUMN", help="Subgroups by the values of a column. Repeatable.")
@click.option(
    "--compare",
    "other",
    type=click.Path(exists=True, dir_okay=False),
    help="Predictions for the same images, breasts or exams by another model or a reader: paired DeLong test.",
)
@click.option(
    "--marks",
    type=click.Path(exists=True, dir_okay=False),
    help="Marks in the images, as written by gigamorph explain: FROC against the findings of --table.",
)
@click.option(
    "--false-marks",
    default="0.125,0.25,0.5,1,2,4,8",
    callback=functools.partial(options.parse_numbers, example="0.125,1,2"),
    help="For --marks: false marks per image at which the share of lesions found is reported.",
)
@click.option(
    "--iou",
    type=float,
    help="For --marks: least overlap (IoU) of a box with the lesion it finds; by default, its centre must be inside.",
)
@click.option(
    "--threshold",
    callback=_parse_threshold,
    metavar="NUMBER",
    help="A threshold fixed in advance, a probability or log_odds=NUMBER: results of calling cases at or above it.",
)
@click.option("--reader", metavar="COLUMN", help="For a reader study (MRMC), with one reading per row: the reader.")
@click.option("--modality", metavar="COLUMN", help="For a reader study: the modality; modalities are compared.")
@click.option(
    "--covariance",
    type=click.Choice(["delong", "jackknife"]),
    default="delong",
    help="For a reader study: covariance of the areas; the jackknife leaves out one patient at a time.",
)
@click.option(
    "--rates",
    default="0.8,0.9,0.95",
    callback=_parse_rates,
    help="Specificities at which sensitivity is reported, and vice versa; lower bounds of partial areas.",
)
@click.option("--resamples", type=click.IntRange(1), default=2000, help="Bootstrap resamples.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the bootstrap.")
@click.option("--overwrite", is_flag=True, help="Replace the evaluation in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the summary.")
def eval(
    predictions: str,
    out: str,
    table: str | None,
    label: str | None,
    score: str | None,
    classes: tuple[str, ...] | None,
    split: str | None,
    levels: tuple[Any, ...],
    by: tuple[str, ...],
    other: str | None,
    marks: str | None,
    threshold: dict[str, Any] | None,
    reader: str | None,
    modality: str | None,
    covariance: Any,
    resamples: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **rates: Any,
) -> None:
    """Measure predictions: ROC with DeLong's and patient-clustered intervals, precision, operating points, calibration.

    PREDICTIONS is the csv of gigamorph predict, its folder, or any csv with columns of scores and labels.

    Each row is an image. A breast has the mean probability of its views, an exam the highest probability of its
    breasts. For a network trained with --views, each row is an exam, combined as in training. Training rows are
    measured only if --split names them.

    The command writes metrics.json, plots and report.html, which contains both, to --out. For two classes it also
    writes calibration.json, fitted on the rows of split val, for gigamorph predict --calibration.

    For tables of masks, as written by gigamorph predict, it measures the mean Dice of the images with intervals over
    patients; with --table it also draws the worst images.

    Example: gigamorph eval predictions/predictions.csv --table table.csv --split test --by density --out evaluation
    """
    if marks is not None and table is None:
        raise click.UsageError("--marks needs the findings of --table")
    if modality is not None and reader is None:
        raise click.UsageError("--modality needs the readers: --reader COLUMN")
    if "label" in options.given_columns():
        raise click.UsageError(
            "--column label=NAME has no effect on predictions; name the true column with --label NAME"
        )
    from ..engine.evaluate.dice import read_dice
    from ..engine.evaluate.evaluate import Settings
    from ..engine.evaluate.read import read_parts

    _require_new(Path(out), overwrite)
    predictions = str(_table_to_measure(Path(predictions), levels))

    def read(path: str) -> TableParts:
        return read_parts(path, table=table, label=label, score=score, split=split, classes=classes)

    def with_source(rows: dict[str, Any], **others: str | None) -> dict[str, Any]:
        return {"split": split, "rows": rows, **_source(Path(predictions), table=table, **others)}

    masks = read_dice(predictions, split)
    if masks is not None:
        if any(one is not None for one in (label, score, classes, other, marks, reader, *levels, *by, threshold)):
            raise click.UsageError("predicted masks accept only --table, --split, --resamples and --seed")
        lines = _measure_dice(out, masks[0], with_source(masks[1]), table, resamples, seed)
        _print_result(out, lines, as_json)
        return
    parts = read(predictions)
    images = parts.measured
    if reader is None:
        _warn_of_repeats(images)
        for line in parts.warnings:
            warn(line)
    settings = Settings(tuple(levels) or None, by=by, resamples=resamples, seed=seed, **rates, **(threshold or {}))
    if reader is not None:
        how: dict[str, Any] = {"reader": reader, "modality": modality, "covariance": covariance}
        lines = _compare_readers(out, images, with_source(parts.rows), **how)
    elif images.kind == "numbers":
        if other is not None or marks is not None or threshold or by:
            raise click.UsageError("--compare, --marks, --threshold and --by do not apply to numbers; omit them")
        lines = _measure_numbers(out, images, settings, with_source(parts.rows))
    else:
        notes = with_source(parts.rows, compared_with=other, marks=marks)
        compared = None if other is None else read(other).measured
        marked = None if marks is None else (marks, str(table))
        lines = _measure(out, parts, settings, notes, compared, marked, Path(predictions))
    _print_result(out, lines, as_json)


def _table_to_measure(predictions: Path, levels: tuple[str, ...]) -> Path:
    """Return the table to measure: that of exams if the network takes an exam as one sample and no lower level is
    asked for, else that of images."""
    from ..engine.evaluate.read import note_of, samples_in, table_in

    below = set(levels) & {"image", "breast"}
    chosen = table_in(predictions) if below else samples_in(predictions)
    views = note_of(chosen).get("views")
    if views is not None and chosen.name != "exams.csv" and not below:
        text = f"{chosen}: the network combines the views of an exam ({views}), as in exams.csv; this measures images"
        warn(text)
    return chosen


def _print_result(out: str, lines: list[str], as_json: bool) -> None:
    if as_json:
        click.echo((Path(out) / "metrics.json").read_text(), nl=False)
        return
    for line in lines:
        click.echo(line)


_WRITTEN = ("metrics.json", "report.html", "calibration.json")


def _require_new(out: Path, overwrite: bool) -> None:
    """Refuse a folder that contains metrics, unless `overwrite`."""
    if (out / "metrics.json").exists() and not overwrite:
        raise GigamorphError(f"{out}: already holds metrics; name another --out, or give --overwrite")


def _remove_old_results(out: str) -> None:
    """Remove the files of an earlier evaluation, but no other pictures; called once the new results are computed."""
    if not (Path(out) / "metrics.json").exists():
        return
    page = Path(out) / "report.html"
    held = page.read_text(encoding="utf-8") if page.exists() else ""  # the page embeds its pictures
    for path in Path(out).glob("*.png"):
        if base64.b64encode(path.read_bytes()).decode() in held:
            path.unlink()
    for name in _WRITTEN:
        (Path(out) / name).unlink(missing_ok=True)


def _warn_of_repeats(images: Cases) -> None:
    """Warn if the table has several rows per image, because each row is measured."""
    seen: set[tuple[str, str]] = set()
    frames = images.columns.get("frame", ("",) * len(images))
    repeated = [one for one in zip(images.names, frames, strict=True) if one in seen or seen.add(one)]
    if repeated:
        first = repeated[0][0]
        repeats = f"{len(repeated)} of {len(images)} rows repeat an image ({first}); every row is measured"
        warn(repeats)


def _measure(
    out: str,
    parts: TableParts,
    settings: Settings,
    notes: dict[str, Any],
    other: Cases | None,
    marks: Any,
    predictions: Path,
) -> list[str]:
    """Write the measures of classes or labels, and return a summary."""
    from ..engine.evaluate.evaluate import evaluate
    from ..engine.evaluate.read import note_of, read_marks
    from ..engine.evaluate.report import headline, order_line, rows_line, write_report

    marked, without = (None, 0) if marks is None else read_marks(marks[0], marks[1], parts.measured)
    found = evaluate(parts.measured, settings, other=other, marked=marked, validation=parts.validation)
    if marked is not None:
        found["froc"]["findings_without_place"] = without
    found |= notes
    _remove_old_results(out)
    calibrated, lines = _fit_calibration(out, parts, found, note_of(predictions))
    what = ["thresholds"] * _has_validation_thresholds(found) + ["calibration.json"] * calibrated
    if parts.validation is not None and what:
        found["rows"] = {**parts.rows, "fitted": {"what": what, "rows": len(parts.validation)}}
    page = write_report(out, parts.measured, found)
    first = [line for line in (rows_line(found["rows"]), order_line(found)) if line]
    return [*first, *headline(found), f"{page}, metrics.json and plots", *lines]


def _has_validation_thresholds(found: dict[str, Any]) -> bool:
    """Whether thresholds were chosen on validation rows."""
    outputs = [output for level in found["levels"].values() for output in level["outputs"].values()]
    return any(
        output.get("threshold", {}).get("from", "given") != "given"
        or any("threshold" in point for point in output.get("sensitivity_at_specificity", ()))
        for output in outputs
    )


def _fit_calibration(
    out: str, parts: TableParts, found: dict[str, Any], note: dict[str, Any]
) -> tuple[bool, list[str]]:
    """Fit and write a calibration if a known network predicted two classes without calibration; return whether one was
    written, and lines that say why not."""
    from ..engine.evaluate.class_names import positive_number
    from ..engine.evaluate.recalibration import write_calibration

    images = parts.measured
    sample = "exam" if "views" in note else "image"
    if images.kind != "binary" or images.level != sample or "sha256" not in note or "calibrated_on" in note:
        return False, []
    try:
        if parts.validation is None:
            raise DataError("it is fitted on rows of split val, and there are none")
        classes = note.get("classes", [None, *images.outputs])
        if len(classes) != 2 or (None not in classes and [classes[positive_number(classes)]] != list(images.outputs)):
            raise DataError(f"{images.outputs[0]} is not the positive class of a two-class network; omit --score")
        write_calibration(out, parts.validation, found, note["sha256"], note.get("flip", ()))
    except DataError as error:
        return False, [f"no calibration.json: {error}"]
    return True, []


def _measure_numbers(out: str, images: Cases, settings: Settings, notes: dict[str, Any]) -> list[str]:
    """Write the measures of numbers, and return a summary."""
    from ..engine.evaluate.numbers import evaluate_numbers, numbers_headline, write_numbers_report
    from ..engine.evaluate.report import rows_line

    found = evaluate_numbers(images, settings) | notes
    _remove_old_results(out)
    page = write_numbers_report(out, images, found)
    return [rows_line(found["rows"]), *numbers_headline(found), f"{page}, metrics.json and plots"]


def _measure_dice(
    out: str, rows: Rows, notes: dict[str, Any], table: str | None, resamples: int, seed: int
) -> list[str]:
    """Write the Dice of masks, and return a summary."""
    from ..engine.evaluate.dice import dice_headline, evaluate_dice
    from ..engine.evaluate.dice_report import write_dice_report
    from ..engine.evaluate.report import rows_line

    found = evaluate_dice(rows, resamples=resamples, seed=seed) | notes
    _remove_old_results(out)
    page = write_dice_report(out, rows, found, table)
    undrawn = table is not None and "mask" not in rows.header
    notes_of_images = [f"{rows.path.name} has no column mask; no images are drawn"] if undrawn else []
    return [rows_line(found["rows"]), *dice_headline(found), *notes_of_images, f"{page}, metrics.json and plots"]


def _compare_readers(out: str, images: Cases, notes: dict[str, Any], **how: Any) -> list[str]:
    """Write a reader study (MRMC) with the arguments `how` of `study_of`, and return a summary."""
    from ..engine.evaluate.readers import reader_headline, study_of, write_reader_report
    from ..engine.evaluate.report import rows_line

    study = study_of(images, **how)
    _remove_old_results(out)
    page = write_reader_report(out, study, notes)
    return [rows_line(notes["rows"]), *reader_headline(study), f"{page} and metrics.json"]


def _source(predictions: Path, **others: str | None) -> dict[str, str | None]:
    """Return what was evaluated, with file names without their folders."""
    from ..engine.evaluate.read import note_of

    note = note_of(predictions)
    model = note["checkpoint"] if {"checkpoint", "sha256"} <= note.keys() else None
    if model is not None and note.get("flip"):
        model += f", mean over mirrored images ({', '.join(note['flip'])})"
    return {
        "predictions": predictions.name,
        "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
        "date": datetime.date.fromtimestamp(predictions.stat().st_mtime).isoformat(),
        "model": model,
        "model_sha256": model and note["sha256"],
        **{what: None if path is None else Path(path).name for what, path in others.items()},
    }
