"""Measures speed, memory and loss of MBPTrainer beside those of the stock Trainer and of other packages.

    python scripts/benchmark.py                     # everything; most of an hour on two cores; writes docs/benchmark.*
    python scripts/benchmark.py --workload tiny tiny_lm --repetitions 1 --output /tmp/tiny         # a minute, as a try
    python scripts/benchmark.py --workload lognormal --shapes 64x1 --contestants mbp trainer --output /tmp/large
    python scripts/benchmark.py --workload lognormal --shapes 64x1 --profile    # where the time of a step goes
    python scripts/benchmark.py --workload functions --size smollm2 --device cuda --dtype bfloat16 --output /tmp/gpu

Packages that are compared where they are installed:

    pip install trl==1.16.0
    pip install --no-deps --target /tmp/packages online-dynamic-batching==0.1.2 mbp-pytorch==0.2.6
    PYTHONPATH=/tmp/packages python scripts/benchmark.py

Contestants take turns, several times: what disturbs the machine for a while disturbs all. Each measurement is a process
of its own. Written are all measurements and their summary (.json), a page with tables (.md) and a picture for each
workload (-WORKLOAD.png).
A shape is per_device_train_batch_size x gradient_accumulation_steps: 4x16 has 64 rows a step, read 4 at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import BASELINE, CONTESTANTS, parse_headroom
from benchmarks.flops import peak_flops
from benchmarks.measure import Laboratory, Measurement, Order
from benchmarks.phases import phases_of
from benchmarks.results import summary
from benchmarks.sizes import SIZES
from benchmarks.workloads import WORKLOADS, Shape
from hf_mbp.cli.errors import UserError, run_reporting_errors, user_errors
from machine import machine, versions

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("--workload", nargs="+", choices=WORKLOADS, default=["lognormal", "equal"])
    add("--shapes", nargs="+", metavar="ROWSxBATCHES", help="of each workload [its own]")
    add("--size", choices=SIZES, help="of the model [each workload's own]")
    add("--contestants", nargs="+", choices=CONTESTANTS, help="[all that are installed]")
    add("--repetitions", type=int, default=3, help="[3]")
    add("--steps", type=int, help="optimizer steps, in whole epochs [one epoch]")
    add("--max_tokens", type=int, default=2048, help="cells of a micro-batch of mbp_max_tokens [2048]")
    add("--memory_limit", default="1GiB", help="what mbp_memory_limit may take on top of the model [1GiB]")
    add("--threads", type=int, default=2, help="of torch: OMP_NUM_THREADS [2]")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of forward passes; weights stay float32")
    add("--profile", action="store_true", help="print where the time of MBPTrainer's steps goes, and write nothing")
    add("--output", default=str(ROOT / "docs" / "benchmark"), help="without ending [docs/benchmark]")
    add("--results", type=Path, metavar="JSON", help="measure nothing, and write page and picture of these results")
    return command


def orders_of(options: argparse.Namespace) -> list[Order]:
    """Every measurement, in the order in which they are made.

    Raises:
        UserError: the options contradict each other or the workload.
    """
    if options.repetitions < 1:
        raise UserError(f"--repetitions {options.repetitions}: write at least 1")
    if options.threads < 1:
        raise UserError(f"--threads {options.threads}: write at least 1")
    try:
        headroom = parse_headroom(options.memory_limit)
    except ValueError as error:
        raise UserError(f"--memory_limit: {error}") from error
    contestants = contestants_of(options.contestants)
    orders = [
        Order(
            workload=workload,
            size=options.size or WORKLOADS[workload].size,
            shape=str(shape),
            contestant=contestant,
            repetition=repetition,
            steps=steps_of(workload, shape, options.steps),
            device=options.device,
            dtype=options.dtype,
            max_tokens=options.max_tokens,
            headroom_bytes=headroom,
        )
        for repetition, workload in itertools.product(range(options.repetitions), options.workload)
        for shape in shapes_of(workload, options.shapes)
        for contestant in contestants
        if CONTESTANTS[contestant].takes_part(WORKLOADS[workload], shape)
    ]
    if not orders:
        raise UserError(
            f"--contestants {' '.join(contestants)}: none of them takes part here. TRL's are for language models "
            "(--workload jargon), group_by_length and batch_rebalance for several batches a step (--shapes 8x8)"
        )
    return orders


def contestants_of(asked: list[str] | None) -> list[str]:
    """Those that were asked for, or all that are installed, as they are listed and once each.

    Raises:
        UserError: the package of one that was asked for is not installed.
    """
    for name in asked or []:
        contestant = CONTESTANTS[name]
        if contestant.package and not contestant.is_installed:
            raise UserError(f"--contestants {name}: its package is not installed; {contestant.package.install}")
    return [name for name, contestant in CONTESTANTS.items() if (name in asked if asked else contestant.is_installed)]


def shapes_of(workload: str, asked: list[str] | None) -> list[Shape]:
    """Those that were asked for, or its own.

    Raises:
        UserError: one is no shape, or the rows of the workload do not make whole steps of it.
    """
    own = " ".join(WORKLOADS[workload].shapes)
    try:
        shapes = [Shape.parse(text) for text in asked or WORKLOADS[workload].shapes]
    except ValueError as error:
        raise UserError(f"--shapes: {error}") from error
    num_rows = len(WORKLOADS[workload].lengths())
    for shape in shapes:
        if num_rows % shape.rows_per_step:
            raise UserError(
                f"--shapes {shape}: {shape.rows_per_step} rows a step do not divide the {num_rows} rows of {workload}; "
                f"write for example {own}"
            )
    return shapes


def steps_of(workload: str, shape: Shape, asked: int | None) -> int:
    """Optimizer steps; whole epochs, in which all contestants train the same rows, each in an order of its own.

    Raises:
        UserError: the steps make no whole epochs.
    """
    epoch = len(WORKLOADS[workload].lengths()) // shape.rows_per_step
    if asked is not None and (asked < 1 or asked % epoch):
        raise UserError(f"--steps {asked}: an epoch of {workload} at {shape} has {epoch} steps; write a multiple of it")
    return asked or epoch


def measured(orders: list[Order]) -> list[dict[str, Any]]:
    """The records of all orders; each is told when it is there."""
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(folder)
        records = []
        for order in orders:
            measurement = laboratory.measurement(order)
            print(as_line(order, measurement), flush=True)
            records.append({**asdict(order), **asdict(measurement)})
        return records


def as_line(order: Order, measurement: Measurement) -> str:
    """A measurement in words."""
    what = f"{order.repetition + 1}  {order.workload:<10}{order.shape:<7}{order.contestant:<24}"
    peak = f"{measurement.peak_bytes / MIB:>8,.0f} MiB"
    if measurement.error:
        return f"{what}{peak}  FAILS: {measurement.error.splitlines()[0][:90]}"
    return (
        f"{what}{peak}{measurement.tokens / measurement.seconds:>9,.0f} tokens/s"
        f"{1 - measurement.tokens / measurement.cells:>7.1%} padding{measurement.seconds:>7.1f} s"
        f"{measurement.setup_seconds:>6.1f} s before  loss {measurement.loss:.3f}"
    )


def prepare(options: argparse.Namespace) -> None:
    """Sets the threads of the processes that measure.

    Raises:
        UserError: the device is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU; leave it out for the CPU")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by the processes of the measurements
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep, if other programs want the cores


