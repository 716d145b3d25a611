"""Value objects out of JSON: every field has its type, and what has not is named."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from hf_mbp.json_fields import value_object


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: float
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    share: float | None = None
    inner: Inner | None = None
    parts: tuple[Inner, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    is_new: bool = False


def test_integers_become_numbers_that_numpy_takes() -> None:
    share = value_object(Outer, {"count": 1, "share": 2**70}, "it").share
    assert (share, type(share)) == (2.0**70, float)


def test_what_is_right() -> None:
    kept = {
        **{"count": 3, "share": None, "inner": {"size": 1, "name": "a"}, "parts": [{"size": 0.5}]},
        **{"names": {"x": "y"}, "anything": {"z": [None, 1]}, "is_new": True},
    }
    assert value_object(Outer, kept, "it") == Outer(
        count=3,
        inner=Inner(size=1, name="a"),
        parts=(Inner(size=0.5),),
        names={"x": "y"},
        anything={"z": [None, 1]},
        is_new=True,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "3"}, "it.count is '3'"),
        ({"count": 3.0}, "it.count is 3.0"),
        ({"count": True}, "it.count is True"),
        ({"count": None}, "it.count is None"),
        ({"share": float("nan")}, "it.share is nan"),
        ({"share": float("inf")}, "it.share is inf"),
        ({"share": 10**400}, "it.share is 10000"),
        ({"inner": []}, r"it.inner is \[\]"),
        ({"inner": {}}, "it.inner has no 'size'"),
        ({"inner": {"size": 1, "x": 2}}, "it.inner has 'x', which is not known"),
        ({"parts": {"size": 1}}, "it.parts is {'size': 1}"),
        ({"parts": [{"size": 1}, 2]}, r"it.parts\[1\] is 2"),
        ({"names": {"x": 1}}, "it.names.x is 1"),
        ({"names": "x"}, "it.names is 'x'"),
        ({"anything": []}, r"it.anything is \[\]"),
        ({"is_new": 1}, "it.is_new is 1"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        value_object(Outer, {"count": 1, **changes}, "it")


def test_no_dictionary() -> None:
    with pytest.raises(ValueError, match=r"^it is 'x'"):
        value_object(Outer, "x", "it")
