"""The soak counts, finds what grows, and nothing grows in a short one."""

import gc
import json
import sys
from pathlib import Path

import pytest

import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")


def counts(**slopes: float) -> list[dict[str, int]]:
    """Of a run in which something grows by so much a step, with a little noise."""
    level = {"resident_bytes": 5e8, "objects": 2e6, "files": 12, "threads": 4, "children": 1}
    return [
        {"step": step, **{name: int(level[name] + slopes.get(name, 0) * step + step % 300 // 200) for name in level}}
        for step in range(100, 10_001, 100)
    ]


@pytest.mark.parametrize(
    ("name", "slope"),
    [("resident_bytes", 512), ("objects", 1), ("files", 0.001), ("threads", 0.001), ("children", 0.01)],
)
def test_what_grows_is_found(name: str, slope: float) -> None:
    assert soak.what_grows(counts(**{name: slope})) == [name]


def test_what_does_not_grow_is_not() -> None:
    assert soak.what_grows(counts()) == []
    assert "| open files | 12 to 13 | 12 to 13 |  |" in soak.table(counts())


def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in soak.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--steps", "40", "--output", str(tmp_path / "soak")])
    try:
        code = soak.main()
    finally:
        gc.unfreeze()
    result = json.loads((tmp_path / "soak.json").read_text())
    assert code == bool(soak.what_grows(result["counts"])), "so few steps warm up, and what grows then is no matter"
    assert (result["steps"], result["evaluations"], result["epochs"]) == (40, 20, 4)
    assert [count["step"] for count in result["counts"]] == list(range(1, 41))
    children, files = ([count[name] for count in result["counts"]] for name in ("children", "files"))
    assert max(children) == min(children) + 1, "a worker, now and then, beside those of other tests"
    assert max(files) > min(files) > 3
    assert result["micro_batches"] > 1
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    assert soak.table(result["counts"]) in capsys.readouterr().out
