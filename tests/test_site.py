"""The site: all pages are in its navigation, its links lead somewhere, and each result says where it is from."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
FORMER = [address.lstrip("/") for address in SITE["not_in_nav"].split()]


def pages():
    def files(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from files(value) if isinstance(value, list) else [value]

    return list(files(SITE["nav"]))


def test_every_page_is_in_the_navigation_once():
    there = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages() + FORMER) == there


def test_links_lead_to_files_of_the_site():
    for page in pages() + FORMER:
        text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                target = ((ROOT / "docs" / page).parent / link).absolute()
                assert target.exists() and (ROOT / "docs").absolute() in target.parents, f"{page}: {link}"


def test_each_result_has_a_date_a_commit_and_a_machine():
    page = (ROOT / "docs/results.md").read_text()
    labels = re.search(r"\| label \| machine \|\n\|.*\n((?:\|.*\n)+)", page)
    assert labels
    machines = {name for row in labels[1].splitlines() for name in row.split("|")[1].strip().split(", ")}
    tables = re.findall(r"(\|.*\| date \| commit \| machine \|)\n\|.*\n((?:\|.*\n)+)", page)
    assert len(re.findall(r"^\|[-|]+\|$", page, re.MULTILINE)) == len(tables) + 1
    for row in (row for _, rows in tables for row in rows.splitlines()):
        *_, date, commit, machine = (cell.strip() for cell in row.strip("|").split("|"))
        assert re.fullmatch(r"2\d{3}-\d\d-\d\d", date), row
        assert all(re.fullmatch(r"[0-9a-f]{7}\+?", one) for one in commit.split(", ")), row
        assert set(machine.split(", ")) <= machines, row


def test_what_the_interface_names_exists():
    import importlib

    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"gigamorph.{module}"), attribute), name
