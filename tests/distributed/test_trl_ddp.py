"""Two processes with `MBPMixin` do what stock TRL does in one process with all their rows."""

from pathlib import Path

import pytest

from tests.distributed.launching import launch
from tests.distributed.trl_worker import NAMES, rows_of
from tests.test_trl import assert_same_gradients, assert_same_logs
from tests.trl_runs import CASES, Outcome, outcome_of, trainer_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """The outcomes of all cases on each of two ranks, from one launch."""
    saved = launch("trl_worker", tmp_path_factory.mktemp("ranks"))
    return [{name: Outcome(**outcome) for name, outcome in outcomes.items()} for outcomes in saved]


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_with_less_waits_with_fillers(name: str, ranks: list[dict[str, Outcome]]) -> None:
    """What the other tests rest on: the ranks are as uneven as they should be, and still run equally often."""
    busy, idle = (rank[name].plans for rank in ranks)
    for step in range(2):
        assert len(busy[step]) == len(idle[step]) >= 4
        assert sum(num_rows for num_rows, _, _ in busy[step]) == 8
        assert sum(cells for _, cells, _ in busy[step]) > 3 * 64
    assert sum(num_rows for num_rows, _, _ in idle[0]) == 8
    assert sum(cells for _, cells, _ in idle[0]) < 64 * len(idle[0]) / 2  # alone it would have run less often
    assert [num_rows for num_rows, _, _ in idle[1]] == [1, 1, 1] + [0] * (len(busy[1]) - 3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_logs_are_those_of_one_process(
    name: str, ranks: list[dict[str, Outcome]], tmp_path: Path
) -> None:
    case = CASES[name]
    whole = outcome_of(trainer_of(case, rows_of(name), tmp_path, split=False, train_sampling_strategy="sequential"))
    for rank in ranks:
        assert_same_gradients(case, whole, rank[name])
        assert_same_logs(case, whole, rank[name])
