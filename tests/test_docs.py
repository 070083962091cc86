"""Every block of README.md and docs/*.md runs as it stands, on smaller phantoms: Python, and commands in this process.

Each command must be one that the command line understands; what is not run besides is in `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import csv
import importlib
import keyword
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch

from gigamorph.cli.main import main
from gigamorph.engine.mammography.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
# docs/morph.md is run by tests/cli/test_morph.py, which compares what is printed besides.
DOCS = [page for page in (ROOT / "docs").glob("*.md") if page.name != "morph.md"]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS)]
NOT_RUN = {
    r"^(make|pip install) ": "sets up an environment, as .ci/run does",
    r"^python (benchmarks/|-m pytest benchmarks)": "benchmarks are run by hand: minutes to hours",
    r"^gigamorph bench ": "measures for minutes; tests/cli/test_bench.py has small ones",
    r"^gigamorph recipe \w+ --synthetic": "some minutes; tests/engine/mammography/recipes has small ones",
    r"dicomweb\+https://pacs/": "needs a hospital's store; tests/cli/test_dicomweb.py asks one of its own",
    r"downloads/|vindr/": "needs a data set that others give; tests/engine/datasets reads copies of its tables",
    r"^gigamorph view (?!.*--static)": "serves until Ctrl-C; tests/cli/test_view.py asks it",
    r"study/graded|(area|masses|masks|exams)/": "half a minute each; tests/cli has them",
    r"--out (exams|masks|masses|logged)": "half a minute each; tests/cli has them",
    r"--config (my\.yaml|stages\.toml)|settings": "half a minute each; tests/cli has them",
    r"--out other$": "shows an error; tests/engine/train/test_optimizers.py and tests/cli have it",
    r"^gigamorph train table\.csv": "trains for twenty epochs; the README's own training runs",
}
GPU = "needs a GPU"
SMALLER = {
    "plan --model resnet50": "plan --model resnet18",
    "patients=12": "patients=6",
    "size 512x384": "size 256x192",
    "height=512, width=384": "height=256, width=192",
    "height=384, width=288": "height=256, width=192",
    "1, 1500, 1201)": "1, 500, 401)",
}
_COMMAND = re.compile(r"(\$ )?((?:[A-Z_]+=\w+ )*)((?:gigamorph|python|make|pip) .*)")


@dataclass(frozen=True)
class Block:
    """Code of a page: a Python block, or one command."""

    page: str
    line: int
    python: bool
    text: str

    @property
    def left_out(self) -> str | None:
        """Why it is not run."""
        if self.python:
            return GPU if '"cuda"' in self.text and not torch.cuda.is_available() else None
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.text)), None)


def blocks(page: str) -> Iterator[Block]:
    """The Python blocks, and the commands of indented and of shell blocks, in order.

    Comments after commands are dropped, and other programs that read what they print.
    """
    lines = (ROOT / page).read_text().splitlines()
    number = 0
    while number < len(lines):
        first, fence = number, re.fullmatch(r"```(\w*)", lines[number])
        if fence:
            number = lines.index("```", first + 1)
        inside = lines[first + 1 : number] if fence else [lines[number]]
        number += 1
        if fence and fence[1] == "python":
            yield Block(page, first + 2, True, "\n".join(inside) + "\n")
            continue
        prefix = "" if fence else "    "
        while not fence and inside[-1].endswith("\\"):
            inside.append(lines[number])
            number += 1
        for command in "\n".join(inside).replace("\\\n", " ").split("\n"):
            found = _COMMAND.fullmatch(command.removeprefix(prefix)) if command.startswith(prefix) else None
            if found:
                yield Block(page, first + 1, False, re.split("  #| [|] ", found[3])[0].strip())


BLOCKS = [block for page in PAGES for block in blocks(page)]


def test_blocks_are_found():
    assert sum(block.python for block in BLOCKS) >= 7 and sum(not block.python for block in BLOCKS) >= 40
    for pattern in NOT_RUN:
        assert any(re.search(pattern, block.text) for block in BLOCKS), f"{pattern} is about nothing"
    for wide in SMALLER:
        assert any(wide in block.text for block in BLOCKS), f"{wide} is about nothing"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.text.startswith("gigamorph ")], ids=lambda b: b.text)
def test_a_command_is_understood(block: Block):
    """Its options and the number of its arguments; their values are looked at where it runs."""
    _, name, *words = shlex.split(block.text)
    name += "_" * keyword.iskeyword(name)
    command = getattr(importlib.import_module(f"gigamorph.cli.{name}"), name)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    left, others, _ = command.make_parser(click.Context(command)).parse_args(words)
    for parameter in command.params:
        if parameter.required:
            assert left.get(parameter.name), f"{parameter.name} is missing"
    assert others == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for given: a table, a file of it, a trained network."""
    made = tmp_path_factory.mktemp("docs")
    table = write_phantoms(made, patients=6, height=160, width=128, seed=1)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (made / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "density"])
        writer.writeheader()
        writer.writerows({**row, "density": "ab"[int(row["patient_id"][-1]) % 2]} for row in rows)
    shutil.copy(made / rows[0]["image_path"], made / "exam.dcm")
    options = "--model lesionnet --mean 0.3 --std 0.1 --epochs 1 --accumulate 4 --seed 2"
    command(f"gigamorph train {made}/table.csv --out {made}/run {options}")
    return made


def command(text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(text)[1:])
    assert ended.value.code == 0, text


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("named_rates")
def test_a_page_runs(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = [block for block in blocks(page) if not block.left_out]
    if page != "README.md" and run:  # which makes all that it needs
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in run:
        text = block.text
        for wide, narrow in SMALLER.items():
            text = text.replace(wide, narrow)
        if block.python:
            exec(compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"), names)
        else:
            command(text)
