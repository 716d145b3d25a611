"""Entities and their F1 against a plain definition of the same."""

import random

import pytest

from hf_mbp.cli.entities import are_entity_tags, entities, entity_f1

TAGS = ["O", "B-A", "I-A", "B-B", "I-B"]


def is_entity(tags: list[str], kind: str, start: int, end: int) -> bool:
    before = tags[start - 1] if start else "O"
    begins = tags[start] == f"B-{kind}" or (tags[start] == f"I-{kind}" and before not in (f"B-{kind}", f"I-{kind}"))
    goes_on = all(tag == f"I-{kind}" for tag in tags[start + 1 : end])
    return begins and goes_on and (end == len(tags) or tags[end] != f"I-{kind}")


@pytest.mark.parametrize("seed", range(20))
def test_entities_and_f1(seed: int) -> None:
    generator = random.Random(seed)
    references = [generator.choices(TAGS, k=generator.randrange(9)) for _ in range(6)]
    predictions = [[tag if generator.random() < 0.7 else generator.choice(TAGS) for tag in row] for row in references]

    def all_of(rows: list[list[str]]) -> set[tuple[int, str, int, int]]:
        return {
            (index, kind, start, end)
            for index, tags in enumerate(rows)
            for kind in "AB"
            for start in range(len(tags))
            for end in range(start + 1, len(tags) + 1)
            if is_entity(tags, kind, start, end)
        }

    predicted, expected = all_of(predictions), all_of(references)
    assert {(index, *entity) for index, tags in enumerate(references) for entity in entities(tags)} == expected
    precision = len(predicted & expected) / len(predicted)
    recall = len(predicted & expected) / len(expected)
    assert entity_f1(predictions, references) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(("predicted", "score"), [(["O", "O"], 0), (["B-A", "O"], 0), (["B-A", "I-A"], 1)])
def test_what_is_not_whole_is_not_found(predicted: list[str], score: float) -> None:
    assert entity_f1([predicted], [["B-A", "I-A"]]) == score


def test_no_entities_at_all() -> None:
    assert entity_f1([["O"]], [["O"]]) == 0
    assert entity_f1([], []) == 0


@pytest.mark.parametrize(
    ("names", "are"),
    [(TAGS, True), (["B-A"], True), (["O"], False), (["noun", "O"], False), (["B-", "O"], False), ([], False)],
)
def test_which_tags_mark_entities(names: list[str], are: bool) -> None:
    assert are_entity_tags(names) is are
