"""A hook of MkDocs: the page on training lists all keys, as printed by `gigamorph train --print-config`."""

from typing import Any

from gigamorph.engine.config import to_toml
from gigamorph.engine.train.options import TrainConfig


def on_page_markdown(markdown: str, **others: Any) -> str:
    return markdown.replace("<!-- all keys -->", f"```toml\n{to_toml(TrainConfig()).strip()}\n```")
