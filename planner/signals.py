"""What the cluster did over a window: cumulative reports, differenced per source and life. Pure: time is an argument.

A source is one incarnation of a router or an instance. One that has been silent for ``stale_s`` is dropped; a total that
falls within an incarnation is a lie or an overflow, and the source begins anew. The window shrinks to what lies after a
sudden change of the load, found where the two sides differ most and by more than chance explains, so that a step shows within an interval or two while
steady load is averaged over the whole window.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from biphase.planner.capacity import OfferedLoad, Setup
from biphase.planner.flow import Flow, jump_of, jump_of_answers, shares_of, unended_mean
from biphase.planner.reports import (
    InstanceReport,
    JointHistogram,
    Member,
    Report,
    Room,
    RouterReport,
    is_sound,
)

JUMP = 24.0
"""Sum of squared deviations, of three figures, from which on two stretches of time are different loads: by chance once in
some ten thousand looks."""

MAX_REPORTS = 4096
"""Of one source; older ones are thinned out by the window long before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSignals:
    """All that a decision looks at. ``span_s``: the load is that of so long, less than the window after a sudden change."""

    load: OfferedLoad = field(default_factory=OfferedLoad)
    latency: JointHistogram = field(default_factory=JointHistogram)
    """Of the requests that ended within the window, and of those that run by what they have seen so far."""
    recent: JointHistogram = field(default_factory=JointHistogram)
    """The same of the last three intervals."""
    span_s: float = 0.0
    watched_s: float = 0.0
    """For how long anybody has reported, at most the window."""
    num_requests: int = 0
    queued_requests: int = 0
    num_known: int = 0
    """Instances that are up and should report."""
    num_heard: int = 0
    num_routers: int = 0
    instances: tuple[InstanceReport, ...] = ()
    """The newest word of each that was heard."""
    members: tuple[Member, ...] = ()
    room: Room = field(default_factory=Room)
    setup: Setup = field(default_factory=Setup)

    def report(self, name: str) -> InstanceReport | None:
        return next((report for report in self.instances if report.name == name), None)


@dataclass(slots=True)
class _Source:
    """One life's reports in the order they came."""

    reports: deque[tuple[float, Report]]

    @property
    def newest(self) -> tuple[float, Report]:
        return self.reports[-1]

    def between(self, begin_s: float, end_s: float) -> tuple[float, Report | None, Report] | None:
        """(seconds, first, last) of what it said about ``begin_s`` to ``end_s``; first None: since its life began."""
        last_s, last, first_s, first = None, None, None, None
        for when_s, report in self.reports:
            if when_s > end_s + 1e-9:
                break
            if first is None or when_s <= begin_s + 1e-9:
                first_s, first = when_s, report
            last_s, last = when_s, report
        if last is None or last_s is None or first is None or first_s is None:
            return None
        born_s = first_s - first.uptime_s
        if first_s > begin_s and born_s >= begin_s - 1e-9 and first.uptime_s > 0:
            return last_s - born_s, None, last
        return (last_s - first_s, first, last) if last_s > first_s else None


