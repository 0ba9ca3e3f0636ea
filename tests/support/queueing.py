"""A queueing model of the two phases, event by event, for closed loops with the autoscaler: no process, no clock.

Prefill instances take prompts from one queue, first come, first served, packed into steps of a token budget. A decode
instance steps with all its requests; a request joins the one that runs fewest, and ends after its number of tokens. Steps
take what ``StepTime`` says. Reports are those of a real router and real workers.
"""

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from biphase.planner.autoscaler import decide
from biphase.planner.autoscaler_state import AutoscalerState, Decision, FlipInstance, StartInstance, StopInstance
from biphase.planner.capacity import RoleShape, Setup
from biphase.planner.history import Moment, moment_line, setup_line
from biphase.planner.policy import Policy
from biphase.planner.ratio import Ratio
from biphase.planner.reports import (
    Histogram,
    InstanceReport,
    JointHistogram,
    Member,
    MemberPhase,
    Room,
    RouterReport,
)
from biphase.planner.signals import SignalWindow
from biphase.protos.step_time import StepTime, attended
from biphase.protos.values import Role

TTFT_MS = tuple(10 * 1.2**i for i in range(40))
TPOT_MS = tuple(2 * 1.15**i for i in range(40))
LENGTHS = tuple(float(round(1.5**i)) for i in range(4, 24))


@dataclass(frozen=True)
class Traffic:
    """Requests per second of prompts and outputs of so many tokens; ``spread``: lengths vary by that share."""

    requests_per_s: float
    prompt: int
    output: int
    spread: float = 0.3


