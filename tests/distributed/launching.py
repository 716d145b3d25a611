"""Starts the processes of a distributed test, and brings back what each of them saved."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

SECONDS = 420
"""Several times what a launch needs on a busy machine of two cores; ranks that wait for each other fail then."""

ON_CPUS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def fork_server() -> ForkServerContext:
    """What forks ranks from a process that has imported everything: a start takes a tenth of a second, not many."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.failing_worker"])
    return context


def run(worker: str, *arguments: Any, ranks: int = 2, **environment: str) -> tuple[int, str]:
    """Has torch's launcher run `tests.distributed.<worker>`; its exit code, and what was said; fails if all hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])])
    launched: Any = subprocess.Popen(  # noqa: S603
        [*command, "-m", f"tests.distributed.{worker}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **ON_CPUS, "PYTHONPATH": paths, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = launched.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        launched.terminate()  # which ends the ranks as well
        _, errors = launched.communicate()
        pytest.fail(f"the ranks hang: no end after {SECONDS} s.\n{errors[-4000:]}")
    return launched.returncode, errors


def launch(worker: str, folder: Path, *arguments: Any, ranks: int = 2, **environment: str) -> list[Any]:
    """Runs `tests.distributed.<worker>` and returns what each rank saved; fails if one fails.

    The ranks are forked, unless they need an environment of their own when they import their libraries.
    """
    if environment:
        code, errors = run(worker, folder, *arguments, ranks=ranks, **environment)
        assert code == 0, errors[-8000:]
    else:
        _fork(worker, folder, [str(folder), *map(str, arguments)], ranks)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _fork(worker: str, folder: Path, arguments: Sequence[str], ranks: int) -> None:
    # The ranks meet where this process listens, as they do with torch's launcher: no port is given away in between.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        **ON_CPUS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(fork_server().Process(target=_be_rank, args=(worker, arguments, own, _said(folder, rank))))
        processes[-1].start()
    try:
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    said = "\n".join(_said(folder, rank).read_text()[-4000:] for rank in range(ranks))
    assert codes == [0] * ranks, f"exit codes {codes} (-9: it was ended here, after {SECONDS} s or another)\n{said}"


def _said(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _be_rank(worker: str, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers of data loaders start as they would elsewhere
    with said.open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    name = f"tests.distributed.{worker}"
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended well, or one has not, or it takes too long."""
    end, running = time.monotonic() + SECONDS, list(processes)
    while running and not any(process.exitcode for process in processes):
        if not wait([process.sentinel for process in running], timeout=end - time.monotonic()):
            return
        running = [process for process in running if process.is_alive()]
