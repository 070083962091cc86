"""Writes tests/slow.txt: the tests that `make quick` leaves out, from the times of a whole run on an idle machine.

OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal --junitxml times.xml
python tests/slow.py times.xml
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LONGEST = 0.06  # seconds; the others take about a minute on two cores, with their collection
FILE = Path(__file__).with_name("slow.txt")


def read() -> dict[str, set[str]]:
    """File of tests -> its functions of which a case takes longer than `LONGEST`."""
    rows = (line.split(": ") for line in FILE.read_text().splitlines())
    return {name: set(functions.split()) for name, functions in rows}


def main() -> None:
    found = defaultdict[str, set[str]](set)
    for case in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
        if float(case.get("time", 0)) > LONGEST:
            parts = case.get("classname", "").split(".")
            module = [part for part in parts if not part[:1].isupper()]  # without the class of a method
            found["/".join(module) + ".py"].add(case.get("name", "").partition("[")[0])
    lines = (f"{name}: {' '.join(sorted(functions))}\n" for name, functions in sorted(found.items()))
    FILE.write_text("".join(lines))


if __name__ == "__main__":
    main()