@dataclass
class Request:
    arrived_s: float
    prompt: int
    output: int
    first_s: float | None = None
    ended_s: float | None = None
    made: int = 0

    @property
    def ttft_ms(self) -> float:
        return math.inf if self.first_s is None else (self.first_s - self.arrived_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        if self.ended_s is None or self.first_s is None:
            return math.inf
        return (self.ended_s - self.first_s) * 1e3 / max(1, self.output - 1)


@dataclass
class Instance:
    name: str
    role: Role
    phase: MemberPhase
    since_s: float
    turning: Role | None = None
    stepping: bool = False
    steps: int = 0
    running: dict[int, Request] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)  # (step, request)
    context: int = 0
    held: int = 0
    tokens: dict[Role, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    busy_s: float = 0.0


@dataclass(frozen=True)
class Tick:
    at_s: float
    ratio: Ratio
    """Serving or starting."""
    held: int
    """All that hold a GPU."""
    decision: Decision | None


class QueueingModel:
    """The owner of everything in the model. ``load`` gives the traffic at a time."""

    def __init__(
        self,
        load: Callable[[float], Traffic],
        ratio: Ratio,
        *,
        prefill_step: StepTime,
        decode_step: StepTime,
        budget: int = 512,
        max_num_seqs: int = 64,
        kv_tokens: int = 1_000_000,
        start_s: float = 0.0,
        flip_s: float = 1.0,
        grace_s: float = 10.0,
        seed: int = 1,
    ) -> None:
        self.load = load
        self.steps: dict[Role, StepTime] = {"prefill": prefill_step, "decode": decode_step}
        self.setup = Setup(
            prefill=RoleShape(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, kv_tokens=kv_tokens),
            decode=RoleShape(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, kv_tokens=kv_tokens),
            strict=True,
            flip_s=flip_s,
        )
        self.start_s, self.flip_s, self.grace_s = start_s, flip_s, grace_s
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.requests: list[Request] = []
        self.prompts: deque[int] = deque()
        self.handed: deque[int] = deque()
        self.instances: dict[str, Instance] = {}
        self.ticks: list[Tick] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._made = self._prompt_tokens = 0
        self._prompts = [0] * (len(LENGTHS) + 1)
        self._outputs = [0] * (len(LENGTHS) + 1)
        self._joint = [0] * ((len(TTFT_MS) + 1) * (len(TPOT_MS) + 1))
        for role in ("prefill", "decode"):
            for _ in range(ratio.of(role)):
                self._add(role, "ready")
        self._arrive_later()

    # Events.

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._events)
            what()
        self.now_s = until_s

    def _arrive_later(self) -> None:
        traffic = self.load(self.now_s)
        if traffic.requests_per_s <= 0:
            self.at(self.now_s + 0.5, self._arrive_later)
            return
        wait_s = self.chance.expovariate(traffic.requests_per_s)
        self.at(self.now_s + wait_s, self._arrive)

    def _arrive(self) -> None:
        traffic = self.load(self.now_s)
        if traffic.requests_per_s > 0:
            vary = [max(0.1, 1 + traffic.spread * self.chance.gauss(0, 1)) for _ in range(2)]
            self.requests.append(
                Request(self.now_s, max(1, round(traffic.prompt * vary[0])), max(2, round(traffic.output * vary[1])))
            )
            self.prompts.append(len(self.requests) - 1)
            self._prompt_tokens += self.requests[-1].prompt
            self._prompts[bisect_right(LENGTHS, self.requests[-1].prompt)] += 1
            self._serve_prompts()
        self._arrive_later()

    # Prefill.

    def _serve_prompts(self) -> None:
        for instance in self.instances.values():
            if instance.role == "prefill" and instance.phase == "ready" and not instance.stepping and self.prompts:
                budget, taken = self.setup.prefill.max_num_batched_tokens, []
                while self.prompts and (not taken or self.requests[self.prompts[0]].prompt <= budget):
                    taken.append(self.prompts.popleft())
                    budget -= self.requests[taken[-1]].prompt
                self._prefill(instance, taken)

    def _prefill(self, instance: Instance, taken: list[int]) -> None:
        lengths = [self.requests[index].prompt for index in taken]
        step = self.steps["prefill"]
        chunks = max(1, math.ceil(sum(lengths) / self.setup.prefill.max_num_batched_tokens))
        took_s = step.seconds(sum(lengths), sum(attended(0, n) for n in lengths)) + (chunks - 1) * step.fixed_s
        instance.stepping = True
        instance.held = sum(lengths)

        def over() -> None:
            instance.stepping, instance.held = False, 0
            instance.steps += chunks
            instance.busy_s += took_s
            instance.tokens["prefill"] += sum(lengths)
            for index in taken:
                self.requests[index].first_s = self.now_s
                self.requests[index].made = 1
                self._made += 1
                self.handed.append(index)
            self._join()
            self._drained(instance)
            self._serve_prompts()

        self.at(self.now_s + took_s, over)

    # Decode.

    def _join(self) -> None:
        while self.handed:
            request = self.requests[self.handed[0]]
            needs = request.prompt + request.output
            open_ones = [
                instance
                for instance in self.instances.values()
                if instance.role == "decode"
                and instance.phase == "ready"
                and len(instance.running) < self.setup.decode.max_num_seqs
                and instance.held + needs <= self.setup.decode.kv_tokens
            ]
            if not open_ones:
                return
            best = min(open_ones, key=lambda instance: (len(instance.running), instance.name))
            index = self.handed.popleft()
            best.running[index] = request
            best.held += needs
            best.context += request.prompt + request.made
            heapq.heappush(best.ends, (best.steps + request.output - request.made, index))
            if not best.stepping:
                self._decode(best)

    def _decode(self, instance: Instance) -> None:
        batch = len(instance.running)
        took_s = self.steps["decode"].seconds(batch, instance.context)
        instance.stepping = True
        # who joins meanwhile begins with the next step
        late = instance.steps

        def over() -> None:
            instance.stepping = False
            instance.steps = late + 1
            instance.busy_s += took_s
            instance.tokens["decode"] += batch
            instance.context += batch
            self._made += batch
            while instance.ends and instance.ends[0][0] <= instance.steps:
                _, index = heapq.heappop(instance.ends)
                request = instance.running.pop(index, None)
                if request is None:
                    continue
                request.ended_s, request.made = self.now_s, request.output
                instance.context -= request.prompt + request.output
                instance.held -= request.prompt + request.output
                self._outputs[bisect_right(LENGTHS, request.output)] += 1
                first, second = bisect_right(TTFT_MS, request.ttft_ms), bisect_right(TPOT_MS, request.tpot_ms)
                self._joint[first * (len(TPOT_MS) + 1) + second] += 1
            if not instance.running:
                instance.context = 0
            self._drained(instance)
            self._join()
            if instance.running and not instance.stepping:
                self._decode(instance)

        self.at(self.now_s + took_s, over)

    # What an admin does.

    def _add(self, role: Role, phase: MemberPhase) -> Instance:
        number = next(n for n in itertools.count() if f"{role}-{n}" not in self.instances)
        instance = Instance(f"{role}-{number}", role, phase, self.now_s)
        self.instances[instance.name] = instance
        return instance

    def start(self, role: Role) -> None:
        instance = self._add(role, "starting")
        self.at(self.now_s + self.start_s, lambda: self._ready(instance))

    def _ready(self, instance: Instance) -> None:
        if self.instances.get(instance.name) is instance:
            instance.phase, instance.since_s = "ready", self.now_s
            self._serve_prompts()
            self._join()

    def drain(self, name: str, turning: Role | None = None) -> None:
        instance = self.instances[name]
        instance.turning = turning
        instance.phase, instance.since_s = "draining", self.now_s
        self.at(self.now_s + self.grace_s, lambda: self._grace_over(instance))
        self._drained(instance)

    def _grace_over(self, instance: Instance) -> None:
        if instance.phase == "draining" and instance.role == "decode":
            for index, request in instance.running.items():
                request.made = 1  # replayed elsewhere; the model computes its tokens again
                self.handed.append(index)
            instance.running.clear()
            instance.ends.clear()
            instance.context = instance.held = 0
            self._join()
            self._drained(instance)

    def _drained(self, instance: Instance) -> None:
        if instance.phase != "draining" or instance.stepping or instance.running:
            return
        if instance.turning is None:
            self.instances.pop(instance.name, None)
            return
        instance.role, instance.turning = instance.turning, None
        instance.phase, instance.since_s = "flipping", self.now_s
        instance.context = instance.held = 0
        self.at(self.now_s + self.flip_s, lambda: self._ready(instance))

    # What is reported.

    def members(self) -> list[Member]:
        return [
            Member(
                name=instance.name,
                role=instance.turning or instance.role,
                phase="flipping" if instance.turning else instance.phase,
                age_s=self.now_s - instance.since_s,
            )
            for instance in self.instances.values()
        ]

    def instance_reports(self) -> list[InstanceReport]:
        return [
            InstanceReport(
                name=instance.name,
                role=instance.role,
                uptime_s=self.now_s + 1000,
                prefill_tokens=instance.tokens["prefill"],
                decode_tokens=instance.tokens["decode"],
                num_steps=instance.steps,
                busy_s=round(instance.busy_s, 3),
                running=len(instance.running),
                running_tokens=instance.context,
                prefill_step=self.steps["prefill"],
                decode_step=self.steps["decode"],
            )
            for instance in self.instances.values()
            if instance.phase in ("ready", "draining")
        ]

    def router_report(self) -> RouterReport:
        return RouterReport(
            name="router-0",
            uptime_s=self.now_s + 1e-3,
            offered_requests=len(self.requests),
            offered_prompt_tokens=self._prompt_tokens,
            offered_output_tokens=self._made,
            latency=JointHistogram(ttft_ms=TTFT_MS, tpot_ms=TPOT_MS, counts=tuple(self._joint)),
            prompt_tokens=Histogram(bounds=LENGTHS, counts=tuple(self._prompts)),
            output_tokens=Histogram(bounds=LENGTHS, counts=tuple(self._outputs)),
            queued_requests=len(self.prompts),
        )

    # The loop.

    def autoscale(self, policy: Policy, until_s: float, *, idle_gpus: int = 64) -> None:
        """Run to ``until_s`` with a decision every interval, carried out at once."""
        window, state = SignalWindow(), AutoscalerState()
        while self.now_s < until_s - 1e-9:
            self.run(self.now_s + policy.interval_s)
            window.add(self.router_report(), self.now_s)
            for report in self.instance_reports():
                window.add(report, self.now_s)
            held = len(self.instances)
            idle = max(0, idle_gpus - held)
            signals = window.over(
                policy.window_s,
                self.now_s,
                interval_s=policy.interval_s,
                members=self.members(),
                room=Room(prefill=idle, decode=idle),
                setup=self.setup,
            )
            decision = decide(policy, signals, state, 1e6 + self.now_s)
            state = decision.state
            for action in decision.actions if not policy.dry_run else ():
                match action:
                    case StartInstance(role=role):
                        self.start(role)
                    case StopInstance(name=name):
                        self.drain(name)
                    case FlipInstance(name=name, role=role):
                        self.drain(name, role)
            counts = {
                role: sum(m.role == role and m.phase != "draining" for m in self.members()) for role in self.steps
            }
            ratio = Ratio(prefill=counts["prefill"], decode=counts["decode"])
            self.ticks.append(Tick(self.now_s, ratio, len(self.instances), decision))

    def attainment(self, ttft_ms: float, tpot_ms: float, begin_s: float, end_s: float) -> float:
        """Of the requests that arrived then; what has not ended misses."""
        found = [request for request in self.requests if begin_s <= request.arrived_s < end_s]
        met = sum(request.ttft_ms <= ttft_ms and request.tpot_ms <= tpot_ms for request in found)
        return met / len(found) if found else 1.0

    def history(self, until_s: float, *, unix_s: float, every_s: float = 10.0) -> list[str]:
        """The model's own history under a fixed ratio, as a controller records it; without latencies, to keep it short."""
        lines = [setup_line(self.setup)]
        while self.now_s < until_s - 1e-9:
            self.run(self.now_s + every_s)
            router = replace(self.router_report(), latency=JointHistogram())
            idle = max(0, 8 - len(self.instances))
            moment = Moment(
                unix_s=unix_s + self.now_s,
                members=tuple(self.members()),
                room=Room(prefill=idle, decode=idle),
                reports=(router, *self.instance_reports()),
            )
            lines.append(moment_line(moment))
        return lines