def report_on(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for, and says where and how it was measured.

    Raises:
        UserError: the options cannot be met.
    """
    if options.results:
        return earlier_report(options.results)
    orders = orders_of(options)
    prepare(options)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
    load, started = os.getloadavg()[0], time.perf_counter()
    records = measured(orders)
    return {
        "machine": f"{machine()}, {options.threads} threads",
        "cores": os.cpu_count(),
        "load_before": load,
        "versions": versions(),
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "seconds": time.perf_counter() - started,
        "settings": {
            "repetitions": options.repetitions,
            "device": options.device,
            "dtype": options.dtype,
            # The two columns of a GPU, and mixed precision on it, have not been tried on one yet.
            "device_bytes": torch.cuda.mem_get_info()[1] if options.device == "cuda" else None,
            "peak_flops": peak_flops(torch.cuda.get_device_name(), options.dtype) if options.device == "cuda" else None,
            "max_tokens": options.max_tokens,
            "headroom_bytes": orders[0].headroom_bytes,
            "baseline": BASELINE,
        },
        "summary": summary(records),
        "measurements": records,
    }


def earlier_report(path: Path) -> dict[str, Any]:
    """A report that was written before, summed up anew.

    Raises:
        UserError: it cannot be read, or has not all that is written today.
    """
    with user_errors("--results"):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not all(asdict(Measurement()).keys() <= record.keys() for record in report["measurements"]):
        raise UserError(f"--results {path}: an earlier version of this script measured less; measure anew")
    return {**report, "summary": summary(report["measurements"])}


def write(report: dict[str, Any], output: Path) -> None:
    """Writes `output` with .json, .md and the pictures, and prints the tables."""
    from benchmarks.page import page, tables
    from benchmarks.picture import draw  # imports matplotlib

    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Path(f"{output}.md").write_text(page(report, output.name), encoding="utf-8")
    draw(report, output)
    print("\n" + tables(report))


def print_phases(options: argparse.Namespace) -> None:
    """Of each workload and shape.

    Raises:
        UserError: the options cannot be met.
    """
    options.contestants, options.repetitions = ["mbp"], 1
    orders = orders_of(options)
    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        processes = Laboratory(folder).processes
        for order in orders:
            print(f"{order.workload}, {order.shape}\n\n{processes.run(phases_of, order, folder)}\n", flush=True)


def main() -> int:
    """Measures and writes; the exit code is 2 after a mistake, 1 if a contestant failed."""
    options = parser().parse_args()
    if options.profile:
        return run_reporting_errors(lambda: print_phases(options), sys.argv[1:])
    reports: list[dict[str, Any]] = []
    mistake = run_reporting_errors(lambda: reports.append(report_on(options)), sys.argv[1:])
    if mistake:
        return mistake
    (report,) = reports
    write(report, Path(options.output))
    return int(any(record["error"] for record in report["measurements"]))


if __name__ == "__main__":
    sys.exit(main())
