"""Loading rows from every kind of file, dividing them, and what is wrong with them told in words."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_mbp.cli import data
from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.data import load_file, load_splits
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.splits import Splits, require_columns

ROWS = [{"text": "one, two", "label": 1}, {"text": "three", "label": 0}, {"text": 'fo"ur', "label": 1}]
JSON_LINES = b'{"text": "one, two", "label": 1}\n{"text": "three", "label": 0}\n{"text": "fo\\"ur", "label": 1}\n'
CSV = b'text,label\n"one, two",1\nthree,0\n"fo""ur",1\n'
TSV = b'text\tlabel\none, two\t1\nthree\t0\n"fo""ur"\t1\n'
PLAIN = {".jsonl": JSON_LINES, ".json": JSON_LINES, ".ndjson": JSON_LINES, ".csv": CSV, ".tsv": TSV}


@pytest.mark.parametrize("suffix", PLAIN)
def test_text_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(PLAIN[suffix])
    assert load_file(path).to_list() == ROWS


@pytest.mark.parametrize("name", ["rows[1].jsonl", "rows*.jsonl", "row?.jsonl", "rows (1).jsonl"])
def test_names_are_no_patterns(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows1.jsonl").write_text('{"text": "another file"}')
    path = tmp_path / name
    path.write_bytes(JSON_LINES)
    assert load_file(path).to_list() == ROWS


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_compressed_files(tmp_path: Path, kind: str, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows{kind}{suffix}"
    path.write_bytes(compress(PLAIN[kind]))
    assert load_file(path).to_list() == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert load_file(path).to_list() == ROWS


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.v1.txt"
    path.write_text("one\n\nthree\n")
    assert load_file(path)["text"][:] == ["one", "", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xls", b"x", r"rows.xls: unknown kind of file; use .csv, .tsv, .json"),
        ("rows", b"x", "rows: unknown kind of file"),
        ("rows.gz", b"x", "rows.gz: unknown kind of file"),
        ("rows.jsonl.zst", b"x", r"rows.jsonl.zst: unknown kind of file; .* also with .gz, .xz or .bz2$"),
        ("rows.csv", b"", "rows.csv is empty"),
        (
            "rows.csv",
            b'text;label\na, b, c;x\n"d";y\ne;f,g,h,i;z\n',
            "rows.csv cannot be read as csv: .*UTF-8, with commas",
        ),
        ("rows.csv", b"text,label\ngr\xfcn,x\n", "rows.csv cannot be read as csv: .*0xfc.*UTF-8, with commas"),
        ("rows.jsonl", b'{"a": \n', "rows.jsonl cannot be read as json: "),
        ("rows.jsonl", b'{"a": "\xab\xcd"}\n', "rows.jsonl cannot be read as json: .*UTF8"),
        ("rows.parquet", b"not parquet", "rows.parquet cannot be read as parquet: .*[Pp]arquet"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_file(path)


def load(folder: Path, **arguments: Any) -> Splits:
    return load_splits(DataArguments(**arguments), folder, seed=1)


def test_files_are_looked_up_in_the_working_directory_then_beside_the_recipe(tmp_path: Path) -> None:
    beside = tmp_path / "recipes" / "rows.csv"
    beside.parent.mkdir()
    beside.write_bytes(b"text\nbeside\n")
    assert load(beside.parent, train_file="rows.csv").train["text"][:] == ["beside"]
    Path("rows.csv").write_bytes(b"text\nhere\n")
    assert load(beside.parent, train_file="rows.csv").train["text"][:] == ["here"]
    looked_in = f"looked in {tmp_path} and {beside.parent}"
    with pytest.raises(UserError, match=rf"no file none.csv \(train_file, validation_file\); {looked_in}"):
        load(beside.parent, train_file="none.csv")


def test_validation_fraction_divides_by_seed(tmp_path: Path) -> None:
    Path("rows.csv").write_text("text\n" + "".join(f"row{i}\n" for i in range(20)))
    once, again = (load(tmp_path, train_file="rows.csv", validation_fraction=0.2) for _ in range(2))
    assert once.validation is not None
    assert again.validation is not None
    assert once.validation["text"][:] == again.validation["text"][:]
    assert len(once.validation) == 4
    assert sorted([*once.train["text"], *once.validation["text"]]) == sorted(f"row{i}" for i in range(20))
    other = load_splits(DataArguments(train_file="rows.csv", validation_fraction=0.2), tmp_path, seed=2)
    assert other.validation is not None
    assert set(other.validation["text"]) != set(once.validation["text"])


def test_limits_keep_the_first_rows_and_may_be_larger_than_the_data(tmp_path: Path) -> None:
    Path("rows.csv").write_text("text\na\nb\nc\n")
    splits = load(tmp_path, train_file="rows.csv", validation_file="rows.csv", max_train_samples=2, max_eval_samples=9)
    assert splits.train["text"][:] == ["a", "b"]
    assert splits.validation is not None
    assert splits.validation["text"][:] == ["a", "b", "c"]


def test_a_file_without_rows(tmp_path: Path) -> None:
    Path("rows.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"rows.csv has no rows"):
        load(tmp_path, train_file="rows.csv")


def test_one_row_cannot_be_divided(tmp_path: Path) -> None:
    Path("rows.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="has one row, which validation_fraction cannot divide"):
        load(tmp_path, train_file="rows.csv", validation_fraction=0.5)


def test_missing_columns_are_told_with_those_that_are_there() -> None:
    rows = Dataset.from_list(ROWS)
    splits = Splits(train=rows, validation=rows.remove_columns("text"), train_origin="a.csv", validation_origin="b.csv")
    require_columns(splits, {"label_column": "label", "text_pair_column": None})
    with pytest.raises(UserError, match=r"b.csv has no column 'text' \(option text_column\); its columns are label"):
        require_columns(splits, {"text_column": "text"})
    with pytest.raises(
        UserError, match=r"a.csv has no column 'x' \(option label_column\); its columns are text, label"
    ):
        require_columns(splits, {"label_column": "x"})


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = Dataset.from_list(ROWS)
        loaded = DatasetDict(train=rows, validation=rows.select([0]), test=rows.select([1, 2]))

        def load_dataset(name: str, config: str | None) -> DatasetDict:
            if name != "owner/reviews":
                raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
            assert config == "en"
            return loaded

        monkeypatch.setattr(data, "load_dataset", load_dataset)

    @pytest.mark.parametrize(("given", "size"), [({}, 1), ({"validation_split": "test"}, 2)])
    def test_splits(self, tmp_path: Path, given: dict[str, Any], size: int) -> None:
        splits = load(tmp_path, dataset_name="owner/reviews", dataset_config_name="en", **given)
        assert len(splits.train) == 3
        assert splits.validation is not None
        assert len(splits.validation) == size

    def test_unknown_split(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"no split 'dev' \(option validation_split\); its splits are train, validation, test"
        ):
            load(tmp_path, dataset_name="owner/reviews", dataset_config_name="en", validation_split="dev")

    def test_unknown_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"data set owner/none \(dataset_name\) cannot be loaded from the Hub: .*doesn't exist"
        ):
            load(tmp_path, dataset_name="owner/none")
