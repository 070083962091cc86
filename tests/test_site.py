"""The site: all pages are in its navigation, and its links lead somewhere."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def pages():
    def files(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from files(value) if isinstance(value, list) else [value]

    return list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_every_page_is_in_the_navigation_once():
    there = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages()) == there


def test_links_lead_to_files_of_the_site():
    for page in pages():
        text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                target = ((ROOT / "docs" / page).parent / link).absolute()
                assert target.exists() and (ROOT / "docs").absolute() in target.parents, f"{page}: {link}"


def test_what_the_interface_names_exists():
    import importlib

    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"gigamorph.{module}"), attribute), name
