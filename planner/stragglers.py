"""Which instances are kept from work because they are slow, tried again, or ended because they have stopped. Pure.

Slow: for ``slow_s`` an instance's recent steps took ``slow_factor`` times what its peers' fitted step times say for the same
work (the median over at least two peers of its role). It is out, then probed, each time after twice the wait: let in for
``probe_s``, it stays in if its steps are those of its peers again. Stopped: it holds work and has said nothing for
``stopped_s``, or its step under way takes far longer than its like did. One that holds work and has no step to take, because
it waits to pull KV or to be pulled from, has not stopped. After ``replace_after_s`` it is killed and replaced. Never the last of a role is out, nor more
than half: where others go, those that were out are let back, the least slow first.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

from biphase.planner.policy import ROLES
from biphase.planner.reports import InstanceReport

Standing = Literal["in", "suspect", "out", "probing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    slow_factor: float = 3.0
    slow_s: float = 10.0
    well_factor: float = 1.5
    """Below it a probed instance is well again."""
    probe_after_s: float = 10.0
    """The first wait; each further one is twice as long."""
    max_probe_after_s: float = 600.0
    probe_s: float = 15.0
    min_steps: int = 5
    """Recent steps that a judgement needs."""
    stopped_s: float = 3.0
    """A step is given at least this long, and ``slow_factor`` times what its like took."""
    unknown_step_s: float = 20.0
    """The same of a step whose like has not been yet: the first of a kind may have to compile."""
    replace_after_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is remembered of one instance. ``since_s``: of its standing; ``stopped_since_s``: without a step or word."""

    incarnation: int
    standing: Standing = "in"
    since_s: float = 0.0
    times_out: int = 0
    stepped_s: float = 0.0
    """When it was last seen without a step that takes too long."""
    heard_s: float = 0.0
    said_s: float = 0.0
    """When its newest report came."""
    stopped_since_s: float | None = None
    slowness: float = 0.0
    """What was last seen of it; 0: nothing yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``out``: no new work for them; ``probing``: of those that are in, the ones on trial; ``kill``: end and replace."""

    out: tuple[str, ...] = ()
    probing: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """What has changed, in words."""
    health: Mapping[str, str] = field(default_factory=dict)
    """For status: slow, probing, stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerState:
    records: Mapping[str, Record] = field(default_factory=dict)
    looked_s: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "StragglerState":
        values: dict[str, Any] = json.loads(text)
        records = {name: Record(**record) for name, record in values["records"].items()}
        return StragglerState(records=records, looked_s=values["looked_s"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One instance that is up: its newest report, and when that came. ``is_idle``: it has nothing to tell since."""

    report: InstanceReport
    at_s: float
    is_idle: bool = False


def judge(
    heard: Iterable[Heard], state: StragglerState, now_s: float, rules: Rules | None = None
) -> tuple[Verdict, StragglerState]:
    """Who is out, on trial, to be killed. ``heard``: the instances that should serve; others are forgotten.

    After a pause between two looks, in which the judge itself may have stood still, nobody counts as stopped yet.
    """
    rules = rules or Rules()
    if state.looked_s is not None and not 0 <= now_s - state.looked_s < rules.stopped_s:
        rested = {
            name: replace(record, stepped_s=now_s, heard_s=now_s, said_s=now_s, stopped_since_s=None, since_s=now_s)
            for name, record in state.records.items()
        }
        state = StragglerState(records=rested)
    found = sorted(heard, key=lambda item: item.report.name)
    records = {item.report.name: _seen(item, state.records.get(item.report.name), now_s, rules) for item in found}
    reasons: list[str] = []
    for role in ROLES:
        peers = [item.report for item in found if item.report.role == role]
        for report in peers:
            ratio = slowness(report, [peer for peer in peers if peer.name != report.name], rules)
            record = records[report.name]
            after = _moved(record, ratio, now_s, rules)
            if after.standing == "out" and record.standing != "out" and not _may_go(report.name, peers, records):
                after = record  # asked again at the next look
            if (
                after.standing != record.standing
                and "suspect" not in (record.standing, after.standing)
                or (after.standing == "out" and record.standing == "suspect")
            ):
                reasons.append(_words(report.name, record, after, ratio, rules))
            records[report.name] = after if ratio is None else replace(after, slowness=ratio)
        reasons += _let_back([peer.name for peer in peers], records, now_s)
    kill = [name for name, record in records.items() if _is_over(record, now_s, rules)]
    for name in kill:
        stopped_s = now_s - (records[name].stopped_since_s or now_s)
        reasons.append(f"{name} is ended and replaced: no step or no word for {stopped_s:.0f} s with work aboard")
    verdict = Verdict(
        out=tuple(name for name, record in records.items() if record.standing == "out"),
        probing=tuple(name for name, record in records.items() if record.standing == "probing"),
        kill=tuple(kill),
        reasons=tuple(reasons),
        health={name: word for name, record in records.items() if (word := _health(record))},
    )
    return verdict, StragglerState(records=records, looked_s=now_s)


