"""Which schedules are in force: cron expressions in a time zone, read as Debian's cron reads them, changes of the clock
included. Pure: the time is an argument, seconds since 1970.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from biphase.planner.policy import ROLES, GpuBudget, Policy, RoleBounds, Schedule


def reason_against(schedule: Schedule) -> tuple[str, str] | None:
    """Why a schedule's time cannot be understood, as (key, the rest of the line); None where it can."""
    try:
        zone = ZoneInfo(schedule.time_zone)
    except (KeyError, ValueError, OSError):
        return "time_zone", f"is {schedule.time_zone!r}: no such time zone, give one as in Europe/Berlin"
    if len(schedule.cron.split()) != 5:
        count = len(schedule.cron.split())
        return "cron", f"is {schedule.cron!r}: {count} fields, give 5: minute, hour, day of month, month, day of week"
    try:
        next(CronSim(schedule.cron, datetime(2000, 1, 1, tzinfo=zone)))
    except CronSimError as error:
        return "cron", f"is {schedule.cron!r}: {str(error)[0].lower()}{str(error)[1:]}"
    except StopIteration:
        return "cron", f"is {schedule.cron!r}: no such day ever comes"
    return None


def last_start_s(schedule: Schedule, unix_s: float) -> float | None:
    """When the schedule began last, None if it never did."""
    zone = ZoneInfo(schedule.time_zone)
    # the expression's own second belongs to it: look back from just after
    before = datetime.fromtimestamp(int(unix_s) + 1, tz=UTC).astimezone(zone)
    if before.fold:  # the second of two equal hours: of the first one cronsim sees only what lies before, by the clock
        before = (before.astimezone(UTC) + _repeated(before)).astimezone(zone)
    for found in CronSim(schedule.cron, before, reverse=True):
        if found.timestamp() <= unix_s:
            return found.timestamp()
    return None


def _repeated(at: datetime) -> timedelta:
    """How much of the clock comes twice around ``at``, mostly an hour."""
    first, second = at.replace(fold=0).utcoffset(), at.replace(fold=1).utcoffset()
    assert first is not None and second is not None
    return first - second


def is_on(schedule: Schedule, unix_s: float) -> bool:
    began_s = last_start_s(schedule, unix_s)
    return began_s is not None and unix_s < began_s + schedule.duration_s


def _consistent(policy: Policy, newest: Schedule) -> Policy:
    """Of two schedules each may be sound and both not: the bound that the later one gives takes the other one along."""
    budget, change = policy.gpu_budget, newest.gpu_budget
    if budget.min > budget.max:
        most = budget.max if change.max is not None else budget.min
        policy = replace(policy, gpu_budget=GpuBudget(min=most, max=most))
    for role in ROLES:
        bounds, given = policy.bounds(role), newest.bounds(role)
        if bounds.min_replicas > bounds.max_replicas:
            count = bounds.max_replicas if given.max_replicas is not None else bounds.min_replicas
            both = RoleBounds(min_replicas=count, max_replicas=count)
            policy = replace(policy, prefill=both) if role == "prefill" else replace(policy, decode=both)
    return policy


def in_force(policy: Policy, unix_s: float) -> tuple[Policy, tuple[str, ...]]:
    """The policy with the bounds of the schedules that are on, later ones over earlier, and their labels."""
    on = [schedule for schedule in policy.schedules if is_on(schedule, unix_s)]
    for schedule in on:
        policy = _consistent(policy.with_schedule(schedule), schedule)
    return policy, tuple(schedule.label for schedule in on)
