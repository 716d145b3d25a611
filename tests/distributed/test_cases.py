"""Weights after training on several processes are those of plain PyTorch on the rows of all of them."""

from pathlib import Path

import pytest

from tests.distributed.errors import PAGE, label
from tests.distributed.reference import DEEPSPEED, GROUPS, compared


@pytest.mark.parametrize("group", GROUPS)
def test_weights_are_those_of_plain_pytorch(group: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    if "ZeRO" in group and not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not installed; scripts/test.sh installs it")
    saved = GROUPS[group].run(tmp_path)
    for name, case in GROUPS[group].cases.items():
        with subtests.test(name):
            comparison = compared(case, saved[name])
            assert comparison.expected_steps >= 1
            assert set(comparison.steps) == {comparison.expected_steps}
            assert comparison.weights < (1e-12 if case.is_in_float64 else 1e-5)
            assert comparison.losses < 1e-6


def test_the_table_has_a_line_for_each_case() -> None:
    lines = PAGE.read_text().splitlines()
    for group in GROUPS.values():
        for name, case in group.cases.items():
            assert sum(line.startswith(label(name, case, group.ranks)) for line in lines) == 1, name
