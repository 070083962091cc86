"""The table of releases: each test is counted by its package and outcome, and failures are named."""

from __future__ import annotations

from pathlib import Path

from releases import PACKAGES, counted, table

_TIMES = """<testsuites><testsuite>
<testcase classname="tests.engine.capture.test_graph" name="test_a"/>
<testcase classname="tests.engine.capture.test_graph" name="test_b[1]"><failure message="wrong"/></testcase>
<testcase classname="tests.engine.capture.test_values" name="test_c"><error message="no fixture"/></testcase>
<testcase classname="tests.engine.test_bags" name="test_d"><skipped message="no data"/></testcase>
<testcase classname="tests.kernels.test_pool" name="test_e"/>
<testcase classname="tests.kernels.test_pool" name="test_f"><skipped message="refused: a line"/></testcase>
</testsuite></testsuites>"""


def test_each_test_is_counted(tmp_path: Path) -> None:
    times = tmp_path / "times.xml"
    times.write_text(_TIMES)
    found = counted(times)
    assert found["packages"] == {
        "capture": {"passed": 1, "failed": 2},
        "engine": {"skipped": 1},
        "kernels": {"passed": 1, "refused": 1},
    }
    assert found["failures"] == ["engine.capture.test_graph.test_b[1]", "engine.capture.test_values.test_c"]
    rows = table({"newest": {"python": "3.13", **dict.fromkeys(PACKAGES, "1.0"), **found}}).splitlines()
    assert "| `capture` | 1 / 2 / 0 / 0 |" in rows
    assert "| `kernels` | 1 / 0 / 1 / 0 |" in rows
