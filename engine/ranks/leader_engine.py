"""An instance of several ranks as rank 0's shell sees it: one engine, whose steps run on all ranks.

A step is sent to every rank before rank 0 begins it, and over when every rank has said so. A plan that cannot be computed
is refused before it is sent. What goes wrong in a step on one rank leaves the others waiting for it in the middle of an
exchange, so it is the end of the instance, as is a step that is not over in time; ``channel.lost`` tells it at once.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NoReturn

from biphase.engine.engine import Engine, OnLayers
from biphase.engine.ranks.channel import LeaderChannel
from biphase.engine.ranks.connection import Message
from biphase.engine.ranks.step_message import Tokens, error_of, step_message
from biphase.engine.step import DoneStep, PendingStep, StepPlan, StepResult
from biphase.protos.errors import EngineLost, Internal, InvalidRequest, one_line
from biphase.protos.values import Role

_WHO_IS_GONE_S = 0.3


def agree_on_blocks(engine: Engine, num_blocks: int) -> None:
    """Use only as many blocks of the pool as every rank has: a block's id means the same on all of them."""
    engine.num_blocks = num_blocks
    engine.kv_bytes = num_blocks * engine.layout.block_bytes
    engine.plan_limits = replace(engine.plan_limits, num_blocks=num_blocks)


