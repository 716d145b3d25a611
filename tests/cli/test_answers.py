"""How alike answers are, by hand and by a slower count."""

import pytest

from hf_mbp.cli.answers import answer_f1, exact_match, normalize


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Norman\tConquest.", "norman conquest"),
        ("An apple a day", "apple day"),
        ("theory, anthem", "theory anthem"),  # articles are whole words
        ("U.S.A", "usa"),
        ("the", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_normalize(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


@pytest.mark.parametrize(
    ("answer", "references", "exact"),
    [("the Normans", ["Normans."], 1), ("Normans in France", ["Normans"], 0), ("x", ["y", "X!"], 1), ("", ["the"], 1)],
)
def test_exact_match(answer: str, references: list[str], exact: float) -> None:
    assert exact_match(answer, references) == exact


@pytest.mark.parametrize(
    ("answer", "references", "precision", "recall"),
    [
        ("Normans in France", ["the Normans"], 1 / 3, 1),
        ("b b c", ["b c c d"], 2 / 3, 2 / 4),  # each word as often as it is in both
        ("in France", ["England", "France, in 1066"], 2 / 2, 2 / 3),  # the reference it is most like
    ],
)
def test_f1_is_the_harmonic_mean(answer: str, references: list[str], precision: float, recall: float) -> None:
    assert answer_f1(answer, references) == pytest.approx(2 * precision * recall / (precision + recall))


def test_nothing_in_common_or_nothing_at_all() -> None:
    assert answer_f1("x", ["y"]) == 0
    assert answer_f1("", ["y"]) == 0
    assert answer_f1("a", ["the"]) == 1
