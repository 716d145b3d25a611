"""Kills a run at random moments, has something fail in it, and looks at what comes of it.

    python scripts/faults.py --write               # puts the tables into docs/reliability.md
    python scripts/faults.py --kills 4 --seed 1 --faults "full disk"

The run is masked language modelling by a tiny BERT, 12 steps with a checkpoint after every second one (scripts/
reliability/run.py). It is killed with SIGKILL, on one and on two processes, goes on from its last whole checkpoint,
and may be killed again. It ends well if weights, states of the optimizer and losses are, bit for bit, those of a run
that was never interrupted. Then each fault comes once, with Trainer and with MBPTrainer, and that run goes on, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

from marked_table import put_table
from own_process import OwnProcesses
from reliability.failing import FAULTS, Attempt, attempt, go_on
from reliability.killing import PHASES, Kill, Runs, kill_until_done
from reliability.run import same_bits

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"

RANKS = (1, 2)
KILLS_A_RUN = 3


def killed_runs(folder: Path, num_ranks: int, num_kills: int, random: Random) -> list[tuple[Kill, bool]]:
    """Kills as often as asked, in several runs; of each kill, what it left, and whether its run ended well."""
    runs, kills = Runs(num_ranks), []
    runs.finish(whole := folder / f"whole{num_ranks}")
    while len(kills) < num_kills:
        killed = folder / f"killed{num_ranks}-{len(kills)}"
        of_run = kill_until_done(runs, killed, random, min(KILLS_A_RUN, num_kills - len(kills)))
        is_same = same_bits(killed, whole)
        kills += [(kill, is_same) for kill in of_run]
        print(f"{num_ranks} process(es), killed in {', '.join(map(str, of_run))}: {yes(is_same)}", flush=True)
    return kills


KILLS_HEADER = (
    "| killed in | one process | two processes | last folder half written | ended as if never killed |\n"
    "| --- | ---: | ---: | ---: | ---: |"
)


def kills_table(kills: list[tuple[Kill, bool]]) -> str:
    """Counts, by what the process did that was killed first."""
    lines = []
    for phase in (*PHASES, "all"):
        own = [(kill, is_same) for kill, is_same in kills if phase in (kill.phase, "all")]
        counts = [sum(kill.num_ranks == num_ranks for kill, _ in own) for num_ranks in RANKS]
        half = sum(kill.is_half_written for kill, _ in own)
        lines.append(f"| {phase} | {counts[0]} | {counts[1]} | {half} | {sum(is_same for _, is_same in own)} |")
    return "\n".join([KILLS_HEADER, *lines])


FAULTS_HEADER = (
    "| fault | what `MBPTrainer` says | and `Trainer` | goes on from | and ends as if nothing had been |\n"
    "| --- | --- | --- | --- | --- |"
)


def faults_row(ours: Attempt, stock: Attempt, goes_on_from: str, is_same: bool) -> str:
    """What came of a fault."""
    says = "the same" if ours.says == stock.says else stock.says
    end = yes(is_same) if goes_on_from else ""
    return f"| {FAULTS[ours.fault].what} | {ours.says} | {says} | {goes_on_from} | {end} |"


def failing_runs(folder: Path, names: list[str]) -> tuple[list[str], bool]:
    """Rows of the table, and whether every run that was stopped ended well."""
    processes, rows, is_well = OwnProcesses(preload=["reliability.failing"]), [], True
    processes.run(go_on, whole := folder / "whole")
    for name in names:
        stock, ours = (
            processes.run(attempt, name, trainer, folder / f"{name} {trainer}") for trainer in ("Trainer", "MBPTrainer")
        )
        failed, goes_on_from, is_same = folder / f"{name} MBPTrainer", "", True
        if ours.error:
            goes_on_from = processes.run(go_on, failed)
            is_same = same_bits(failed, whole)
        is_well &= is_same
        rows.append(faults_row(ours, stock, goes_on_from, is_same))
        print(rows[-1], flush=True)
    return rows, is_well


def yes(is_so: bool) -> str:
    """In the table."""
    return "yes" if is_so else "**no**"


def main() -> int:
    """Kills and fails, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="half of them on two processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--write", action="store_true", help="puts the tables into docs/reliability.md")
    options = parser.parse_args()
    random = Random(options.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shares = zip(RANKS, (options.kills - options.kills // 2, options.kills // 2), strict=True)
        kills = [kill for ranks, share in shares if share for kill in killed_runs(folder, ranks, share, random)]
        rows, is_well = failing_runs(folder, options.faults)
    tables = {"kills": kills_table(kills), "faults": "\n".join([FAULTS_HEADER, *rows])}
    print("\n\n".join(tables.values()))
    if options.write:
        for table, text in tables.items():
            put_table(PAGE, table, text)
    return 0 if is_well and all(is_same for _, is_same in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
