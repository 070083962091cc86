"""The page in the docs is what the committed results say."""

import re
import shlex
from pathlib import Path

from gigamorph.engine.bench.report import write_report

ROOT = Path(__file__).parents[2]


def test_the_page_in_the_docs_is_made_by_the_command_that_the_docs_name(tmp_path):
    text = (ROOT / "docs" / "benchmarks.md").read_text().replace("\\\n", " ")
    command = re.search(r"^ +gigamorph bench report (benchmarks/results/.*) --out (\S+)$", text, re.M)
    assert command is not None
    paths = [path for pattern in shlex.split(command[1]) for path in sorted(ROOT.glob(pattern))]
    write_report(paths, tmp_path)
    committed = ROOT / command[2]
    assert (committed / "report.md").read_text() == (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in committed.iterdir()}


def test_the_docs_link_to_what_is_there():
    page = ROOT / "docs" / "benchmarks.md"
    named = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert named and all((page.parent / name).is_file() for name in named)