class SignalWindow:
    """The owner of all reports of the last ``keep_s`` seconds, more where a longer window is asked for."""

    def __init__(self, keep_s: float = 120.0) -> None:
        self.keep_s = keep_s
        self.num_refused = 0
        self._sources: dict[tuple[str, str, int], _Source] = {}
        self._lives: dict[tuple[str, str], int] = {}
        self._lengths: tuple[float, float] | None = None

    def add(self, report: Report, now_s: float) -> bool:
        """Take a report; False when it was refused: unsound, of a former life, or out of order."""
        kind = "router" if isinstance(report, RouterReport) else "instance"
        known = self._lives.get((kind, report.name), report.incarnation)
        if not is_sound(report) or report.incarnation < known:
            self.num_refused += 1
            return False
        if report.incarnation > known:
            self._sources.pop((kind, report.name, known), None)
        self._lives[kind, report.name] = report.incarnation
        source = self._sources.setdefault((kind, report.name, report.incarnation), _Source(deque(maxlen=MAX_REPORTS)))
        if source.reports:
            last_s, last = source.newest
            if now_s < last_s:
                self.num_refused += 1
                return False
            if any(now < before for now, before in zip(report.totals, last.totals, strict=True)):
                source.reports.clear()
            elif now_s == last_s:
                source.reports.pop()
        source.reports.append((now_s, report))
        while source.reports and source.reports[0][0] < now_s - self.keep_s:
            source.reports.popleft()
        return True

    def over(
        self,
        window_s: float,
        now_s: float,
        *,
        interval_s: float = 5.0,
        members: Iterable[Member] = (),
        room: Room | None = None,
        setup: Setup | None = None,
    ) -> ClusterSignals:
        """The signals of the last ``window_s`` seconds, less after a sudden change. Stale: silent for 3 intervals."""
        stale_s = 3 * interval_s
        self.keep_s = max(self.keep_s, window_s + 2 * interval_s, stale_s)
        self._forget(now_s, self.keep_s)
        fresh = [source for source in self._sources.values() if source.newest[0] >= now_s - stale_s - 1e-9]
        instances = tuple(source.newest[1] for source in fresh if isinstance(source.newest[1], InstanceReport))
        routers = [source for source in fresh if isinstance(source.newest[1], RouterReport)]
        running = [last.running for _, last in (source.newest for source in routers) if isinstance(last, RouterReport)]
        members = tuple(members)
        due = {member.name for member in members if member.phase == "ready"}
        heard = due & {report.name for report in instances}
        flow = self._settled(routers, window_s, now_s, interval_s)
        answers = self._answers(routers, flow, now_s, interval_s)
        load = self._load(flow, answers) if routers else self._computed(fresh, window_s, now_s)
        return ClusterSignals(
            load=load,
            latency=_joined([*flow.latency, *running]),
            recent=_joined([*_flow(routers, now_s - stale_s, now_s, latency=True).latency, *running]),
            span_s=flow.seconds if routers else min(window_s, self._age(fresh, now_s)),
            watched_s=min(window_s, self._age(fresh, now_s)),
            num_requests=flow.num_requests,
            queued_requests=sum(getattr(source.newest[1], "queued_requests", 0) for source in routers),
            num_known=len(due),
            num_heard=len(heard),
            num_routers=len(routers),
            instances=tuple(sorted(instances, key=lambda report: report.name)),
            members=members,
            room=room or Room(),
            setup=_with_kv(setup or Setup(), instances),
        )

    def _forget(self, now_s: float, after_s: float) -> None:
        for key in [key for key, source in self._sources.items() if source.newest[0] < now_s - after_s]:
            del self._sources[key]

    def _age(self, sources: Sequence[_Source], now_s: float) -> float:
        return max((now_s - source.reports[0][0] for source in sources), default=0.0)

    def _settled(self, routers: Sequence[_Source], window_s: float, now_s: float, interval_s: float) -> Flow:
        """The flow since the last sudden change within the window, or over all of it."""
        begin_s, best_jump = now_s - window_s, JUMP
        steps = int(window_s / interval_s + 1e-9)
        for step in _growing(1, steps - 1):
            cut_s = now_s - step * interval_s
            old, new = _flow(routers, now_s - window_s, cut_s), _flow(routers, cut_s, now_s)
            if old.seconds <= 0 or new.seconds <= 0:
                continue
            jump = jump_of(old, new)
            if jump > best_jump:
                begin_s, best_jump = cut_s, jump
        return _flow(routers, begin_s, now_s, latency=True)

    def _answers(self, routers: Sequence[_Source], flow: Flow, now_s: float, interval_s: float) -> Flow:
        """The latest part of ``flow`` in which answers are of one kind: those that began before a change of the load end,
        and draw tokens, long after it."""
        best, best_jump = flow, JUMP
        for step in _growing(1, int(flow.seconds / interval_s + 1e-9) - 1):
            cut_s = now_s - step * interval_s
            old, new = _flow(routers, now_s - flow.seconds, cut_s), _flow(routers, cut_s, now_s)
            if old.seconds > 0 and new.seconds > 0:
                jump = jump_of_answers(old, new)
                if jump > best_jump:
                    best, best_jump = new, jump
        return best

    def _load(self, flow: Flow, answers: Flow) -> OfferedLoad:
        """``answers``: the part of ``flow`` that says how long answers are."""
        if flow.num_requests <= 0:
            prompt, output = self._lengths or (512.0, 128.0)
            return OfferedLoad(
                requests_per_s=0.0,
                prompt_lengths=((prompt, 1.0),),
                output_mean=output,
                output_tokens_per_s=answers.output_tokens_per_s,
            )
        prompt_mean = flow.prompt_tokens_per_s / max(1e-12, flow.requests_per_s)
        prompts = shares_of(flow.prompts, prompt_mean)
        output_mean, output_square = self._outputs(answers, at_least=unended_mean(flow))
        drawn = answers.output_tokens_per_s
        if answers.num_ended > answers.num_requests:  # more end than come: what had piled up is drawn as well
            drawn = min(drawn, flow.output_tokens_per_s)
        self._lengths = (prompt_mean, output_mean)
        return OfferedLoad(
            requests_per_s=flow.requests_per_s,
            prompt_lengths=prompts,
            output_mean=output_mean,
            output_square=output_square,
            # what runs counts at no less than its present length: where old lengths say less, what is drawn counts
            output_tokens_per_s=max(drawn, flow.requests_per_s * output_mean),
        )

    def _outputs(self, flow: Flow, *, at_least: float) -> tuple[float, float]:
        """Mean and mean square of output lengths: tokens per ended request, within what its buckets allow."""
        at_least = max(at_least, 1.0)
        if flow.num_ended <= 0:
            known = self._lengths[1] if self._lengths else 0.0
            # with no request begun, tokens are drawn for what began before: they say nothing of lengths
            begun = flow.output_tokens_per_s / flow.requests_per_s if flow.num_requests > 0 else 0.0
            mean = max(known, begun, at_least)
            return mean, mean * mean
        low, high = flow.outputs.mean_within()
        drawn = flow.output_tokens_per_s * flow.seconds / flow.num_ended
        mean = max(at_least, min(high, max(low, drawn)))
        shares = shares_of(flow.outputs, mean)
        return mean, sum(share * value * value for value, share in shares)

    def _computed(self, sources: Sequence[_Source], window_s: float, now_s: float) -> OfferedLoad:
        """No router is heard: what the instances have computed is the least that was offered."""
        prefill = decode = 0.0
        for source in sources:
            found = source.between(now_s - window_s, now_s)
            if found is not None and isinstance(found[2], InstanceReport):
                seconds, first, last = found[0], found[1], found[2]
                before = first if isinstance(first, InstanceReport) else InstanceReport(name="", role="prefill")
                prefill += (last.prefill_tokens - before.prefill_tokens) / seconds
                decode += (last.decode_tokens - before.decode_tokens) / seconds
        prompt, output = self._lengths or (512.0, 128.0)
        return OfferedLoad(
            requests_per_s=prefill / prompt,
            prompt_lengths=((prompt, 1.0),),
            output_mean=output,
            output_tokens_per_s=decode,
        )

    def __repr__(self) -> str:
        return f"<SignalWindow [{len(self._sources)} sources, {self.num_refused} reports refused]>"


