"""All code of the documentation: it compiles, what it imports is there, and its commands name files that exist."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hf_mbp.cli.recipe import recipe_parser
from tests.documents import PAGES, ROOT, blocks, name_of

LANGUAGES = {"python", "bash", "csv", "yaml", "text", ""}
"""Of blocks; those of `text` and of none are what programs print, and sketches."""

NEW_FILES = {"reviews.yaml", "train.py", "RECIPE.yaml", "../transformers"}
"""Files of the reader's own that commands name."""

pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def unresolved(program: str) -> list[str]:
    """Names that a program imports from the library and that are not there; an import of a missing module raises."""
    missing = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_mbp":
            module = importlib.import_module(str(node.module))
            missing += [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_mbp":
                    importlib.import_module(alias.name)
    return missing


@pages
def test_blocks_have_a_language_that_is_tested(page: Path) -> None:
    opening = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)[::2]
    assert set(opening) <= LANGUAGES


@pages
def test_python_compiles_and_imports_what_is_there(page: Path) -> None:
    for program in blocks(page, "python"):
        compile(program, name_of(page), "exec")
        assert unresolved(program) == []


def test_a_name_that_is_not_there_is_found() -> None:
    assert unresolved("from hf_mbp import MBPTrainer, MBPTrainr") == ["MBPTrainr"]
    with pytest.raises(ModuleNotFoundError):
        unresolved("import hf_mbp.nothing")


@pages
def test_commands_name_files_that_exist(page: Path) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    files = [word for word in words if re.search(r"\.(py|sh|yaml|jsonl?|txt)$", word) or word.startswith("../")]
    assert [name for name in files if name not in NEW_FILES and not (ROOT / name).is_file()] == []


@pages
def test_recipes_have_keys_that_are_known(page: Path) -> None:
    known = {action.dest for action in recipe_parser()._actions}
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block).keys() <= known
