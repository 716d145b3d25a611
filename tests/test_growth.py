"""The script that measures growth measures what it says, in its short form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import growth

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_growth_is_measured_for_both_trainers(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "scripts/growth.py", "--quick", "--output", str(tmp_path / "growth"))
    done = subprocess.run(  # noqa: S603
        command, env=environment, timeout=290, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads((tmp_path / "growth.json").read_text())
    assert {(r["trainer"], r["along"]) for r in records} == {
        (trainer, along) for trainer in growth.TRAINERS for along in ("rows a step", "rows of the data set")
    }
    assert all(record["microseconds_a_row"] > 10 for record in records)
    assert all(record["peak_bytes"] > 2**20 for record in records)
    assert growth.table_row(records[0]) in done.stdout
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_simulated_rows_are_alike_each_time() -> None:
    rows = growth.SimulatedRows(10**7)
    assert len(rows) == 10**7
    assert rows[3] == rows[3]
    assert rows[3] != rows[4]
    lengths = {len(rows[index]["input_ids"]) for index in range(50)}
    assert len(lengths) > 20
