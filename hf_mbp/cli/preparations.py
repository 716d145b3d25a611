"""Rows made from other rows: a task for which no data are at hand can be tried on plain texts or on a glossary.

A new preparation is a function here and a line in ``PREPARATIONS``. It keeps the order of the rows and draws nothing at
random, so that the same rows always give the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datasets import Dataset

from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.tokenization import Batch, texts

ENTRIES_A_CONTEXT = 3
"""Entries of a glossary that are one context: the answer has to be found, and the context is longer than a window."""

_FEWEST_WORDS = 3
"""Of a sentence that is an answer; what is shorter is a mark such as ``adj.``"""

# Of the end of a sentence, and of a pause in it. Rarer marks would be tags of their own with hardly a row.
_ENDS, _PAUSES = ".?!", ",;:"
_WORD = re.compile(r"[^\W_](?:\S*[^\W_])?")  # from the first letter or digit to the last
# In front of what a word means: its number, its kind (n., vt.), where it is from [...], a remark (...), how it sounds.
_MARKS = re.compile(r"(?:(?:\d+\.|(?:[a-z]+\.,?)+|\[[^\]]*\]|\([^)]*\)|/[^/]*/,?)(?:\s+|\Z))+")
# Quotation marks of typesetters, closing and opening
_CLOSING, _OPENING = "\u201d\u2019", "\u201c\u2018"
_SENTENCE = re.compile(rf".+?(?:[.?!][{_CLOSING})]*(?=\s+[A-Z{_OPENING}(\[]|\Z)|\Z)")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What makes the rows, and the options that name the columns it reads."""

    options: tuple[str, ...]
    make: Callable[[Dataset, DataArguments], Dataset]


def find_preparation(name: str) -> Preparation:
    """Return a preparation.

    Raises:
        UserError: there is no such preparation.
    """
    if name not in PREPARATIONS:
        raise UserError(f"preparation is {name!r}; write one of {', '.join(PREPARATIONS)}")
    return PREPARATIONS[name]


def tagged_words(rows: Dataset, arguments: DataArguments) -> Dataset:
    """Make words and tags of texts: the tags say how the words, which are bare and in small letters, were written."""

    def make(batch: Batch) -> Batch:
        tagged = [tag_words(text) for text in texts(batch, arguments.text_column)]
        return {
            arguments.words_column: [[word for word, _ in row] for row in tagged],
            arguments.tags_column: [[tag for _, tag in row] for row in tagged],
        }

    return rows.map(make, batched=True, remove_columns=rows.column_names, desc="tagging words")


def tag_words(text: str) -> list[tuple[str, str]]:
    """Return the words of a text, bare and in small letters, each with a picture of how it was written.

    The picture is ``word``, ``Word`` or ``WORD``, and a ``.`` where a sentence ends (also by ? or !) or a ``,`` where
    it pauses (also by ; or :). What has neither letters nor digits is no word.

    >>> tag_words("Wow! See the IBM 370, (now rare).")[:4]
    [('wow', 'Word.'), ('see', 'Word'), ('the', 'word'), ('ibm', 'WORD')]
    """
    chunks = ((chunk, _WORD.search(chunk)) for chunk in text.split())
    return [
        (word[0].lower(), _capitals(word[0]) + _mark(chunk[word.end() :])) for chunk, word in chunks if word is not None
    ]


def _capitals(word: str) -> str:
    if word.isupper() and len(word) > 1:
        return "WORD"
    return "Word" if word[0].isupper() else "word"


def _mark(behind: str) -> str:
    marks = ["." if mark in _ENDS else "," for mark in behind if mark in _ENDS + _PAUSES]
    return marks[-1] if marks else ""


def glossary_questions(rows: Dataset, arguments: DataArguments) -> Dataset:
    """Make questions of a glossary's terms: the context is a few entries, the answer the first sentence of one of them.

    ``question_column`` has the terms and ``context_column`` what they mean. An entry without a sentence is context
    only.
    """
    question, context = arguments.question_column, arguments.context_column

    def make(batch: Batch) -> Batch:
        made: Batch = {question: [], context: [], arguments.answers_column: []}
        entries = list(zip(texts(batch, question), texts(batch, context), strict=True))
        text = "\n\n".join(f"{term}\n{meaning}" for term, meaning in entries)
        end = 0
        for term, meaning in entries:
            start = end + len(term) + 1
            end = start + len(meaning) + 2
            for position, sentence in first_sentence(meaning):
                made[question].append(term)
                made[context].append(text)
                made[arguments.answers_column].append({"text": [sentence], "answer_start": [start + position]})
        return made

    return rows.map(
        make, batched=True, batch_size=ENTRIES_A_CONTEXT, remove_columns=rows.column_names, desc="making questions"
    )


def first_sentence(meaning: str) -> list[tuple[int, str]]:
    """Return where the first sentence of a definition starts, and the sentence; nothing if there is none.

    >>> first_sentence("n.\\n[from slang] 1. A thing of no use. It has many names.")
    [(19, 'A thing of no use.')]
    """
    for line in re.finditer(r"[^\n]+", meaning):
        marks = _MARKS.match(meaning, line.start(), line.end())
        sentence = _SENTENCE.match(meaning, marks.end() if marks else line.start(), line.end())
        if sentence and len(sentence[0].split()) >= _FEWEST_WORDS:
            return [(sentence.start(), sentence[0])]
    return []


PREPARATIONS: Mapping[str, Preparation] = {
    "tagged_words": Preparation(options=("text_column",), make=tagged_words),
    "glossary_questions": Preparation(options=("question_column", "context_column"), make=glossary_questions),
}
