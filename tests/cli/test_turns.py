"""What processes do one after the other, and what together: a second process is played by the state of Accelerate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_mbp.cli.finetune import prepare
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.turns import first_process_first


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, and when this process waits for the others."""
    noted: list[str] = []
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda _: noted.append("wait"))
    return noted


@pytest.mark.parametrize(("is_first", "expected"), [(True, ["work", "wait"]), (False, ["wait", "work"])])
def test_the_first_one_goes_first(
    events: list[str], monkeypatch: pytest.MonkeyPatch, is_first: bool, expected: list[str]
) -> None:
    monkeypatch.setattr(PartialState, "is_local_main_process", is_first)
    with first_process_first():
        events.append("work")
    assert events == expected


def test_nobody_waits_for_one_that_fails(events: list[str]) -> None:
    with pytest.raises(OSError, match="unreadable"), first_process_first():
        raise OSError("unreadable")
    assert events == ["wait"]


def test_rows_are_made_by_the_first_alone_and_models_by_all(
    recipe: Callable[..., Path], events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 all processes have to load the model at once: each gets a part of every layer."""
    load, tokenize = AutoModelForSequenceClassification.from_pretrained, Dataset.map

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return function(*args, **options)

        return noted

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", noting("load", load))
    monkeypatch.setattr(Dataset, "map", noting("tokenize", tokenize))
    prepare(read_recipe([str(recipe())]))
    assert events == ["wait", "tokenize", "tokenize", "wait", "load"]
