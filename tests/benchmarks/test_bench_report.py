"""The command that the docs name reports the committed results."""

import re
import shlex
from pathlib import Path

from gigamorph.engine.bench.report import write_report

ROOT = Path(__file__).parents[2]


def test_the_command_that_the_docs_name_reports_the_committed_results(tmp_path):
    text = (ROOT / "docs" / "benchmarks.md").read_text().replace("\\\n", " ")
    command = re.search(r"^ +gigamorph bench report (benchmarks/results/.*) --out (\S+)$", text, re.M)
    assert command is not None
    paths = [path for pattern in shlex.split(command[1]) for path in sorted(ROOT.glob(pattern))]
    write_report(paths, tmp_path)
    report = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"\]\((\S+\.png)\)", report)
    assert pictures and {*pictures, "report.html"} <= {path.name for path in tmp_path.iterdir()}


def test_the_docs_link_to_what_is_there():
    page = ROOT / "docs" / "benchmarks.md"
    named = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert named and all((page.parent / name).is_file() for name in named)
