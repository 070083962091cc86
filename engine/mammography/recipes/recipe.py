"""The definition of a recipe: a published method with its configuration, training, and a synthetic task."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...datasets.tables import Finding, Record
from ...errors import DataError, GigamorphError
from ...evaluate.cases import Cases
from ...files import write_json
from ...images.rawfile import brief
from ...parsing import parse_json
from ...tiling.memory import format_bytes, peak_bytes
from ...train.card import Card, write_card
from ...train.data import Images
from ...train.record import hash_of_reading
from ...train.run import Run
from ...trust import trusted
from ...versions import versions_of_results
from .claims import Synthetic, judge
from .weights import PUBLISHED, RANDOM


def recipe_card(
    run: Run,
    name: str,
    config: Any,
    *,
    parameters: int,
    records: Mapping[str, Sequence[Record]],
    classes: Sequence[str] = (),
    predictions: Mapping[str, Cases] | None = None,
    output: str | None = None,
    measured: Sequence[str] = (),
    pictures: Sequence[str] = (),
) -> Path:
    """Write ``model_card.md`` into the run's folder; return its path.

    Args:
        name: of the recipe.
        config: its configuration; the card omits file names.
        parameters: number of parameters of the trained network.
        records: the images of each split.
        classes: names of the classes in order, or of labels.
        predictions: for the images of "val" and "test".
        pictures: lines returned by `draw_evidence`.
        output, measured: output of a network that does not predict for images, and lines with its measures.
    """
    settings = {key: _describe(key, value) for key, value in asdict(config).items()}
    budget = "free memory" if run.memory_budget is None else format_bytes(run.memory_budget)
    card = Card(
        title=f"{name}, {settings.get('model', 'see the configuration')}",
        model={"recipe": name, "parameters": f"{parameters:,}", "output": output or ", ".join(classes)},
        training={
            **settings,
            "seed": run.seed,
            "precision": run.precision,
            "device": run.device,
            "memory budget of a step": budget,
            "largest memory of the process": format_bytes(peak_bytes(run.device)),
        },
        records=records,
        classes=classes,
        predictions=predictions or {},
        measured=measured,
        pictures=[f"- {line}" for line in pictures],
    )
    return write_card(run.out / "model_card.md", card)


def _describe(key: str, value: Any) -> Any:
    """Return a setting as text: "given" or the published name for a file; the settings of several stages in order."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_describe(name, own)}" for name, own in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(str(_describe(key, own)) for own in value) or "none"
    if key == "weights":
        name = Path(value).name
        published = f"{name} ({PUBLISHED[name].source})" if name in PUBLISHED else "given"
        return "random, without pretraining" if value == RANDOM else published
    is_file = isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value))
    return "given" if is_file or (key == "unlabelled" and value is not None) else value


@dataclass(frozen=True)
class Claim:
    """Result of a synthetic task that tests a paper's claim."""

    claim: str
    """The paper's sentence, in our words."""
    rule: str
    """The condition on `rows` under which the claim holds."""
    rows: list[dict[str, Any]]
    """Measurements: plain numbers and texts, one row or more per seed."""
    judged: list[dict[str, Any]]
    """The parts of the rule, each with its mean and interval over the seeds; see `judge`."""
    holds: bool | None
    """Whether the rows satisfy the rule; None with too few seeds."""
    seconds: float


@dataclass(frozen=True)
class MethodRecipe:
    """A published method that can be run."""

    name: str
    title: str
    paper: str
    config: type
    """A frozen dataclass whose defaults are the published hyper-parameters; `configs/NAME.toml` lists their sources."""
    train: Callable[[Path, Any, Run], dict[str, Any]]
    """(table, config, run) -> metrics as plain values; writes into run.out."""
    synthetic: Synthetic
    restore: Callable[[dict[str, Any]], tuple[nn.Module, Callable[[Sequence[Record]], Images]]] | None = None
    """(record of a checkpoint) -> its classifier of whole images without weights, and an opener of its images."""


_CHANGED = {
    "split_sha256": "belongs to other data or another split",
    "truth_sha256": "was begun with other labels, findings, sides, views or exams of the same images",
    "reading_sha256": "was begun with other frames, sides or white levels of the same images",
}


