"""Your own DICOM folder, from its index to a report and a viewer, by the commands of `gigamorph`.

Here the folder is made of phantoms; put your own in its place. Of labels a csv with file names is enough.
"""

import csv
from pathlib import Path

import click

from gigamorph.cli import main as command
from gigamorph.engine.mammography.phantom import write_phantoms


def gigamorph(*words: object) -> None:
    """The command of that name, in this process."""
    print("$ gigamorph", *words)
    try:
        command.main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:  # it has said why
            raise


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    table = write_phantoms(folder / "dicom", patients=12, height=256, width=192, seed=1)
    with table.open(newline="") as file:
        labels = {Path(row["image_path"]).name: row["label"] for row in csv.DictReader(file)}

    # What the headers say: patient, exam, side, view. Patients are numbered, not named.
    gigamorph("data", "index", folder / "dicom" / "images", "--out", folder / "index.csv")
    with (folder / "index.csv").open(newline="") as file:
        rows = [{**row, "label": labels[Path(row["image_path"]).name]} for row in csv.DictReader(file)]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    run, predictions = folder / "run", folder / "predictions"
    settings = ["--model", "lesionnet", "--memory-budget", "64MiB", "--mean", "auto", "--std", "auto"]
    steps = ["--epochs", 3, "--accumulate", 4, "--lr", 5e-3]
    gigamorph("train", folder / "table.csv", *settings, *steps, "--out", run)
    gigamorph("predict", run / "best.ckpt", folder / "table.csv", "--out", predictions)
    measured = ["--split", "all", "--resamples", 100, "--out", folder / "evaluation"]
    gigamorph("eval", predictions / "predictions.csv", "--table", folder / "table.csv", *measured)
    gigamorph("view", predictions, "--evidence", run / "best.ckpt", "--most", 2, "--static", "--no-browser")


if __name__ == "__main__":
    main()
