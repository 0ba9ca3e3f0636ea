"""Schedules: when they are on, over changes of the clock too."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from biphase.planner.policy import BoundsChange, BudgetChange, GpuBudget, Policy, RoleBounds, Schedule
from biphase.planner.schedules import in_force, is_on, last_start_s

BERLIN = ZoneInfo("Europe/Berlin")


def at(*when: int) -> float:
    return datetime(*when, tzinfo=BERLIN).timestamp()  # type: ignore[arg-type,misc]


WORKING = Schedule(
    name="working hours",
    cron="0 8 * * mon-fri",
    duration_s=10 * 3600,
    time_zone="Europe/Berlin",
    prefill=BoundsChange(min_replicas=2, max_replicas=6),
)


@pytest.mark.parametrize(
    ("when", "on"),
    [
        ((2026, 5, 4, 7, 59, 59), False),  # a Monday
        ((2026, 5, 4, 8, 0, 0), True),
        ((2026, 5, 4, 17, 59, 59), True),
        ((2026, 5, 4, 18, 0, 0), False),
        ((2026, 5, 9, 9, 0, 0), False),  # a Saturday
        ((2026, 1, 5, 8, 0, 0), True),  # winter time
    ],
)
def test_working_hours_in_their_zone(when: tuple[int, ...], on: bool) -> None:
    assert is_on(WORKING, at(*when)) is on


def test_an_hour_that_the_clock_leaves_out_is_not_lost_and_one_that_comes_twice_counts_once() -> None:
    nightly = Schedule(cron="30 2 * * *", duration_s=3600, time_zone="Europe/Berlin")
    assert last_start_s(nightly, at(2026, 3, 29, 3, 30)) == at(2026, 3, 29, 3, 0)
    first = datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN).timestamp()
    assert last_start_s(nightly, at(2026, 10, 25, 12, 0)) == first


def test_what_began_in_the_hour_that_comes_twice_stays_on_through_it() -> None:
    nightly = Schedule(cron="30 2 * * *", duration_s=7200, time_zone="Europe/Berlin")
    first = datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN).timestamp()
    on = [is_on(nightly, first + minutes * 60) for minutes in (-1, 0, 29, 30, 59, 60, 119, 120)]
    assert on == [False, True, True, True, True, True, True, False]
    hourly = Schedule(cron="0 * * * *", duration_s=60, time_zone="Europe/Berlin")
    assert all(is_on(hourly, first + 1800 + hours * 3600) for hours in range(-3, 4))


def test_of_two_that_cannot_both_be_kept_the_later_one_is() -> None:
    least = Schedule(
        cron="* * * * *", duration_s=60, prefill=BoundsChange(min_replicas=4), gpu_budget=BudgetChange(min=6)
    )
    most = Schedule(
        cron="* * * * *", duration_s=60, prefill=BoundsChange(max_replicas=2), gpu_budget=BudgetChange(max=4)
    )
    found, _ = in_force(Policy(schedules=(least, most)), at(2026, 5, 4, 12, 0))
    assert (found.prefill, found.gpu_budget) == (RoleBounds(min_replicas=2, max_replicas=2), GpuBudget(min=4, max=4))
    found, _ = in_force(Policy(schedules=(most, least)), at(2026, 5, 4, 12, 0))
    assert (found.prefill, found.gpu_budget) == (RoleBounds(min_replicas=4, max_replicas=4), GpuBudget(min=6, max=6))


def test_what_a_schedule_does_not_give_stays() -> None:
    part = Schedule(
        cron="* * * * *", duration_s=60, gpu_budget=BudgetChange(min=4), decode=BoundsChange(max_replicas=3)
    )
    after = Schedule(cron="* * * * *", duration_s=60, decode=BoundsChange(min_replicas=1))
    bounds = RoleBounds(min_replicas=2, max_replicas=2)
    policy = Policy(gpu_budget=GpuBudget(min=0, max=4), decode=bounds, prefill=bounds, schedules=(part, after))
    found, _ = in_force(policy, at(2026, 5, 4, 12, 0))
    assert found.gpu_budget == GpuBudget(min=4, max=4)
    assert found.decode == RoleBounds(min_replicas=1, max_replicas=3)
    assert found.prefill == bounds


def test_bounds_in_force_and_later_ones_win() -> None:
    evening = Schedule(
        cron="0 17 * * *",
        duration_s=3600,
        time_zone="Europe/Berlin",
        gpu_budget=BudgetChange(max=4),
        prefill=BoundsChange(min_replicas=1, max_replicas=1),
    )
    policy = Policy(schedules=(WORKING, evening))
    night, labels = in_force(policy, at(2026, 5, 4, 3, 0))
    assert (night, labels) == (policy, ())
    noon, labels = in_force(policy, at(2026, 5, 4, 12, 0))
    assert (noon.prefill.min_replicas, noon.gpu_budget.max, labels) == (2, 8.0, ("working hours",))
    late, labels = in_force(policy, at(2026, 5, 4, 17, 30))
    assert (late.prefill.max_replicas, late.gpu_budget.max) == (1, 4)
    assert labels == ("working hours", "0 17 * * *")
