"""Rows that are made from others: how words were written, and questions whose answers are where they are said to be."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.data import load_splits
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.preparations import PREPARATIONS, first_sentence, tag_words

DATA = Path(__file__).parents[2] / "recipes" / "data"
GLOSSARY = [
    {"term": "foo", "definition": "n.\nA first thing. It is used a lot."},
    {"term": "bar", "definition": "See foo."},
    {"term": "foo bar", "definition": "vt. To do a second thing (see foo). “Foo bar!”"},
    {"term": "baz", "definition": "[old] A third thing"},
]


def make(name: str, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    arguments = DataArguments(train_file="train.x", **options)
    return list(PREPARATIONS[name].make(Dataset.from_list(rows), arguments))


class TestTaggedWords:
    @pytest.mark.parametrize(
        ("text", "tagged"),
        [
            ("The end.", [("the", "Word"), ("end", "word.")]),
            ("IBM I 370 LaTeX eMail", [("ibm", "WORD"), ("i", "Word"), ("370", "word"), ("latex", "Word")]),
            ("a, b; c: d! e? f.", [*((letter, "word,") for letter in "abc"), *((letter, "word.") for letter in "def")]),
            ("(now “rare.”) e.g., etc....", [("now", "word"), ("rare", "word."), ("e.g", "word,"), ("etc", "word.")]),
            ("a — b _c_ *", [("a", "word"), ("b", "word"), ("c", "word")]),
            ("don't off-by-one foo(1)", [("don't", "word"), ("off-by-one", "word"), ("foo(1", "word")]),
            ("", []),
        ],
    )
    def test_a_tag_shows_how_a_word_was_written(self, text: str, tagged: list[tuple[str, str]]) -> None:
        assert tag_words(text)[: len(tagged) or None] == tagged

    def test_rows(self) -> None:
        (row,) = make("tagged_words", [{"body": "Is it A?", "x": 1}], text_column="body", words_column="w")
        assert row == {"w": ["is", "it", "a"], "tags": ["Word", "word", "Word."]}

    def test_words_are_those_of_the_text(self) -> None:
        """Of real ones: whatever has a letter or digit is a word, in its order."""
        with lzma.open(DATA / "jargon-test.jsonl.xz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["definition"] for line in lines]
        for text in texts:
            chunks = [chunk.lower() for chunk in text.split() if any(map(str.isalnum, chunk))]
            words = [word for word, _ in tag_words(text)]
            assert len(words) == len(chunks)
            assert all(word in chunk for word, chunk in zip(words, chunks, strict=True))


class TestGlossaryQuestions:
    def test_the_context_is_three_entries_and_the_answer_one_of_their_sentences(self) -> None:
        rows = make("glossary_questions", GLOSSARY, question_column="term", context_column="definition")
        assert [row["term"] for row in rows] == ["foo", "foo bar", "baz"]  # "See foo." is no answer, but is read
        first, second, third = rows
        assert (
            first["definition"]
            == second["definition"]
            == "\n\n".join(f"{entry['term']}\n{entry['definition']}" for entry in GLOSSARY[:3])
        )
        assert third["definition"] == "baz\n[old] A third thing"
        answers = ["A first thing.", "To do a second thing (see foo).", "A third thing"]
        assert [row["answers"]["text"] for row in rows] == [[answer] for answer in answers]
        for row in rows:
            (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["definition"][start:].startswith(text)

    @pytest.mark.parametrize(
        ("meaning", "sentence"),
        [
            ("n.\n1. [Usenet] (rare) A thing: so. Or not.", "A thing: so."),
            ("n.,vt. /foo/, Of no use at all", "Of no use at all"),
            ("adj.\n“It is so.” Said often.", "“It is so.”"),
            ("A thing of v. 2.1 and so on, e.g. this one. Or", "A thing of v. 2.1 and so on, e.g. this one."),
            ("n.\nSyn. foo.\nA thing to see.", "A thing to see."),
        ],
    )
    def test_first_sentence(self, meaning: str, sentence: str) -> None:
        assert first_sentence(meaning) == [(meaning.index(sentence), sentence)]

    @pytest.mark.parametrize("meaning", ["See foo.", "n.\n", ""])
    def test_no_sentence(self, meaning: str) -> None:
        assert first_sentence(meaning) == []

    def test_answers_of_the_real_glossary_are_in_its_contexts(self) -> None:
        arguments = DataArguments(
            train_file=str(DATA / "jargon-test.jsonl.xz"),
            preparation="glossary_questions",
            question_column="term",
            context_column="definition",
        )
        rows = load_splits(arguments, Path(), seed=0).train
        assert 180 < len(rows) <= 200
        for row in rows:
            (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["definition"][start : start + len(text)] == text
            assert row["definition"].rindex(row["term"], 0, start) >= 0


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preparation": "magic"}, "preparation is 'magic'; write one of tagged_words, glossary_questions"),
            ({"preparation": "tagged_words"}, r"has no column 'text' \(option text_column\); its columns are a"),
            ({"preparation": "glossary_questions"}, r"has no column 'question' \(option question_column\)"),
            (
                {"preparation": "glossary_questions", "question_column": "a", "context_column": "a"},
                "prepared as glossary_questions, has no rows",
            ),
        ],
    )
    def test_are_told(self, write_rows: Any, options: dict[str, Any], message: str) -> None:
        file = write_rows("rows.jsonl", [{"a": "b"}])
        with pytest.raises(UserError, match=message):
            load_splits(DataArguments(train_file=str(file), **options), Path(), seed=0)

    def test_texts_must_be_text(self) -> None:
        with pytest.raises(UserError, match="column 'text' must hold text, but has 3"):
            make("tagged_words", [{"text": 3}])


def test_rows_are_chosen_before_they_are_prepared(write_rows: Any) -> None:
    """So max_eval_samples is about what the user has, and validation_fraction divides it: no context is in both."""
    file = write_rows("rows.jsonl", GLOSSARY * 2)
    arguments = DataArguments(
        train_file=str(file),
        validation_file=str(file),
        preparation="glossary_questions",
        question_column="term",
        context_column="definition",
        max_train_samples=1,
    )
    splits = load_splits(arguments, Path(), seed=0)
    assert splits.train["term"][:] == ["foo"]
    assert splits.validation is not None
    assert splits.validation["term"][:] == ["foo", "foo bar", "baz", "foo", "foo bar", "baz"]
