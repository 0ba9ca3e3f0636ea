"""The global queue, and the shell around the policy: it asks where requests go, and opens their legs there."""

import asyncio
import bisect
import logging
from collections.abc import Set as AbstractSet

from biphase.protos.errors import Aborted, BiphaseError, Overloaded, Unavailable
from biphase.router.config import RequestLimits
from biphase.router.counters import Counters
from biphase.router.fleet import Fleet
from biphase.router.policy import choose_decode, in_reach, place, wait_for_decode
from biphase.router.replay_budget import UNKNOWN_QUEUE_TOKENS, ReplayBudget
from biphase.router.request import Request
from biphase.router.view import Disaggregated, InstanceKey, Local, Pair, Refuse, Rules, Wait

logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns the queues (in order of arrival) and those that wait for a decode instance with their ticket in hand.

    Replays have a queue of their own, which goes first as far as their budget goes. It looks again when a request comes, when an instance's load or state changes, and when a wait of the policy's is
    over; never otherwise.
    """

    def __init__(
        self, fleet: Fleet, rules: Rules, limits: RequestLimits, counters: Counters, replay_share: float = 0.5
    ) -> None:
        self._fleet = fleet
        self._rules = rules
        self._limits = limits
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._queue: list[Request] = []
        self._replays: list[Request] = []
        self._budget = ReplayBudget(replay_share)
        self._seekers: list[Request] = []
        self._is_scheduled = False
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def queued_requests(self) -> int:
        return len(self._queue) + len(self._replays) + len(self._seekers)

    @property
    def queued_tokens(self) -> int:
        return sum(request.place.prompt_tokens for request in (*self._queue, *self._replays))

    def check_requests(self, num_before: int = 0) -> None:
        """Raises Overloaded when the queue takes no request at all. ``num_before``: how many are about to enter it."""
        waiting = len(self._queue) + num_before
        if waiting >= self._limits.max_queued_requests:
            self._counters.add("refused_queue_requests")
            raise Overloaded(
                f"{waiting} requests wait already, the limit is {self._limits.max_queued_requests}; try later"
            )

    def check_tokens(self, prompt_tokens: int) -> None:
        """Raises Overloaded when the queue takes no such prompt."""
        queued = self.queued_tokens
        if self._queue and queued + prompt_tokens > self._limits.max_queued_tokens:
            self._counters.add("refused_queue_tokens")
            raise Overloaded(
                f"{queued} prompt tokens wait already and this prompt has {prompt_tokens},"
                f" the limit is {self._limits.max_queued_tokens}; try later"
            )

    def submit(self, request: Request) -> None:
        """Take a request into its place in its queue; also one that was refused by an instance."""
        self._budget.give_back(request.id)
        queue = self._replays if request.is_replay else self._queue
        bisect.insort(queue, request, key=lambda queued: queued.sequence)
        self.schedule()

    def went_on(self, request: Request) -> None:
        """A replay has borne its first new token: the next may begin."""
        if self._budget.give_back(request.id):
            self.schedule()

    def seek_decode(self, request: Request) -> None:
        """Its ticket is there: open the decode leg where room was promised, else wherever there is room."""
        link = self._fleet.links.get(request.promised_decode) if request.promised_decode is not None else None
        if link is not None:
            view = link.view()
            fits = view.takes_work and not view.full and view.generation == request.place.generation
            prefill = request.prefill_key
            open_pair = prefill is None or self._fleet.pairs.is_open_to(
                Pair(prefill=prefill, decode=view.key), request.id
            )
            # where there is nobody else it finds out by itself, and begins anew from there
            may = open_pair or not self.can_pull(request)
            if fits and may and link.account.has_promise(request.id):
                request.open_decode(link)
                return
            link.account.settle(request.id)
        request.promised_decode = None
        self._seekers.append(request)
        self.schedule()

    def can_pull(self, request: Request, but: InstanceKey | None = None) -> bool:
        """Whether a decode instance is left, with room or not, that could pull from the request's prefill instance; another
        one than ``but``."""
        found = in_reach(request.place, self._fleet.view(), request.prefill_key)
        return any(one.key != but for one in found)

    def forget(self, request: Request) -> None:
        """It has ended: it waits for nothing any more, and nothing is promised to it."""
        for waiting in (self._queue, self._replays, self._seekers):
            if request in waiting:
                waiting.remove(request)
        self._budget.give_back(request.id)
        for link in self._fleet.links.values():
            link.account.settle(request.id)
        self.schedule()  # what it held, or what waited behind it, may go on

    def schedule(self) -> None:
        """Look at everything that waits, once, at the next turn of the loop."""
        if not self._is_scheduled and (self._queue or self._replays or self._seekers):
            self._is_scheduled = True
            self._loop.call_soon(self._pump)

    def close(self) -> None:
        if self._look_again is not None:
            self._look_again.cancel()

    def _pump(self) -> None:
        self._is_scheduled = False
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        untils = [*self._pump_seekers(), *self._pump_queue()]
        if untils:
            self._look_again = self._loop.call_at(min(untils), self._pump)

    def _pump_seekers(self) -> list[float]:
        untils: list[float] = []
        for request in list(self._seekers):
            if not request.is_seeking:  # its first token was its last
                self._seekers.remove(request)
                continue
            view = self._fleet.view()
            key = choose_decode(request.place, view, request.prefill_key)
            if key is not None:
                self._seekers.remove(request)
                self._promise_decode(request, key)
                self._try_pair(request, request.prefill_key, key)
                request.open_decode(self._fleet.links[key])
                continue
            if request.has_lost_decode and not self.can_pull(request):  # the others are gone too by now
                self._seekers.remove(request)
                request.begin_anew()
                continue
            answer = wait_for_decode(request.place, view, self._rules, request.prefill_key)
            if isinstance(answer, Refuse):
                request.end(_refusal(request, answer))
            elif answer.until_s is not None:
                untils.append(answer.until_s)
        return untils

    def _pump_queue(self) -> list[float]:
        """Serve the queues from their heads, replays first, until a head has to wait."""
        untils: list[float] = []
        off: set[str] = set()
        for request in list(self._replays):
            capacity = self._capacity_tokens()
            if not self._budget.allows(request.place.prompt_tokens, capacity):
                break  # what is new goes on beside those that run
            waits = self._serve(request, self._replays, off)
            if waits is None:
                continue
            if waits.until_s is not None:
                untils.append(waits.until_s)
            if not waits.alone:
                return untils + self._pump_waiting()
            if request.place.generation is not None:
                off.add(request.place.generation)
        while self._queue:
            if self._serve(self._queue[0], self._queue, off) is not None:
                return untils + self._pump_waiting()
        return untils

    def _serve(self, request: Request, queue: list[Request], off: AbstractSet[str]) -> Wait | None:
        """Send it where the policy says, or end it; what it has to wait for, if it has to. ``off``: as for ``place``."""
        placement = place(request.place, self._fleet.view(), self._rules, off=off)
        match placement:
            case Wait():
                return placement
            case Refuse():
                request.end(_refusal(request, placement))
                return None
        queue.remove(request)
        if request.is_replay:
            self._budget.take(request.id, request.place.prompt_tokens)
        match placement:
            case Disaggregated():
                link = self._fleet.links[placement.prefill]
                if placement.decode is not None:
                    self._promise_decode(request, placement.decode)
                    self._try_pair(request, placement.prefill, placement.decode)
                link.account.promise(request.id, tokens=request.place.prompt_tokens, blocks=0)
                request.open_prefill(link, placement.reason)
            case Local():
                self._promise_decode(request, placement.decode)
                request.open_local(self._fleet.links[placement.decode], placement.reason)
        return None

    def _capacity_tokens(self) -> int:
        """What the instances that prefill queue together: the prefill ones, or those that decode where there is none."""
        view = self._fleet.view()
        ready = [one for one in view.of_role("prefill") if one.takes_work]
        ready = ready or [one for one in view.of_role("decode") if one.takes_work]
        return sum(one.max_queued_tokens or UNKNOWN_QUEUE_TOKENS for one in ready)

    def _pump_waiting(self) -> list[float]:
        """A head waits, and with it all behind it; but none waits for what will not come."""
        untils: list[float] = []
        view = self._fleet.view()
        away = view.no_prefill_since_s is not None or view.no_decode_since_s is not None
        waiting = [*self._replays, *self._queue] if away else [*self._replays[:1], *self._queue[:1]]
        for request in waiting:
            placement = place(request.place, view, self._rules)
            if isinstance(placement, Refuse):
                request.end(_refusal(request, placement))
            elif isinstance(placement, Wait) and placement.until_s is not None:
                untils.append(placement.until_s)
        return untils

    def _try_pair(self, request: Request, prefill: InstanceKey | None, decode: InstanceKey) -> None:
        if prefill is not None:
            self._fleet.pairs.tried(Pair(prefill=prefill, decode=decode), request.id, self._loop.time())

    def _promise_decode(self, request: Request, key: InstanceKey) -> None:
        link = self._fleet.links[key]
        request.promised_decode = key
        blocks = link.view().blocks_for(request.place.prompt_tokens + 1)
        link.account.promise(request.id, tokens=request.place.prompt_tokens, blocks=blocks)

    def __repr__(self) -> str:
        return (
            f"<Dispatcher [{len(self._queue)} queued, {len(self._replays)} replays, "
            f"{len(self._seekers)} seek a decode instance]>"
        )


def _refusal(request: Request, refuse: Refuse) -> BiphaseError:
    error = Aborted if refuse.aborted else Unavailable
    return error(f"{request.id}: {refuse.detail}")
