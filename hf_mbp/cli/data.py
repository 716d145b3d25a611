"""Loads the rows to train on and to evaluate on, as the user has them: not tokenized, images unread."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.digits import DIGITS, load_digits
from hf_mbp.cli.errors import UserError, user_errors
from hf_mbp.cli.preparations import find_preparation
from hf_mbp.cli.sources import resolve_file
from hf_mbp.cli.splits import Splits, require_columns

# Suffix -> builder of the datasets library and its options.
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_COMPRESSED = frozenset((".gz", ".xz", ".bz2"))
# What the message of a reader leaves out; spreadsheets of many countries save semicolons and encodings of their own.
_WANTED = {"csv": "; save it as UTF-8, with commas between the cells (.csv) or tabs (.tsv)"}


def load_splits(arguments: DataArguments, recipe_folder: Path, seed: int) -> Splits:
    """Load both splits, divide off ``validation_fraction``, keep the first ``max_*_samples`` rows, prepare these.

    Raises:
        UserError: a file or split that is not there, cannot be read, or has no rows.
    """
    splits = (
        _from_files(arguments.train_file, arguments, recipe_folder) if arguments.train_file else _from_hub(arguments)
    )
    _refuse_empty(splits.train, splits.train_origin)
    if arguments.validation_fraction is not None:
        splits = _divide(splits, arguments.validation_fraction, seed)
    if splits.validation is not None:
        _refuse_empty(splits.validation, splits.validation_origin)
    splits = replace(
        splits,
        train=_first_rows(splits.train, arguments.max_train_samples),
        validation=splits.validation and _first_rows(splits.validation, arguments.max_eval_samples),
    )
    return splits if arguments.preparation is None else _prepare(splits, arguments.preparation, arguments)


def load_file(path: Path) -> Dataset:
    """Load one file, by its suffix, or a folder of images.

    Raises:
        UserError: a suffix that is not known, or content that is not what the suffix says.
    """
    if path.is_dir():
        return load_image_folder(path)
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _BUILDERS:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(_BUILDERS)}, also with .gz, .xz or .bz2")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    builder, options = _BUILDERS[suffixes[-1]]
    try:
        rows = load_dataset(builder, data_files=_literally(path), split="train", **options)
        rows.data.validate(full=True)  # JSON and Parquet may hold texts in another encoding than UTF-8
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{path} has no rows") from error
        # datasets wraps the reader's own message, which has the line and the reason
        raise UserError(
            f"{path} cannot be read as {builder}: {str(error.__cause__ or error).strip()}{_WANTED.get(builder, '')}"
        ) from error
    return rows


def load_image_folder(folder: Path) -> Dataset:
    """Load the images of a folder; the ``label`` of each is the name of the folder it is in.

    Raises:
        UserError: there are no images.
    """
    with user_errors(
        f"folder {folder} (train_file, validation_file) cannot be read as images",
        (DatasetGenerationError, ValueError, OSError),
    ):
        # a pattern, because of a folder's name alone datasets would take folders called train and test for splits
        return load_dataset("imagefolder", data_files={"train": [f"{_literally(folder)}/**"]}, split="train")


def _literally(path: Path) -> str:
    """A path as datasets takes it, for which a name with brackets or stars in it is a pattern."""
    return glob.escape(str(path))


def _from_files(train_file: str, arguments: DataArguments, recipe_folder: Path) -> Splits:
    train = resolve_file(train_file, recipe_folder)
    validation = None if arguments.validation_file is None else resolve_file(arguments.validation_file, recipe_folder)
    return Splits(
        train=load_file(train),
        validation=None if validation is None else load_file(validation),
        train_origin=str(train),
        validation_origin=str(validation or train),
    )


def _from_hub(arguments: DataArguments) -> Splits:
    name = str(arguments.dataset_name)
    loaded = load_digits() if name == DIGITS else _load_from_hub(name, arguments.dataset_config_name)
    validation = arguments.validation_split or ("validation" if "validation" in loaded else None)
    if arguments.validation_fraction is not None:
        validation = None
    for option, split in (("train_split", arguments.train_split), ("validation_split", validation)):
        if split is not None and split not in loaded:
            raise UserError(
                f"data set {name} has no split {split!r} (option {option}); its splits are {', '.join(loaded)}"
            )
    return Splits(
        train=loaded[arguments.train_split],
        validation=None if validation is None else loaded[validation],
        train_origin=f"{name}, split {arguments.train_split}",
        validation_origin=f"{name}, split {validation or arguments.train_split}",
    )


def _load_from_hub(name: str, config_name: str | None) -> DatasetDict:
    # A data set that is a program is refused by a RuntimeError.
    kinds = (ValueError, OSError, RuntimeError, DatasetGenerationError)
    with user_errors(f"data set {name} (dataset_name) cannot be loaded from the Hub", kinds):
        return load_dataset(name, config_name)


def _divide(splits: Splits, fraction: float, seed: int) -> Splits:
    if len(splits.train) < 2:
        raise UserError(f"{splits.train_origin} has one row, which validation_fraction cannot divide")
    with user_errors(f"validation_fraction {fraction} of the {len(splits.train)} rows of {splits.train_origin}"):
        divided: DatasetDict = splits.train.train_test_split(test_size=fraction, seed=seed)
    return Splits(
        train=divided["train"],
        validation=divided["test"],
        train_origin=splits.train_origin,
        validation_origin=f"{splits.train_origin} (validation_fraction)",
    )


def _prepare(splits: Splits, name: str, arguments: DataArguments) -> Splits:
    preparation = find_preparation(name)
    require_columns(splits, {option: getattr(arguments, option) for option in preparation.options})
    train = preparation.make(splits.train, arguments)
    validation = splits.validation and preparation.make(splits.validation, arguments)
    for rows, origin in ((train, splits.train_origin), (validation, splits.validation_origin)):
        if rows is not None:
            _refuse_empty(rows, f"{origin}, prepared as {name},")
    return replace(splits, train=train, validation=validation)


def _first_rows(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _refuse_empty(rows: Dataset, origin: str) -> None:
    if len(rows) == 0:
        raise UserError(f"{origin} has no rows")
