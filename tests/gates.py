"""What `make lint` holds: limits of code lines and words, class names, and private names of PyTorch in one place.

    python tests/gates.py

Code lines are lines without blanks, comments and docstrings. Words are counted in comments, docstrings, messages and
documentation. A limit is the count that was reached: lower it whenever the count falls. A change that needs more lines
takes something out.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = {
    ("engine", "kernels"): 58115,
    ("engine", "kernels", "cli", "benchmarks"): 65727,
    ("benchmarks",): 4_160,
}
WORDS = {
    r"told|tells": 1,
    r"anew": 1,
    r"besides?": 9,
    r"in silence": 0,
    r"(by|in) turns": 1,
    r"taken whole": 0,
    r"let go": 0,
    r"hands? on": 0,
    r"(is|are) no": 51,
    r"gone": 0,
}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.value


def code_lines(path: Path) -> int:
    text = path.read_text()
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            found |= {*range(token.start[0], token.end[0] + 1)}
    for node in docstrings(ast.parse(text)):
        found -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(found)


def prose(path: Path) -> str:
    """Comments and strings of a Python file; all of a page."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\n".join(comments + strings)


PRIVATE_HERE = {"engine/torch_private.py", "kernels/torch_private.py", "kernels/triton_private.py"}
UNSTABLE = (
    "triton.knobs",
    "triton.runtime",
    "triton.tools",
    "triton.compiler",
    "triton.backends",
)  # without underscore
LIBRARIES = {"torch", "functorch", "triton"}


def private_names(text: str) -> list[tuple[int, str]]:
    """Line and dotted name of each private name of PyTorch or Triton that a file imports or reads.

    A name is private if a part of it starts with an underscore, or if it belongs to `UNSTABLE` modules. Methods of the
    user's modules and tensors (`module._apply`, `nn.Conv2d._conv_forward`) are attributes of classes, which a network
    may override.
    """
    tree = ast.parse(text)
    modules: dict[str, str] = {}
    found: list[tuple[int, str]] = []

    def add(line: int, name: str) -> None:
        parts = name.split(".")
        of_class = any(part[:1].isupper() for part in parts[:-1])
        is_private = any(re.match("_(?!_)", part) for part in parts) or name.startswith(UNSTABLE)
        if parts[0] in LIBRARIES and not of_class and is_private:
            found.append((line, name))

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        return modules.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                modules[one.asname or one.name.split(".")[0]] = one.name if one.asname else one.name.split(".")[0]
                add(node.lineno, one.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                modules[one.asname or one.name] = f"{node.module}.{one.name}"
                add(node.lineno, f"{node.module}.{one.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            add(node.lineno, dotted(node))
    return found


def classes_twice(folders: tuple[str, ...]) -> list[str]:
    """A line for each public class name that several classes have.

    `Server` is the class that `engine.bench.process.Process` looks for in a module.
    """
    places: dict[str, list[str]] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Server":
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return [f"class {name} exists {len(of)} times: {', '.join(of)}" for name, of in places.items() if len(of) > 1]


def main() -> int:
    too_many = classes_twice(("engine", "kernels", "cli", "benchmarks"))
    for path in (path for folder in ("engine", "kernels", "cli") for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for line, private in [] if name in PRIVATE_HERE else private_names(path.read_text()):
            too_many.append(f"{name}:{line} uses {private}; private names belong to {', '.join(sorted(PRIVATE_HERE))}")
    for folders, limit in LINES.items():
        count = sum(code_lines(path) for folder in folders for path in (ROOT / folder).rglob("*.py"))
        print(f"{' + '.join(folders)}: {count:,} code lines of {limit:,}")
        if count > limit:
            too_many.append(f"{' + '.join(folders)} has {count - limit:,} code lines more than tests/gates.py allows")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files = [path for folder in ("engine", "kernels", "cli") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(prose(path) for path in [*pages, *files])
    for pattern, limit in WORDS.items():
        count = len(re.findall(rf"\b({pattern})\b", text, re.IGNORECASE))
        if count > limit:
            too_many.append(f"'{pattern}' occurs {count} times in comments, messages and docs; {limit} are allowed")
    print(*too_many, sep="\n", file=sys.stderr)
    return bool(too_many)


if __name__ == "__main__":
    sys.exit(main())
