"""What all of these tests share."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _garbage_is_left_lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage several times a run, which takes longer than all the rest."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
