"""Prints the rows of an Excel sheet as JSON; runs as a separate process with limited memory.

A few bytes of such a file can address a cell in the last row and column, for which calamine allocates half a terabyte,
and Rust aborts its process when memory is exhausted.
"""

from __future__ import annotations

import json
import sys

import python_calamine


def main(path: str, sheet: str, limit: int) -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        book = python_calamine.CalamineWorkbook.from_path(path)
        names = book.sheet_names
        name = next((name for name in names if sheet and name.lower() == sheet.lower()), names[0])
        rows = book.get_sheet_by_name(name).to_python(skip_empty_area=False)
        json.dump([[_text(cell) for cell in row] for row in rows], sys.stdout)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


def _text(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
