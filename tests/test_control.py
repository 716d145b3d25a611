"""A budget shrinks before the limit, grows back slowly, and stays below what failed."""

import json
from dataclasses import replace
from math import inf

import pytest

from hf_mbp import control
from hf_mbp.control import Reading, adapted, after_failure, wanted
from hf_mbp.memory import Room
from hf_mbp.plan import Budget
from hf_mbp.profile import MOST_EVENTS, Profile

ROOM = Room(allowed_bytes=1_000_000, resting_bytes=200_000)


def profile(max_bytes: float = 800_000.0) -> Profile:
    budget = Budget(max_bytes=max_bytes, bytes_per_cell=100.0, bytes_per_pair=1.0)
    return Profile(key={}, options={"max_tokens": None}, budget=budget, room=ROOM)


def capped(max_tokens: int = 1000) -> Profile:
    return Profile(key={}, options={"max_tokens": max_tokens}, budget=Budget(max_tokens=max_tokens))


def reading(peak: float, planned: float, rows: int = 4) -> Reading:
    return Reading(peak_bytes=peak, planned_bytes=planned, num_rows=rows)


@pytest.mark.parametrize("excess", [0.98, 1.0, 1.2])
def test_a_peak_close_to_the_limit_shrinks_to_what_would_have_left_a_margin(excess: float) -> None:
    seen = reading(excess * 1_000_000, 700_000)
    smaller = adapted(profile(), 5, wanted(profile(), seen), seen)
    per_planned = (excess * 1_000_000 - 200_000) / 700_000
    assert smaller.cap * per_planned + 200_000 == pytest.approx(control.AIM * 1_000_000)
    (event,) = smaller.events
    assert (event.step, event.what, event.before, event.after) == (5, "max_bytes", 800_000, smaller.cap)
    assert ("which is more than" if excess > 1 else "which is close to") in event.why


def test_steps_of_a_device_that_takes_its_share_more_come_to_rest_below_the_limit() -> None:
    """A device that takes half as much again as predicted, and one that takes half."""
    for factor in (1.5, 0.5):
        now, peaks = profile(), []
        for step in range(1, 200):
            seen = reading(200_000 + factor * now.cap, now.cap)
            peaks.append(seen.peak_bytes / 1_000_000)
            now = adapted(now, step, wanted(now, seen), seen)
        assert all(0.85 <= peak <= control.SHRINK_ABOVE for peak in peaks[-50:])
        assert len(now.events) < 12


def test_margins_of_a_small_room_are_shares_of_it() -> None:
    """Beside weights that take 99 %, a budget aims at four fifths of what is left, and shrinks at nine tenths."""
    small = Room(allowed_bytes=1_000_000, resting_bytes=990_000)
    in_room = [(control.share_of(small, share) - 990_000) / 10_000 for share in (control.AIM, control.SHRINK_ABOVE)]
    assert in_room == [pytest.approx(0.79), pytest.approx(0.91)]


def test_one_large_step_in_fifty_is_remembered() -> None:
    """Most steps take much less than what is predicted, but the budget has to be right for the others, too."""
    now, beyond = profile(), []
    for step in range(1, 3001):
        peak = 200_000 + (1.0 if step % 50 == 0 else 0.7) * now.cap
        beyond += [step] * (peak > 1_000_000)
        now = adapted(now, step, wanted(now, reading(peak, now.cap)), reading(peak, now.cap))
    assert beyond == [50]
    assert now.cap + 200_000 == pytest.approx(control.AIM * 1_000_000)
    assert now.num_events == len(now.events) < 10


def test_a_limit_that_was_met_is_tried_again_after_a_while() -> None:
    high = reading(990_000, 800_000)
    now = adapted(profile(), 1, wanted(profile(), high), high)
    lowered, caps = now.cap, []
    for step in range(2, 600):
        low = reading(200_000 + 0.5 * now.cap, now.cap)
        now = adapted(now, step, wanted(now, low), low)
        caps.append(now.cap)
    assert set(caps[: control.FAILURE_HOLDS - 2]) == {lowered}
    assert caps[-1] > 1.3 * lowered


