"""Runs transformers' own trainer tests with Trainer and with MBPTrainer in its place, and prints which are lost.

python scripts/upstream_tests.py ../transformers     # a checkout of the version that is installed

Exit status 1 if any test that passes with Trainer does not pass with MBPTrainer.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

IN_PLACE = "HF_MBP_IN_PLACE"
FILES = "tests/trainer/test_trainer*.py"


def put_in_place() -> None:
    """Exchanges the classes that `from transformers import Trainer` finds."""
    import transformers
    from transformers import trainer, trainer_seq2seq

    from hf_mbp import MBPSeq2SeqTrainer, MBPTrainer

    transformers.Trainer = trainer.Trainer = MBPTrainer
    transformers.Seq2SeqTrainer = trainer_seq2seq.Seq2SeqTrainer = MBPSeq2SeqTrainer


def pytest_collectstart() -> None:
    """Called by pytest, which has this file as a plugin; the lazy module may have put the stock classes back."""
    if os.environ.get(IN_PLACE):
        put_in_place()


def passed(checkout: Path, *, in_place: bool, extra: list[str]) -> set[str]:
    """Names of the tests that pass."""
    files = sorted(str(path.relative_to(checkout)) for path in checkout.glob(FILES))
    if not files:
        raise SystemExit(f"There are no {FILES} in {checkout}. Name a checkout of transformers.")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{checkout}"}
    environment[IN_PLACE] = "1" if in_place else ""
    command = [sys.executable, "-m", "pytest", "-p", "upstream_tests", "-rp", "-q", f"--rootdir={checkout}", *extra]
    done = subprocess.run(  # noqa: S603 - pytest, no shell
        [*command, *files], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr[-2000:]]
    print("MBPTrainer:" if in_place else "Trainer:   ", *summary)
    return set(re.findall(r"^PASSED (\S+)", done.stdout, flags=re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="Folder of a checkout of transformers.")
    parser.add_argument("pytest_arguments", nargs=argparse.REMAINDER, help="Such as: -n 2")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    stock = passed(checkout, in_place=False, extra=options.pytest_arguments)
    lost = stock - passed(checkout, in_place=True, extra=options.pytest_arguments)
    print(f"{len(stock)} tests pass with Trainer, {len(lost)} of them not with MBPTrainer.")
    print(*sorted(lost), sep="\n")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
