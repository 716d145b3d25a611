"""Answers as texts: how alike two are, by the usual definition, that of the SQuAD data set."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Return an answer in small letters, without punctuation (of ASCII), articles and runs of blanks, in this order.

    >>> normalize("The  cat's  hat.")
    'cats hat'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the normalized answer is one of the normalized references, else 0."""
    return float(normalize(answer) in map(normalize, references))


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of words with the reference that the answer is most like.

    Words of normalized texts, each as often as it occurs: 2 x common / (words of the answer + of the reference). Where
    one of the two has no words, 1 if neither has, else 0.

    >>> answer_f1("the black cat", ["a cat", "dog"])
    0.6666666666666666
    """
    return max(_f1(normalize(answer).split(), normalize(reference).split()) for reference in references)


def _f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))
