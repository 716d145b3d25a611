"""Feeds recipes, command lines, data files and checkpoints that are broken or strange, and says how each ended.

    python scripts/fuzz.py                                  # 5,000 inputs of each kind: an hour on one core
    python scripts/fuzz.py --kinds data --inputs 500 --seed 7
    python scripts/fuzz.py --kinds data --first 1234 --inputs 1          # the input of a failure, again
    python scripts/fuzz.py --write                          # the table of docs/fuzzing.md, too

An input is taken; or it is refused in one line, with exit code 2, that names the option, the file or the command line;
or it is a failure: an exception, exit code 1, a message that names nothing, something written or connected to outside
the folder of the run. Failures are printed and kept with all their files in `--output`. Inputs are made at random from
the kind, the seed and their number, and tried in this process, one after the other; trials end where work would begin.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before the libraries read them

import datasets
import transformers

from fuzzing.kinds import KINDS, is_clear
from fuzzing.models import make_models
from fuzzing.trial import Bench, Ending, Guard, Input, Trial, inside
from marked_table import put_table

LOGGING = (transformers.utils.logging, datasets.logging)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "fuzzing.md"


@contextmanager
def bench() -> Iterator[Bench]:
    """A place for trials, with models beside it and caches of its own; libraries are quiet meanwhile."""
    verbosities = [library.get_verbosity() for library in LOGGING]
    with (
        tempfile.TemporaryDirectory(prefix="hf-mbp-fuzz-") as folder,
        inside(folder),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache")),
    ):
        make_models(Path("models"))
        for library in LOGGING:
            library.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        gc.freeze()  # a run of a Trainer begins by collecting garbage: what is imported is none
        try:
            yield Bench(scratch=Path(folder), guard=Guard(), is_clear=is_clear)
        finally:
            for library, verbosity in zip(LOGGING, verbosities, strict=True):
                library.set_verbosity(verbosity)
            datasets.enable_progress_bars()
            gc.unfreeze()


def made(kind: str, seed: int, number: int) -> Input:
    """The input of that number."""
    return KINDS[kind].make(Random(zlib.crc32(f"{kind} {seed} {number}".encode())))  # noqa: S311 - nothing secret


def tried(place: Bench, kind: str, given: Input) -> Trial:
    """How an input of a kind ends."""
    chosen = KINDS[kind]
    with chosen.work():
        return place.trial(given, lambda: chosen.run(given), may_write=chosen.may_write)


def run_kind(place: Bench, kind: str, seed: int, numbers: Sequence[int], output: Path) -> Counter[Ending]:
    """Tries the inputs of a kind; failures are printed and kept."""
    endings: Counter[Ending] = Counter()
    seen: Counter[str] = Counter()
    for number in numbers:
        given = made(kind, seed, number)
        running = output / "running"  # stays if the process dies
        given.write(running)
        (running / "argv.txt").write_text(f"{kind} {number} {given.argv!r}")
        trial = tried(place, kind, given)
        endings[trial.ending] += 1
        if trial.ending.is_failure:
            running.rename(output / f"{kind}-{seed}-{number}")
            (output / f"{kind}-{seed}-{number}" / "said.txt").write_text(trial.said, errors="backslashreplace")
            seen[last := _last_line(trial.said)] += 1
            if seen[last] == 1:
                print(f"{kind} {number}: {trial.ending.value}: {given.argv!r:.300}\n    {last!r:.600}", flush=True)
        else:
            shutil.rmtree(running)
    return endings


def _last_line(said: str) -> str:
    """By which failures are told apart; names of temporary files differ anyway."""
    lines = said.strip().splitlines()
    return re.sub(r"hf-mbp-\w+(-\w+)?", "...", lines[-1]) if lines else ""


def as_table(results: Mapping[str, Counter[Ending]]) -> str:
    """A row for each kind."""
    failures = [ending for ending in Ending if ending.is_failure]
    lines = ["| input | tried | taken | refused in one line | failures |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, endings in results.items():
        numbers = (
            endings.total(),
            endings[Ending.ACCEPTED],
            endings[Ending.REFUSED],
            sum(endings[ending] for ending in failures),
        )
        lines.append(" | ".join((f"| {KINDS[kind].says}", *(f"{number:,}" for number in numbers))) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[all]")
    parser.add_argument("--inputs", type=int, default=5000, help="of each kind [5000]")
    parser.add_argument("--first", type=int, default=0, help="number of the first one [0]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--output", type=Path, default=Path("fuzz"), help="for the inputs of failures [fuzz]")
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    options = parser.parse_args(argv)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    numbers = range(options.first, options.first + options.inputs)
    results: dict[str, Counter[Ending]] = {}
    with bench() as place:
        for kind in options.kinds:
            started = time.monotonic()
            results[kind] = run_kind(place, kind, options.seed, numbers, output)
            counts = ", ".join(f"{count:,} {ending.value}" for ending, count in results[kind].items())
            print(f"{kind}: {counts}; {time.monotonic() - started:,.0f} s", flush=True)
    print(table := as_table(results))
    if options.write:
        put_table(PAGE, "fuzzing", table)
    return int(any(ending.is_failure for endings in results.values() for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
