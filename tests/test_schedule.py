import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clda_core import CldaError, Never, Schedule

numbers = st.integers(0, 50)


@st.composite
def schedules(draw: Any) -> Schedule:
    interval = draw(st.integers(1, 12))
    warmup = draw(numbers)
    return Schedule(
        warmup=warmup,
        interval=interval,
        observations=draw(st.integers(1, interval)),
        observe_every=draw(st.integers(1, 4)),
        decay=draw(st.sampled_from(["constant", "linear", "cosine"])),
        total=warmup + draw(st.integers(1, 60)),
    )


@settings(deadline=None)
@given(schedules())
def test_rounds_come_every_interval_steps_after_the_warm_up(schedule: Schedule) -> None:
    due = [step for step in range(1, 120) if schedule.due(step)]
    assert due == list(range(schedule.warmup + schedule.interval, 120, schedule.interval))


@settings(deadline=None)
@given(schedules())
def test_the_last_steps_up_to_the_first_of_so_many_rounds_are_observed_and_no_others(schedule: Schedule) -> None:
    due = [step for step in range(1, 250) if schedule.due(step)][:: schedule.observe_every]
    observed = {step - back for step in due for back in range(schedule.observations)}
    assert {step for step in range(1, 120) if schedule.observes(step)} == {step for step in observed if step < 120}
    assert all(schedule.observes(step) for step in due)


@settings(deadline=None)
@given(schedules())
def test_strength_falls_from_1_to_0_and_stays(schedule: Schedule) -> None:
    assert schedule.total is not None
    strengths = [schedule.strength(step) for step in range(1, schedule.total + 20)]
    assert strengths == sorted(strengths, reverse=True)
    assert all(0 <= strength <= 1 for strength in strengths)
    assert strengths[: schedule.warmup] == [1.0] * schedule.warmup
    end = 1.0 if schedule.decay == "constant" else 0.0
    assert strengths[schedule.total - 1 :] == pytest.approx([end] * 20)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0]),
        ("cosine", [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0]),
    ],
)
def test_strength_by_hand(decay: Any, expected: Any) -> None:
    schedule = Schedule(warmup=10, decay=decay, total=30)
    assert [schedule.strength(step) for step in (10, 15, 20, 30)] == pytest.approx(expected)


def test_shares_of_the_total_are_steps() -> None:
    schedule = Schedule(warmup=0.25, interval=0.05, total=200)
    assert (schedule.warmup, schedule.interval) == (50, 10)
    assert Schedule(interval=0.001, total=20).interval == 1
    assert [step for step in range(1, 81) if schedule.due(step)] == [60, 70, 80]


@given(st.integers(1, 10**9))
def test_never(step: int) -> None:
    assert not Never().due(step)
    assert not Never().observes(step)
    assert Never().strength(step) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval is out of range: expected an integer and >= 1, received 0"),
        ({"interval": 2.0}, "interval is not an integer"),
        ({"warmup": -1}, "warmup is out of range"),
        ({"warmup": True}, "warmup is not an integer"),
        ({"observations": 0}, "observations is out of range"),
        ({"interval": 5, "observations": 6}, "observations is out of range.*<= 5"),
        ({"observe_every": 0}, "observe_every is out of range"),
        ({"decay": "exponential"}, "decay is unknown: expected 'constant' or 'linear' or 'cosine'"),
        ({"decay": "linear"}, "total is not an integer.*received None. Fix: pass total=an integer and > 0"),
        ({"decay": "cosine", "warmup": 30, "total": 30}, "total is out of range.*> 30"),
        ({"warmup": 300, "total": 100}, "total is out of range.*> 300"),
        ({"warmup": 0.5}, "total is not an integer.*received None"),
        ({"warmup": 0.5, "total": 1.5}, "total is not an integer"),
        ({"interval": 0.5}, "total is not an integer.*received None"),
        ({"warmup": 1.0}, "warmup is not an integer"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        Schedule(**options)