class LeaderEngine(Engine):
    """Facts, KV pool and layer hook are those of rank 0's own engine; ``kv_bytes`` and ``threads`` are all ranks'."""

    def __init__(
        self, engine: Engine, channel: LeaderChannel, *, step_timeout_s: float, kv_bytes: int, threads: int
    ) -> None:
        self.kv_bytes = kv_bytes
        self.threads = threads
        self._engine = engine
        self._channel = channel
        self._step_timeout_s = step_timeout_s
        self._num_ranks = engine.plan.num_ranks
        self._sampling_rank = engine.plan.rank_at(stage=engine.plan.pp - 1, place=0)
        self._next_number = 0
        self._lock = threading.Lock()
        self._steps: deque[_RankedStep] = deque()
        self._first_since_s = 0.0
        self._lost = ""
        channel.subscribe("done", self._done, direct=True)
        channel.on_beat(self._check_deadline)
        channel.lost.add_done_callback(lambda lost: self._fail_all(lost.result()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def on_layers(self) -> OnLayers | None:
        return self._engine.on_layers

    @on_layers.setter
    def on_layers(self, call: OnLayers | None) -> None:
        self._engine.on_layers = call

    def launch(self, plan: StepPlan) -> PendingStep:
        """As Engine.launch. Raises InvalidRequest with nothing sent, EngineLost once the instance is lost."""
        self._check(plan)
        step = _RankedStep(self._next_number, self._num_ranks, self._sampling_rank)
        with self._lock:
            if self._lost:
                raise EngineLost(self._lost)
            if not self._steps:
                self._first_since_s = time.monotonic()
            self._steps.append(step)
        self._next_number += 1
        self._channel.broadcast(step_message(step.number, plan))
        try:
            step.own = self._engine.launch(plan)
        except BaseException as error:  # noqa: BLE001 -- whatever it is, the other ranks are in that step
            if not isinstance(error, InvalidRequest):
                self._give_up(f"rank 0: {type(error).__name__}: {one_line(error)}", error)
            step.refused(0, error)  # all ranks refuse the same plan for the same reason, and are in step
        step.give_up, step.on_own_over = self._give_up, self._own_over
        if isinstance(step.own, DoneStep):
            self._own_over(step)
        return step

    def turn(self, role: Role, incarnation: int) -> None:
        """As Engine.turn: in the order of the steps, so that all ranks turn between the same two."""
        with self._lock:
            if self._steps:
                raise Internal(f"{len(self._steps)} steps are under way, the ranks cannot turn")
        self._channel.broadcast({"kind": "turn", "number": self._next_number, "role": role, "incarnation": incarnation})

    def _check(self, plan: StepPlan) -> None:
        self._engine.plan_limits.check(plan)
        if not self._engine.may_continue:
            for seq in plan.seqs:
                if seq.continues:
                    text = f"sequence {seq.seq_id} continues a running step, which {self._engine.plan} does not do"
                    raise InvalidRequest(text)

    def _done(self, rank: int, message: Message) -> None:
        """In the channel's thread that reads ``rank``."""
        with self._lock:
            step = next((step for step in self._steps if step.number == message["number"]), None)
        if step is None:
            raise ValueError(f"step {message['number']} is not under way")
        error = error_of(rank, message)
        if isinstance(error, EngineLost):
            self._give_up(str(error), error)
        tokens = message.get("tokens")
        with self._lock:
            if error is not None:
                step.refused(rank, error)
            step.answered(rank, None if tokens is None else tuple(tokens))
            self._drop_over()

    def _own_over(self, step: "_RankedStep") -> None:
        with self._lock:
            step.missing.discard(0)
            self._drop_over()

    def _drop_over(self) -> None:
        while self._steps and not self._steps[0].missing:
            self._steps.popleft()
            self._first_since_s = time.monotonic()

    def _give_up(self, reason: str, error: BaseException) -> NoReturn:
        """A rank that failed in an exchange may only be the first to notice that another is gone: the channel knows which
        one in a moment. Raises EngineLost."""
        with contextlib.suppress(TimeoutError):
            reason = self._channel.lost.result(_WHO_IS_GONE_S)
        self._channel.lose(reason)
        raise EngineLost(reason) from error

    def _check_deadline(self) -> None:
        """In the channel's thread: the oldest step has its time, whatever hangs."""
        with self._lock:
            late = self._steps[0] if self._steps else None
            if late is None or time.monotonic() - self._first_since_s <= self._step_timeout_s:
                return
            silent = ", ".join(str(rank) for rank in sorted(late.missing))
        self._channel.lose(f"a step has taken more than {self._step_timeout_s:g} s, ranks {silent} have not ended it")

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            self._lost = reason
            steps, self._steps = list(self._steps), deque()
        for step in steps:
            step.lost(reason)


class _RankedStep:
    """A step on all ranks. ``missing``: those that have not ended it. ``answers``: what the others said, all of them."""

    def __init__(self, number: int, num_ranks: int, sampling_rank: int) -> None:
        self.number = number
        self.own: PendingStep | None = None
        self.give_up: Callable[[str, BaseException], NoReturn] | None = None
        self.answers: Future[Tokens | None] = Future()
        self.on_own_over: Callable[[_RankedStep], None] = lambda step: None
        self.missing = set(range(num_ranks))
        self._num_ranks = num_ranks
        self._sampling_rank = sampling_rank
        self._tokens: Tokens | None = None
        self._refusals: dict[int, InvalidRequest] = {}
        self._started_s = time.perf_counter()

    def answered(self, rank: int, tokens: Tokens | None) -> None:
        if rank == self._sampling_rank:
            self._tokens = tokens
        self.missing.discard(rank)
        if self.missing <= {0} and not self.answers.done():
            self.answers.set_result(self._tokens)

    def refused(self, rank: int, error: InvalidRequest) -> None:
        self._refusals[rank] = error

    def lost(self, reason: str) -> None:
        if not self.answers.done():
            self.answers.set_exception(EngineLost(reason))

    def wait(self) -> StepResult:
        try:
            own = None if self.own is None else self.own.wait()
        except Exception as error:  # noqa: BLE001 -- as in launch
            assert self.give_up is not None
            self.give_up(f"rank 0: {type(error).__name__}: {one_line(error)}", error)
        self.on_own_over(self)
        drawn = self.answers.result()
        if self._refusals:
            self._raise_refusal()
        assert own is not None
        if self._sampling_rank == 0:
            return own
        if drawn is None or len(drawn) != len(own.tokens):
            raise EngineLost(f"rank {self._sampling_rank} did not say what was drawn")
        return StepResult(tokens=drawn, step_ms=(time.perf_counter() - self._started_s) * 1e3)

    def _raise_refusal(self) -> NoReturn:
        """Raises InvalidRequest when every rank refused, else EngineLost: activations of the others are on their way to
        ranks that do not expect them, and the next step would take them for its own."""
        rank, error = min(self._refusals.items())
        if len(self._refusals) == self._num_ranks:
            raise error
        assert self.give_up is not None
        self.give_up(f"rank {rank} refused a step that others computed: {one_line(error)}", error)
