"""A network's name in parsed form: its source and the arguments with which it is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from ..errors import GigamorphError
from ..parsing import parse_literal

# Networks that 0.2 names in checkpoints and folders by their former modules.
_MOVED = re.compile(r"^gigamorph\.engine\.(?:published\.(?=layouts\.)|(?=recipes\.))")
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """``timm:NAME?in_chans=1&global_pool=max``, ``module:factory?width=32#cancer,density`` or a built-in name.

    Attributes:
        kind: "timm", a module, or "" for a built-in name.
        name: name of the network or factory.
        arguments: keyword arguments: numbers, true, false, none, tuples and text.
        results: names of the output tensors to concatenate (`Columns`); () if the network outputs a single tensor.
    """

    kind: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parse a text.

        Raises:
            GigamorphError: an argument has no name or value, or is given twice; a result has no name; or the text
                cannot be printed in one line.
        """
        if not text.isprintable():
            raise GigamorphError(f"model {text[:60]!a}: a name must be printable; write other characters as %0A")
        rest, mark, named = text.partition("#")
        results = tuple(unquote(one) for one in named.split(",")) if mark else ()
        if "" in results or len(set(results)) < len(results):
            raise GigamorphError(
                f"model {text!r}: names of outputs must follow #, each once, as in module:factory#cancer,density"
            )
        path, _, query = rest.partition("?")
        kind, colon, name = path.partition(":")
        kind = _MOVED.sub("gigamorph.engine.mammography.", kind)
        arguments: dict[str, Any] = {}
        for part in query.split("&") if query else ():
            key, equals, value = part.partition("=")
            if not equals or not key.isidentifier() or key in arguments:
                raise GigamorphError(
                    f"model {text!r}: {part!r} is not a valid argument, or is given twice; write NAME=VALUE with & "
                    "between arguments, as in timm:resnet18?in_chans=1&global_pool=max"
                )
            arguments[key] = _value(unquote(value))
        return cls(kind, name, arguments, results) if colon else cls("", path, arguments, results)

    def __str__(self) -> str:
        path = f"{self.kind}:{self.name}" if self.kind else self.name
        query = "?" + "&".join(f"{k}={_text(v)}" for k, v in self.arguments.items()) if self.arguments else ""
        return path + query + ("#" + ",".join(quote(one, safe=".") for one in self.results) if self.results else "")


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return parse_literal(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    plain = value if isinstance(value, str) and _value(value) == value else repr(value)
    return quote(plain, safe="/:,.()[]'\" -_")
