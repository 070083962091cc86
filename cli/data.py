"""``gigamorph data``: index, check, split, convert and preview images and data sets; make phantoms."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.errors import DataError
from . import options, outputs, runner
from .data_phantom import phantom
from .data_preview import preview
from .interrupts import Stopped
from .messages import counted, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.datasets.tables import Record, Table
    from ..engine.predict.options import RunOptions

_PRINTED = 20  # most problems that are printed

_dataset: Any = click.option(
    "--dataset",
    metavar="NAME",
    help="cbis-ddsm, inbreast, vindr-mammo, rsna, embed, csaw-cc, cmmd, cdd-cesm, mini-mias, nyu or chestxray14; by "
    "default recognised by the tables in the folder.",
)
_label: Any = click.option(
    "--label",
    metavar="NAME",
    help="Which label of the data set; the command prints what it means. In a table of your own, NAME is the column "
    "label_NAME. With none, the table has no label.",
)
_skip: Any = click.option(
    "--skip-missing", is_flag=True, help="Leave out images and lesion masks that do not exist on disk."
)


def _parse_fractions(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, float, float]:
    numbers = options.parse_numbers(ctx, param, value)
    if len(numbers) != 3:
        raise click.BadParameter(f"{value!r}; write three shares: train,val,test", ctx, param)
    return numbers[0], numbers[1], numbers[2]


@click.group()
def data() -> None:
    """Turn downloaded images and tables into a table for training.

    Example: gigamorph data convert downloads/cbis --dataset cbis-ddsm --out cbis
    """


@data.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="CSV file for the table.")
@click.option(
    "--identifiers", is_flag=True, help="Keep PatientID and StudyInstanceUID; by default they become numbers."
)
@click.option(
    "--pattern",
    metavar="PATTERN",
    help="Pattern of file names with patient, side and view, as in {patient}_{laterality}-{view}. It can also contain "
    "{exam}, {any} (ignored) and slashes for folders. By default, common patterns are tried for images whose headers "
    "lack these values.",
)
@options.workers
def index(folder: str, out: str, identifiers: bool, pattern: str | None, workers: int | None) -> None:
    """List all images below a folder with the values of their headers: side, view, size, grey scale, manufacturer.

    The table has no labels; add a column label to train from it. Files that are not images are skipped and listed.
    Masks are recognised by their names (folder/masks/x.png, or x_mask.png next to x.png) and left out.
    For PNG and TIFF files, patient, side and view come from the file names; the command prints the pattern in use.

    Example: gigamorph data index downloads/png --pattern "{patient}_{laterality}-{view}" --out index.csv
    """
    from ..engine.datasets.index import index_folder
    from ..engine.datasets.tables import write_table
    from .counter import Count

    outputs.require_no_labels(out)
    with Count("headers") as count:
        found = index_folder(
            folder, identifiers=identifiers, pattern=pattern, workers=workers, on_start=count.start, on_done=count.add
        )
    for error in found.errors[:_PRINTED]:
        click.echo(f"skipped: {error}", err=True)
    if len(found.errors) > _PRINTED:
        click.echo(f"... and {len(found.errors) - _PRINTED} more", err=True)
    if not found.records:
        remedy = "correct the pattern" if found.errors else "pass the folder of the image files"
        raise DataError(f"{folder}: no image could be listed; {remedy}")
    write_table(out, found.records, [])
    known = [record for record in found.records if record.patient_known]
    patients = len({record.patient_id for record in known})
    total = f"{counted(len(found.records), 'image')} of {counted(patients, 'patient')}"
    click.echo(f"{total}, {counted(len(found.errors), 'file')} skipped; {out}")
    _report_masks(found.masks)
    if found.pattern:
        first = known[0] if pattern else next(r for r in known if "modality" not in r.extra)
        view = ", ".join(part for part in (first.laterality, first.view) if part)
        click.echo(f"file names read as {found.pattern}: {first.path.name} is of patient {first.patient_id}, {view}")
    if len(known) < len(found.records):
        warn(
            f"the patient of {len(found.records) - len(known)} images is unknown; fill in patient_id, or give "
            "the pattern of the file names with --pattern"
        )
    views = Counter(f"{record.laterality or '?'} {record.view or '?'}" for record in found.records)
    click.echo(", ".join(f"{count} {name}" for name, count in views.most_common(8)))


def _report_masks(masks: list[Path]) -> None:
    from ..engine.datasets.tables.folders import LeftOutMasks

    if masks:
        click.echo(LeftOutMasks(len(masks), masks[0]))


@data.command()
@click.argument("source", type=click.Path(exists=True))
@click.option("--out", type=click.Path(dir_okay=False), help="CSV file for all problems: image, kind and problem.")
@_dataset
@options.columns
@options.white
@options.workers
def check(source: str, out: str | None, dataset: str | None, white: Any, workers: int | None) -> None:
    """Decode every image of a table, folder or public data set, and report those that would spoil a training.

    Files: unreadable or blank images, and masks that are missing or of another size than the image.
    Grey values: images that use little of their grey scale (12 bits in a 16-bit PNG), and file types (DICOM, PNG) that
    have different grey values or predict the label.
    Tables: rows without a label next to others with one, an image in several rows, the same pixels twice (also mirrored
    or in another format), patients or images in two splits, and sides or views on which table, header and pixels
    disagree. For information: implants, spot views, phantoms and similar.

    The exit code is 1 if something must be corrected. Masks of a folder are recognised by their names and left out.

    Example: gigamorph data check table.csv --out problems.csv
    """
    from ..engine.datasets.check import KINDS, check_images
    from ..engine.datasets.tables.cells import write_csv
    from ..engine.datasets.tables.generic import labels_of
    from .counter import Count

    table = _read(source, dataset, check_files=False, labels=False, repeated=True)
    records = table.records
    _report_masks(table.masks)
    labels = labels_of(Path(source), table)
    if out:
        outputs.require_out(out, [source, *(record.path for record in records)])
    checked: list[int] = []
    with Count("images", len(records)) as count:
        problems = check_images(
            records, labels=labels, white=white, workers=workers, on_done=count.add, on_stopped=checked.append
        )
    if out:
        write_csv(Path(out), ["image_path", "kind", "problem"], ((p.path, p.kind, p.message) for p in problems))
    serious = [problem for problem in problems if problem.kind != "flag"]
    for problem in serious[:_PRINTED]:
        click.echo(f"{problem.kind:<10}  {problem.path}: {problem.message}")
    if len(serious) > _PRINTED:
        click.echo(f"... and {len(serious) - _PRINTED} more" + ("" if out else "; --out FILE lists all"))
    counts = Counter(problem.kind for problem in problems)
    for kind, meaning in KINDS.items():
        if counts[kind]:
            click.echo(f"{counts[kind]:>6} {kind}: {meaning}")
    part = f"{checked[0]} of " if checked else ""
    wrong = len({problem.path for problem in serious})
    click.echo(f"{part}{counted(len(records), 'image')}, {wrong} with problems to correct")
    if Path(source).is_file() and not any(labels) and not any(record.labels for record in records):
        click.echo("no image has a label: predict reads this table, train needs a column label (--column label=NAME)")
    if checked:
        click.echo("stopped by Ctrl-C; this result covers only the checked images", err=True)
        raise Stopped
    if serious:
        raise SystemExit(1)


@data.command()
@click.argument("table", type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="CSV file for the table with its split.")
@click.option(
    "--fractions",
    default="0.7,0.15,0.15",
    callback=_parse_fractions,
    help="Shares of the patients for train, val and test.",
)
@options.columns
@options.seed
def split(table: str, out: str, fractions: tuple[float, float, float], seed: int) -> None:
    """Split a table by patient, with each label in the same proportions; the same seed gives the same split.

    If the table has a split, it is kept and checked for leaks. If that split is official and has no val, patients of
    train move to val in the proportion of --fractions.

    Example: gigamorph data split table.csv --out split.csv --seed 1
    """
    from ..engine.datasets.splits import assign_splits, fill_validation
    from ..engine.datasets.tables import read_table, write_table

    outputs.require_out(out, [table])
    read = read_table(table, check_files=False)
    given = any(record.split for record in read.records)
    records = assign_splits(read.records, fractions=fractions, seed=seed)
    if given:
        before, records = records, fill_validation(records, fractions=fractions, seed=seed)
        click.echo("split of the table kept" + ("; val drawn from train" if records != before else ""))
    write_table(out, records, read.classes)
    for name in ("train", "val", "test"):
        part = [record for record in records if record.split == name]
        labels = Counter(read.classes[record.label] for record in part)
        text = ", ".join(f"{labels[label]} of {label}" for label in read.classes)
        click.echo(f"{name:<5} {len({record.patient_id for record in part}):>6} patients {len(part):>7} images: {text}")
    if not given:
        _warn_of_empty_splits(records, fractions)
    unknown = sum(not record.patient_known for record in records)
    if unknown:
        warn(
            f"the patient of {unknown} images is unknown; each counts as its own patient, so one patient may "
            f"be in two splits; fill in patient_id"
        )
        click.echo(out)
    else:
        click.echo(f"no patient is in two splits; {out}")


def _warn_of_empty_splits(records: Sequence[Record], fractions: tuple[float, float, float]) -> None:
    """Warn of splits without patients, which happen if every label has fewer patients than there are splits."""
    wanted = [name for name, fraction in zip(("train", "val", "test"), fractions, strict=True) if fraction > 0]
    present = {record.split for record in records}
    empty = [name for name in wanted if name not in present]
    if empty:
        have = "has" if len(empty) == 1 else "have"
        warn(
            f"{' and '.join(empty)} {have} no patients, because each label has fewer than {len(wanted)}; give "
            "fewer splits with --fractions, as in 0.5,0.5,0, or train with --folds"
        )


@data.command()
@click.argument("source", type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for table.csv and images.")
@_dataset
@options.columns
@_label
@_skip
@click.option(
    "--images",
    "file_format",
    type=click.Choice(["tiff", "png"]),
    help="Also write the images: all pixels, 16-bit grey values, chest wall left, no patient data.",
)
@options.voi
@options.for_processing
@options.white
@runner.resume
@runner.max_failures
@runner.retry_failed
@runner.shard
@options.workers
def convert(
    source: str,
    out: str,
    dataset: str | None,
    label: str | None,
    skip_missing: bool,
    file_format: str | None,
    voi: str,
    for_processing: bool,
    white: Any,
    workers: int | None,
    **run: Any,
) -> None:
    """Convert a downloaded public data set into a table for training, and with --images also its images.

    SOURCE is the folder of the data set, or a table or folder of your own. The command writes table.csv, unlabelled.csv
    (images with unknown label) and table.json (what label and split mean).

    With --images, finished images stay if the command stops: --resume continues, and --shard divides the work, as in
    gigamorph predict. Images that cannot be read are left out and listed in quarantine.csv with the reason.

    Example: gigamorph data convert downloads/vindr --dataset vindr-mammo --out vindr --images tiff
    """
    from ..engine.images.parallel import available_cpus
    from ..engine.predict.options import RunOptions

    if run["max_failures"] is None:
        del run["max_failures"]
    if not file_format and run != {"resume": False, "retry_failed": False, "shard": (1, 1)}:
        raise click.UsageError("--resume, --retry-failed, --max-failures and --shard need --images")
    table = _read(source, dataset, check_files=not skip_missing, labels=True, label=label, skip_missing=skip_missing)
    if not file_format and (Path(out) / "run.json").exists():
        raise click.UsageError(f"{out} holds converted images; their table would be overwritten; name another --out")
    outputs.require_out(Path(out) / "table.csv", [source])
    records, errors = _keep_existing(table.records, source, skip_missing), []
    if file_format:
        chosen = RunOptions("", workers=workers or available_cpus(), **{"max_failures": 1.0, **run})
        how = {"file_format": file_format, "voi": voi, "for_processing": for_processing, "white": white}
        converted = _convert_images(records, out, source, chosen, **how)
        if converted is None:
            return
        records, errors = converted
    grey = f"voi={voi}, 0 black to 65535 white" if file_format else None
    _write_tables(Path(out), records, table, {"source": source, "grey": grey, "left_out": len(errors)})
    if errors:
        raise SystemExit(1)


def _write_tables(out: Path, records: list[Record], table: Table, notes: dict[str, Any]) -> None:
    """Write table.csv, unlabelled.csv and table.json, and print a summary."""
    from ..engine.datasets.tables import write_table
    from ..engine.files import write_atomically
    from ..engine.mammography.data_sets import DATA_SETS

    labelled = [record for record in records if record.label >= 0]
    unlabelled = [record for record in records if record.label < 0]
    if labelled:
        write_table(out / "table.csv", labelled, table.classes)
    if unlabelled:
        write_table(out / "unlabelled.csv", unlabelled, table.classes)
    counts = _counts(labelled, table.classes) | ({"without label": len(unlabelled)} if unlabelled else {})
    meaning = {
        "data_set": table.name,
        "source": notes["source"],
        "label": table.label_rule,
        "split": DATA_SETS[table.name].split if table.name else "as in the table",
        "classes": table.classes,
        "images": counts,
        **notes,
    }
    text = json.dumps(meaning, indent=2) + "\n"
    write_atomically(out / "table.json", lambda path: path.write_text(text, encoding="utf-8"), "description")
    if table.label_rule:
        click.echo(f"label {table.label_rule}")
        click.echo(f"split: {meaning['split']}")
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    patients = counted(len({record.patient_id for record in records}), "patient")
    click.echo(f"{counted(len(records), 'image')} of {patients} ({text}); {out}")
    _warn_of_leaks(records)


def _warn_of_leaks(records: list[Record]) -> None:
    """Warn of patients in two splits, as in some official lists: a table keeps them, `train` refuses them."""
    from ..engine.datasets.splits import leaks

    if found := leaks(records):
        first, splits = next(iter(found.items()))
        warn(
            f"{len(found)} patient{'s are' if len(found) > 1 else ' is'} in two splits, as {first} in "
            f"{' and '.join(splits)}; train refuses such tables: put all images of a patient in one split"
        )


def _convert_images(
    records: list[Record], out: str, source: str, chosen: RunOptions, **how: Any
) -> tuple[list[Record], list[str]] | None:
    """Return the records of the written images and the errors of others; None while other shards are unfinished."""
    from ..engine.predict.convert import convert_images

    with runner.watching(False, "cpu") as watch:
        records, errors, found = convert_images(records, out, options=chosen, watch=watch, **how)
    for error in errors:
        click.echo(f"left out: {error}", err=True)
    if not found.complete:
        written = counted(found.done, "image")
        shard = f"shard {chosen.shard[0]}/{chosen.shard[1]}: {written} written, {found.failed} left out"
        click.echo(f"{shard}; table.csv is written when the other shards are done")
        return None
    if not records:
        raise DataError(f"{source}: none of its {len(errors)} images can be read; the lines above give the reasons")
    return records, errors


data.add_command(preview)
data.add_command(phantom)


def _read(
    source: str,
    dataset: str | None,
    *,
    check_files: bool,
    labels: bool,
    label: str | None = None,
    skip_missing: bool = False,
    repeated: bool = False,
) -> Table:
    """Read a public data set if the source is one, else a table or folder of the user."""
    from ..engine.datasets.tables import read_table
    from ..engine.mammography.data_sets import DATA_SETS, detect, read_data_set

    name = dataset or (detect(source) if Path(source).is_dir() else None)
    if name is None:
        labels = labels and label != "none"
        own = None if label == "none" else label
        how: Any = {"check_files": check_files, "skip_missing": skip_missing, "repeated": repeated}
        return read_table(source, labels=labels, label=own, **how)
    if dataset is None:
        click.echo(f"{source} is {DATA_SETS[name].title} (--dataset {name})")
    wanted = None if label == "none" else label
    table = read_data_set(name, source, label=wanted, check_files=check_files, skip_missing=skip_missing)
    if label == "none":
        table = replace(table, records=[replace(record, label=-1) for record in table.records], label_rule="none")
    return table


def _keep_existing(records: list[Record], source: str, skip_missing: bool) -> list[Record]:
    """Return the records without their missing masks; raise an error if masks are missing and not `skip_missing`."""
    from ..engine.datasets.tables import missing_masks, without_masks

    absent = missing_masks(records)
    if not absent:
        return records
    if not skip_missing:
        raise DataError(
            f"{source}: {len(absent)} masks do not exist, the first {absent[0]}; download them, or leave them out with "
            "--skip-missing"
        )
    click.echo(f"{len(absent)} missing masks left out, the first {absent[0]}", err=True)
    return without_masks(records, absent)


def _counts(records: Sequence[Record], classes: Sequence[str]) -> dict[str, int]:
    found = Counter(record.label for record in records)
    return {f"of class {name}": found[number] for number, name in enumerate(classes)}