def begin(run: Run, name: str, config: Any, records: Sequence[Record] = ()) -> None:
    """Write ``recipe.json`` for a new run, or check that the existing one belongs to the run to be resumed.

    Raises:
        GigamorphError: the folder contains another run, or one that is not to be resumed.
    """
    path = run.out / "recipe.json"
    split = [["/".join(r.path.parts[-2:]), r.patient_id, r.label, r.split] for r in records]
    truth = [[r.laterality, r.view, r.exam_id, r.labels, [_describe_finding(f) for f in r.findings]] for r in records]
    note = {
        "recipe": name,
        "seed": run.seed,
        "precision": run.precision,
        "config": json.loads(json.dumps(asdict(config))),
        # The file is shared: hashes show whether the data are the same, not who is in them.
        "split_sha256": hashlib.sha256(json.dumps(split).encode()).hexdigest(),
        "truth_sha256": hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).hexdigest(),
        "reading_sha256": hash_of_reading({"": records}),
    }
    exists = path.exists()
    if exists and not run.resume:
        raise GigamorphError(f"{run.out}: already contains a run; continue it with --resume or choose another folder")
    if not exists:
        if run.resume and (other := next(run.out.rglob("*.ckpt"), None)):
            raise GigamorphError(
                f"{other}: exists, but recipe.json, which names its recipe, is missing; choose another folder"
            )
        run.group.wait()  # all processes have checked the folder
        write_json(path, {**note, "versions": versions_of_results()}, "run's record")
        return
    try:
        stored = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); choose another folder") from error
    for key, changed in _CHANGED.items():
        if stored.get(key, note[key]) != note[key]:  # older runs do not have all
            raise DataError(f"{path}: {changed}; resume with the original table")
    for key in ("recipe", "seed", "precision"):
        if stored.get(key) != note[key]:
            raise GigamorphError(f"{path}: was begun with {key} {stored.get(key)!r}, not {note[key]!r}; use the same")
    for key, value in note["config"].items():
        before = stored["config"].get(key)
        if before != value:
            changed = f"was begun with {key} = {_short(before)} in its configuration, not {_short(value)}"
            raise GigamorphError(f"{path}: {changed}; resume with the same")


def _short(value: Any) -> str:
    return brief(json.dumps(value))


def _describe_finding(finding: Finding) -> list[Any]:
    mask = finding.mask and finding.mask.name
    return [finding.kind, finding.pathology, finding.birads, finding.box, finding.outline, mask]


def finish(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write ``metrics.json``, and return its content."""
    metrics = {**metrics, "seed": run.seed, "versions": versions_of_results()}
    write_json(run.out / "metrics.json", metrics, "metrics")
    return metrics


def show_claim(recipe: MethodRecipe, run: Run, seeds: Sequence[int]) -> Claim:
    """Run a recipe's synthetic task; write its claim to ``claim.json`` and each seed's rows to ``seed_N/rows.json``.

    A resumed run reuses complete seeds; an interrupted seed, which takes minutes, starts again.


    Raises:
        GigamorphError: the folder already contains a claim, or contains seeds and is not to be resumed.
    """
    path = run.out / "claim.json"
    if path.exists():
        raise GigamorphError(f"{path}: already exists; choose another folder")
    seconds, rows = 0.0, list[dict[str, Any]]()
    for seed in seeds:
        own = replace(run.part(f"seed_{seed}"), seed=seed)
        if own.out.exists() and not run.resume:
            raise GigamorphError(f"{own.out}: already exists; continue with --resume or choose another folder")
        run.say(f"seed {seed}")
        found = _rows_of_seed(recipe, own)
        rows, seconds = rows + found["rows"], seconds + found["seconds"]
    task = recipe.synthetic
    holds, judged = judge(task.rule, rows)
    claim = Claim(task.claim, str(task.rule), rows, judged, holds, seconds)
    write_json(path, {"recipe": recipe.name, **asdict(claim), "versions": versions_of_results()}, "claim")
    return claim


def _rows_of_seed(recipe: MethodRecipe, run: Run) -> dict[str, Any]:
    """Return the synthetic task's rows and duration for a seed, from an earlier run if it was complete."""
    path = run.out / "rows.json"
    if run.out.exists():
        found = parse_json(path.read_text()) if path.is_file() else {}
        if found.get("recipe") != recipe.name:
            raise GigamorphError(f"{run.out}: does not contain a seed of recipe {recipe.name}; choose another folder")
        if found["rows"] is not None:
            return found
        shutil.rmtree(run.out)

    def store(rows: list[dict[str, Any]] | None) -> dict[str, Any]:
        found = {"recipe": recipe.name, "rows": rows, "seconds": time.monotonic() - began}
        write_json(path, found, "rows of a seed")
        return found

    began = time.monotonic()
    run.out.mkdir(parents=True)
    store(None)  # marks the folder as this recipe's
    with trusted():  # the task uses networks of its own module
        return store(recipe.synthetic.rows(replace(run, resume=False)))
