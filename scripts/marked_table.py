"""Puts tables that are measured into pages that are written by hand."""

from pathlib import Path


def put_table(page: Path, name: str, table: str) -> None:
    """Replaces what is between the markers `<!-- name: begin -->` and `<!-- name: end -->` of the page.

    Raises:
        ValueError: the page has no such markers.
    """
    before, _, after = _split(page, name)
    page.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")


def table_in(page: Path, name: str) -> str:
    """What is between the markers."""
    return _split(page, name)[1].strip()


def _split(page: Path, name: str) -> tuple[str, str, str]:
    """The page up to the table, the table, and the rest."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, has_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    table, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"{page} has no place for the table: put {begin} and {end} there, each on a line")
    return before + begin, table, end + after