def slowness(report: InstanceReport, peers: Sequence[InstanceReport], rules: Rules) -> float | None:
    """How many times longer its recent steps took than its peers' would have; None where that cannot be told."""
    recent = report.recent
    if recent.num_steps < rules.min_steps or recent.seconds <= 0:
        return None
    expected = [
        recent.expected_s(step)
        for peer in peers
        for step in [peer.prefill_step if report.role == "prefill" else peer.decode_step]
        if step.is_known
    ]
    if len(expected) < 2 or median(expected) <= 0:
        return None
    return recent.seconds / median(expected)


def _seen(item: Heard, record: Record | None, now_s: float, rules: Rules) -> Record:
    """The record with what the newest report says of steps; another life begins with a clean one."""
    report = item.report
    if record is None or record.incarnation != report.incarnation:
        record = Record(incarnation=report.incarnation, since_s=now_s, stepped_s=now_s, said_s=item.at_s)
    known = report.step_expected_s > 0
    limit_s = max(rules.stopped_s, rules.slow_factor * report.step_expected_s) if known else rules.unknown_step_s
    hangs = report.step_s > limit_s
    gap_s = item.at_s - record.said_s
    if record.standing == "suspect" and gap_s > rules.stopped_s:  # it had nothing to do, which is no slowness
        record = replace(record, since_s=record.since_s + gap_s)
    lives_s = now_s if item.is_idle else item.at_s
    stepped_s = min(record.stepped_s, lives_s - report.step_s) if hangs else max(record.stepped_s, lives_s)
    record = replace(record, stepped_s=stepped_s, heard_s=max(record.heard_s, lives_s), said_s=item.at_s)
    quiet_s = now_s - min(record.stepped_s, record.heard_s)
    if quiet_s <= rules.stopped_s:
        return replace(record, stopped_since_s=None)
    return record if record.stopped_since_s is not None else replace(record, stopped_since_s=now_s - quiet_s)


def _moved(record: Record, ratio: float | None, now_s: float, rules: Rules) -> Record:
    slow, stopped = ratio is not None and ratio >= rules.slow_factor, record.stopped_since_s is not None
    lasted_s = now_s - record.since_s
    match record.standing:
        case "in":
            return replace(record, standing="suspect", since_s=now_s) if slow or stopped else record
        case "suspect":
            if not (slow or stopped):
                return replace(record, standing="in", since_s=now_s)
            long_enough = stopped or record.said_s - record.since_s >= rules.slow_s
            return (
                replace(record, standing="out", since_s=now_s, times_out=record.times_out + 1)
                if long_enough
                else record
            )
        case "out":
            wait_s = min(rules.max_probe_after_s, rules.probe_after_s * 2 ** min(record.times_out - 1, 16))
            if lasted_s < wait_s or stopped:
                return record
            return replace(record, standing="probing", since_s=now_s)
        case "probing":
            if stopped:
                return replace(record, standing="out", since_s=now_s, times_out=record.times_out + 1)
            if lasted_s < rules.probe_s:
                return record
            if ratio is not None and ratio > rules.well_factor:
                return replace(record, standing="out", since_s=now_s, times_out=record.times_out + 1)
            # well, or without work to show: on trial until there is some
            return record if ratio is None else replace(record, standing="in", since_s=now_s, times_out=0)


def _may_go(name: str, peers: Sequence[InstanceReport], records: Mapping[str, Record]) -> bool:
    """Whether one more of its role may be out: not the last, and at most half."""
    out = 1 + sum(records[peer.name].standing == "out" for peer in peers if peer.name != name)
    return out < len(peers) and 2 * out <= len(peers)


def _let_back(peers: Sequence[str], records: dict[str, Record], now_s: float) -> list[str]:
    """Let in whom the others that are left can no longer be spared; what is said of it."""
    out = [name for name in peers if records[name].standing == "out"]
    out.sort(key=lambda name: (records[name].stopped_since_s is not None, records[name].slowness, name))
    words = []
    while len(out) == len(peers) > 0 or 2 * len(out) > len(peers):
        name = out.pop(0)
        records[name] = replace(records[name], standing="in", since_s=now_s)
        why = "nobody else of its role is left" if len(peers) == 1 else f"only {len(peers)} of its role are left"
        how = "has stopped" if records[name].stopped_since_s is not None else "is slow"
        words.append(f"{name} gets work again though it {how}: {why}")
    return words


def _is_over(record: Record, now_s: float, rules: Rules) -> bool:
    return record.stopped_since_s is not None and now_s - record.stopped_since_s >= rules.replace_after_s


def _health(record: Record) -> str:
    if record.stopped_since_s is not None:
        return "stopped"
    return {"out": "slow", "probing": "probing"}.get(record.standing, "")


def _words(name: str, before: Record, after: Record, ratio: float | None, rules: Rules) -> str:
    told = (
        "it has stopped" if ratio is None else f"its steps take {ratio:.1f} times as long as its peers' at equal work"
    )
    match after.standing:
        case "out":
            wait_s = min(rules.max_probe_after_s, rules.probe_after_s * 2 ** min(after.times_out - 1, 16))
            return f"{name} gets no work: {told}; tried again in {wait_s:.0f} s"
        case "probing":
            return f"{name} gets work again on trial, {rules.probe_s:.0f} s"
        case _:
            return f"{name} is well again: {told}" if ratio is not None else f"{name} is well again"
