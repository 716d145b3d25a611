"""The documentation site: every page is in its navigation, every public name in its reference, and links lead on.

That it builds is a step of scripts/test.sh, which has MkDocs warn of nothing.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import hf_mbp
from check_site import problems
from site_links import site_links
from tests.documents import DOCS, ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
REPOSITORY = "https://example.org/hf_mbp"


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages_of(SITE["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name_once() -> None:
    names = re.findall(r"^::: hf_mbp\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(names) == sorted(hf_mbp.__all__)


def test_warnings_are_errors() -> None:
    """`--quiet` would hide them from `--strict`."""
    (command,) = [line for line in (ROOT / "scripts" / "test.sh").read_text().splitlines() if 'mkdocs" build' in line]
    assert command.endswith(" build --strict")


def test_building_fetches_nothing() -> None:
    assert SITE["theme"]["font"] is False
    assert {name if isinstance(name, str) else next(iter(name)) for name in SITE["plugins"]} == {
        "search",
        "mkdocstrings",
    }
    assert "extra_javascript" not in SITE
    assert all((DOCS / name).is_file() for name in SITE["extra_css"])


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("a.md", "[x](../README.md#part)", f"[x]({REPOSITORY}/blob/main/README.md#part)"),
        ("guides/a.md", "[x](../../README.md)", f"[x]({REPOSITORY}/blob/main/README.md)"),
        (
            "a.md",
            "[`scripts/plan.py`](../scripts/plan.py)",
            f"[`scripts/plan.py`]({REPOSITORY}/blob/main/scripts/plan.py)",
        ),
        ("a.md", "[x](memory.md#part)", "[x](memory.md#part)"),
        ("guides/a.md", "[x](../memory.md)", "[x](../memory.md)"),
        ("a.md", "[x](https://example.org/a)", "[x](https://example.org/a)"),
        ("a.md", "![x](plan.png)", "![x](plan.png)"),
        ("a.md", "[x](../nothing.md)", "[x](../nothing.md)"),
        ("a.md", "```\n[x](../README.md)\n```", "```\n[x](../README.md)\n```"),
    ],
)
def test_links_out_of_the_documentation_lead_to_the_repository(page: str, link: str, expected: str) -> None:
    assert site_links(link, page=page, repo_url=f"{REPOSITORY}/") == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[`scripts/plan.py`](../scripts/plan.py)", "`scripts/plan.py`"),
        ("[recipes/accelerate](../recipes/accelerate/README.md)", "`recipes/accelerate/README.md`"),
        ("see [most heads](../README.md#part).", "see most heads (`README.md`)."),
        ("[x](memory.md)", "[x](memory.md)"),
    ],
)
def test_without_an_address_they_are_paths(link: str, expected: str) -> None:
    assert site_links(link, page="a.md", repo_url=None) == expected


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ('<a href="https://example.org">a link</a><img src="plan.png"><link rel="canonical" href="https://a.b">', []),
        ('<script src="https://example.org/a.js"></script>', ["loads https://example.org/a.js"]),
        ('<link rel="stylesheet" href="//example.org/a.css">', ["loads //example.org/a.css"]),
        ('<div class="arithmatex">x</div>', ["has a formula that is not drawn (scripts/site_math.py)"]),
    ],
)
def test_what_is_wrong_with_a_page_is_found(html: str, expected: list[str]) -> None:
    assert problems(html) == expected
