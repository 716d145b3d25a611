"""The scripts that show what the library is for do show it, in their short forms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = (sys.executable, *command)
    return subprocess.run(  # noqa: S603
        command, env=environment, timeout=290, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_a_mini_batch_as_large_as_the_data_set(tmp_path: Path) -> None:
    """The numbers are judged here anew, not by the script, which asks more of the peaks of larger runs: of such small
    ones, code that is read into memory meanwhile is a part."""
    done = run("scripts/paper_claim.py", "--quick", "--output", str(tmp_path / "claim"))
    (result,) = json.loads((tmp_path / "claim.json").read_text())
    headroom = result["headroom_bytes"]
    assert "can't allocate memory" in result["stock"]["error"]
    assert result["unlimited"]["peak_bytes"] > 2 * headroom, "the limit is too wide to prove anything"
    assert len(result["limited"]["losses"]) == 2
    assert result["limited"]["losses"] == pytest.approx(result["unlimited"]["losses"], rel=1e-5)
    assert result["limited"]["micro_batches"] > 1
    peaks = [outcome["peak_bytes"] for outcome in (result["limited"], *result["multiples"].values())]
    assert max(peaks) < 1.02 * headroom, done.stdout
    assert result["most_rows"] < result["data_set_rows"]
    assert (tmp_path / "claim.png").stat().st_size > 10_000
    page = (tmp_path / "claim.md").read_text()
    assert "| `Trainer` | 192 | 48 MiB | **fails**" in page


@pytest.mark.slow
def test_a_long_run_keeps_under_its_limit(tmp_path: Path) -> None:
    done = run("scripts/long_run.py", "--steps", "12", "--output", str(tmp_path / "long"))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "long.json").read_text())
    assert result["steps"] == len(result["peak_bytes"]) == 12
    assert 0 < max(result["peak_bytes"]) <= result["headroom_bytes"]
    assert max(result["micro_batches"]) > 1
    assert not result["error"]
    assert "can't allocate memory" in result["plain"]["error"]
    assert result["plain"]["steps"] < 12, "the limit is too wide to prove anything"
    assert (tmp_path / "long.png").stat().st_size > 10_000