def _growing(first: int, last: int) -> list[int]:
    """first .. last, all of the small ones, then by a quarter: a cut need not be known better than that."""
    found, value = [], first
    while value <= last:
        found.append(value)
        value = max(value + 1, value * 5 // 4)
    return found


def _flow(routers: Sequence[_Source], begin_s: float, end_s: float, *, latency: bool = False) -> Flow:
    """``latency``: with the joint histograms, which are much to sum."""
    flow = Flow()
    for source in routers:
        found = source.between(begin_s, end_s)
        if found is not None and found[0] > 0:
            seconds, first, last = found
            assert isinstance(last, RouterReport) and not isinstance(first, InstanceReport)
            flow.add(seconds, first, last, latency=latency)
    return flow


def _with_kv(setup: Setup, instances: Sequence[InstanceReport]) -> Setup:
    """How many tokens a decode instance's blocks hold, as the middle one says, where the deployment does not."""
    told = sorted(report.num_blocks * report.block_size for report in instances if report.role == "decode")
    if setup.decode.kv_tokens or not told:
        return setup
    return replace(setup, decode=replace(setup.decode, kv_tokens=told[(len(told) - 1) // 2]))


def _joined(parts: Sequence[JointHistogram]) -> JointHistogram:
    """The sum over routers that bucket alike; those that do not, or hold nothing, are left out."""
    parts = [part for part in parts if part.counts or part.missed]
    if not parts:
        return JointHistogram()
    first = parts[0]
    alike = [
        p for p in parts if (p.ttft_ms, p.tpot_ms, len(p.counts)) == (first.ttft_ms, first.tpot_ms, len(first.counts))
    ]
    return JointHistogram(
        ttft_ms=first.ttft_ms,
        tpot_ms=first.tpot_ms,
        counts=tuple(sum(column) for column in zip(*(part.counts for part in alike), strict=True)),
        missed=sum(part.missed for part in alike),
    )