def test_what_one_rank_measured_alone_changes_no_profile() -> None:
    """Ranks agree on a cap; their own readings differ, and their profiles must not."""
    mine, others = reading(930_000, 800_000), reading(400_000, 800_000)
    agreed = min(wanted(profile(), mine), wanted(profile(), others))
    assert adapted(profile(), 16, agreed, mine) == adapted(profile(), 16, agreed, others)


def test_the_last_events_are_kept_and_all_are_counted() -> None:
    now = profile()
    for step in range(250):
        now = now.with_cap(1000.0 + step, step, "a test")
    assert (len(now.events), now.num_events) == (MOST_EVENTS, 250)
    assert now.events[-1].step == 249
    assert Profile.from_json(json.loads(json.dumps(now.to_json()))) == now


@pytest.mark.parametrize(("before", "cap"), [(profile(), 800_000.0), (capped(), 1000.4)])
def test_no_change_is_no_event(before: Profile, cap: float) -> None:
    assert before.with_cap(cap, 3, "a test") is before


def test_profiles_of_before_there_was_a_ceiling_are_read() -> None:
    kept = profile().with_cap(7000.0, 2, "a test").to_json()
    del kept["ceiling"], kept["num_events"]
    assert Profile.from_json(kept) == profile().with_cap(7000.0, 2, "a test")


def test_growing_is_slow() -> None:
    low = reading(300_000, 800_000)
    assert adapted(profile(), 5, wanted(profile(), low), low).cap == 800_000
    grown = adapted(profile(), 8, wanted(profile(), low), low)
    assert grown.cap == pytest.approx(880_000)
    assert adapted(grown, 15, wanted(grown, low), low) is grown
    assert adapted(grown, 16, wanted(grown, low), low).cap == pytest.approx(968_000)


@pytest.mark.parametrize(
    "seen", [reading(300_000, 500_000), reading(990_000, 700_000, rows=1), reading(990_000, 0), reading(300_000, 0)]
)
def test_what_says_nothing_about_the_budget_changes_nothing(seen: Reading) -> None:
    assert wanted(profile(), seen) == inf
    assert adapted(profile(), 50, inf, seen) == profile()


@pytest.mark.parametrize("before", [profile(), capped()])
def test_what_failed_no_longer_fits_and_stays_out_for_long(before: Profile) -> None:
    now = after_failure(before, 10, 60, step=3)
    assert before.budget.fits(10, 60)
    assert not now.budget.fits(10, 60)
    assert now.cap == before.size_of(10, 60) / 2
    unknown = Reading()
    caps = []
    for step in range(4, 900):
        now = adapted(now, step, wanted(now, unknown), unknown)
        caps.append(now.cap)
    assert max(caps[:490]) <= control.BELOW_FAILURE * before.size_of(10, 60)
    assert max(caps[:490]) > 0.8 * before.size_of(10, 60)
    assert caps[-1] == before.cap == now.most


def test_profiles_go_through_json() -> None:
    kept = after_failure(profile(), 10, 60, step=3).with_checkpointing(512, 4)
    full = reading(930_000, kept.cap)
    kept = adapted(kept, 5, wanted(kept, full), full)
    assert kept.ceiling is not None
    text = json.dumps(kept.to_json())
    assert Profile.from_json(json.loads(text)) == kept
    assert json.loads(text)["events"][0]["from"] == 800_000
    with pytest.raises(ValueError, match="version 7 is not known"):
        Profile.from_json({**kept.to_json(), "version": 7})


def test_several_ranks_look_seldom() -> None:
    settled = replace(profile(), settled_at=100)
    assert [step for step in range(101, 125) if control.is_due(settled, step)] == [101, 102, 103, 104, 112, 120]
