"""Checks the pages that MkDocs has built: their formulas are drawn, and they load nothing from elsewhere.

    mkdocs build --strict && python scripts/check_site.py build/site

Links inside of the site are MkDocs' own business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src"}
"""Elements that browsers load, by the attribute that says from where."""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        address = named.get(LOADED.get(tag, "")) or ""
        if named.get("rel") != "canonical" and address.startswith(("http://", "https://", "//")):
            self.problems.append(f"loads {address}")
        if "arithmatex" in (named.get("class") or ""):
            self.problems.append("has a formula that is not drawn (scripts/site_math.py)")


def problems(html: str) -> list[str]:
    """What is wrong with one page."""
    page = _Page()
    page.feed(html)
    return page.problems


def _problems_of(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.html")):
        for problem in problems(file.read_text(encoding="utf-8")):
            yield f"{file}: {problem}"


def main(folder: str) -> int:
    """Print what is wrong; the exit code is 1 if anything is, or if there are no pages."""
    found = list(_problems_of(Path(folder)))
    if not (Path(folder) / "index.html").is_file():
        found.append(f"{folder}: no pages are there. Build them first: mkdocs build --strict")
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
