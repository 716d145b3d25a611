"""Two hosts that are started by `accelerate launch`: the update of one process, the loss of the link, going on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.distributed import host_worker
from tests.distributed.hosts import ADDRESSES, INTERFACE, Hosts, two_hosts
from tests.distributed.launching import ROOT, SECONDS
from tests.helpers import Pad

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RANK_TIMEOUT = 10.0
"""Seconds; half of it would do, but the processes may share a core with others."""

CONFIG = "recipes/accelerate/several_machines.yaml"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


@dataclass(frozen=True, kw_only=True)
class Launched:
    """The launchers of a run, one a host, and the folder that the hosts share."""

    processes: list[Any]
    folder: Path

    def wait(self) -> list[int]:
        """Their exit codes; fails if they do not end, long before `ddp_timeout`, half an hour, would end them."""
        end = time.monotonic() + SECONDS
        try:
            return [process.wait(timeout=max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            return pytest.fail(f"the hosts hang: no end after {SECONDS} s.\n{self.told(0)}\n{self.told(1)}")
        finally:
            for process in self.processes:
                process.terminate()  # which ends the ranks as well
                process.wait(timeout=60)

    def told(self, host: int) -> str:
        return (self.folder / f"errors{host}").read_text()[-4000:]

    def line(self, host: int) -> str:
        """What the library says on a host about the failure of the other."""
        (line,) = [line for line in self.told(host).splitlines() if line.startswith("hf_mbp: ")]
        return line

    def trained(self) -> list[dict[str, Any]]:
        """What each host saved at the end."""
        assert self.wait() == [0, 0], self.told(0) + self.told(1)
        return [torch.load(self.folder / f"rank{rank}.pt") for rank in (0, 1)]


def launch(hosts: Hosts, folder: Path, *options: str) -> Launched:
    """Starts a launcher on each host, as its user would."""
    # A host's own name may stand for its loopback address, which the other host cannot reach.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", CONFIG]
    command += ["--main_process_ip", ADDRESSES[0], "--num_processes", "2"]
    script = ["--module", "tests.distributed.host_worker", str(folder), "--rank_timeout", str(RANK_TIMEOUT), *options]
    processes: list[Any] = []
    for host in (0, 1):
        with (folder / f"errors{host}").open("w") as errors:
            processes.append(
                subprocess.Popen(  # noqa: S603
                    hosts.on(host, [*command, "--machine_rank", str(host), *script]),
                    cwd=ROOT,
                    env={**environment, "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            )
    return Launched(processes=processes, folder=folder)


def plain_weights() -> dict[str, torch.Tensor]:
    """The same run in plain PyTorch, in one process, on the whole batch of each step."""
    model, rows, pad = host_worker.model().train(), host_worker.rows(), Pad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=host_worker.LEARNING_RATE, weight_decay=0.0)
    for start in range(0, len(rows), host_worker.ROWS_A_STEP):
        model(**pad(rows[start : start + host_worker.ROWS_A_STEP])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def whole(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run that nothing happens to."""
    return launch(hosts, tmp_path_factory.mktemp("whole")).trained()


def test_weights_are_those_of_plain_pytorch(whole: list[dict[str, Any]]) -> None:
    expected = plain_weights()
    for host in whole:
        torch.testing.assert_close(host["weights"], expected, rtol=1e-9, atol=1e-9)
    assert min(log["mbp_micro_batches"] for log in whole[0]["log"] if "mbp_micro_batches" in log) > 1


def test_a_run_that_lost_the_link_ends_with_the_cause_and_goes_on(
    hosts: Hosts, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    cut = launch(hosts, tmp_path, "--waits")
    end = time.monotonic() + SECONDS
    while not all((tmp_path / f"waits{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end, cut.told(0) + cut.told(1)
        time.sleep(0.1)
    hosts.set_link("down")
    try:
        (tmp_path / "cut").touch()
        assert cut.wait() == [1, 1]
    finally:
        hosts.set_link("up")
    assert cut.line(0).startswith("hf_mbp: rank 1 (process ")
    assert cut.line(1).startswith("hf_mbp: the launcher on the first machine, with which the ranks keep in touch")
    for host in (0, 1):
        assert (
            "has given no sign of life for 6 s: its process was killed or suspended, or its host is gone"
            in cut.line(host)
        )
    assert not list(tmp_path.glob("rank*.pt"))
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    resumed = launch(hosts, tmp_path, "--resume").trained()
    for ours, expected in zip(resumed, whole, strict=True):
        torch.testing.assert_close(ours["weights"], expected["weights"], rtol=0, atol=0)
