"""The global queue, and the shell around the policy: it asks where requests go, and opens their legs there."""

import asyncio
import bisect
import logging

from biphase.protos.errors import Overloaded, Unavailable
from biphase.router.config import RequestLimits
from biphase.router.counters import Counters
from biphase.router.fleet import Fleet
from biphase.router.policy import choose_decode, place, wait_for_decode
from biphase.router.request import Request
from biphase.router.view import ClusterView, Disaggregated, InstanceKey, Local, Refuse, Rules, Wait

logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns the queue (in order of arrival) and those that wait for a decode instance with their ticket in hand.

    It looks again when a request comes, when an instance's load or state changes, and when a wait of the policy's is
    over; never otherwise.
    """

    def __init__(self, fleet: Fleet, rules: Rules, limits: RequestLimits, counters: Counters) -> None:
        self._fleet = fleet
        self._rules = rules
        self._limits = limits
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._queue: list[Request] = []
        self._seekers: list[Request] = []
        self._is_scheduled = False
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def queued_requests(self) -> int:
        return len(self._queue) + len(self._seekers)

    @property
    def queued_tokens(self) -> int:
        return sum(request.place.prompt_tokens for request in self._queue)

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
        """Take a request into its place in the queue; also one that was refused by an instance."""
        bisect.insort(self._queue, request, key=lambda queued: queued.sequence)
        self.schedule()

    def seek_decode(self, request: Request) -> None:
        """Its ticket is there: open the decode leg where room was promised, else wherever there is room."""
        link = self._fleet.links.get(request.promised_decode) if request.promised_decode is not None else None
        if link is not None:
            view = link.view()
            if view.takes_work and not view.full and link.account.has_promise(request.id):
                request.open_decode(link)
                return
            link.account.settle(request.id)
        request.promised_decode = None
        self._seekers.append(request)
        self.schedule()

    def forget(self, request: Request) -> None:
        """It has ended: it waits for nothing any more, and nothing is promised to it."""
        if request in self._queue:
            self._queue.remove(request)
        if request in self._seekers:
            self._seekers.remove(request)
        for link in self._fleet.links.values():
            link.account.settle(request.id)
        self.schedule()  # what it held, or what waited behind it, may go on

    def schedule(self) -> None:
        """Look at everything that waits, once, at the next turn of the loop."""
        if not self._is_scheduled and (self._queue or self._seekers):
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
            view = self._fleet.view()
            key = choose_decode(request.place, view)
            if key is not None:
                self._seekers.remove(request)
                link = self._fleet.links[key]
                self._promise_decode(request, key)
                request.open_decode(link)
                continue
            answer = wait_for_decode(request.place, view, self._rules)
            if isinstance(answer, Refuse):
                request.end(Unavailable(f"{request.id}: {answer.detail}"))
            elif answer.until_s is not None:
                untils.append(answer.until_s)
        return untils

    def _pump_queue(self) -> list[float]:
        """Serve the queue from its head until the head has to wait."""
        while self._queue:
            request = self._queue[0]
            view = self._fleet.view()
            placement = place(request.place, view, self._rules)
            match placement:
                case Wait():
                    return self._pump_waiting(view)
                case Refuse():
                    request.end(Unavailable(f"{request.id}: {placement.detail}"))
                case Disaggregated():
                    del self._queue[0]
                    link = self._fleet.links[placement.prefill]
                    if placement.decode is not None:
                        self._promise_decode(request, placement.decode)
                    link.account.promise(request.id, tokens=request.place.prompt_tokens, blocks=0)
                    request.open_prefill(link, placement.reason)
                case Local():
                    del self._queue[0]
                    self._promise_decode(request, placement.decode)
                    request.open_local(self._fleet.links[placement.decode], placement.reason)
        return []

    def _pump_waiting(self, view: ClusterView) -> list[float]:
        """The head waits, and with it all behind it; but none waits for what will not come."""
        untils: list[float] = []
        away = view.no_prefill_since_s is not None or view.no_decode_since_s is not None
        for request in list(self._queue) if away else self._queue[:1]:
            placement = place(request.place, view, self._rules)
            if isinstance(placement, Refuse):
                request.end(Unavailable(f"{request.id}: {placement.detail}"))
            elif isinstance(placement, Wait) and placement.until_s is not None:
                untils.append(placement.until_s)
        return untils

    def _promise_decode(self, request: Request, key: InstanceKey) -> None:
        link = self._fleet.links[key]
        request.promised_decode = key
        blocks = link.view().blocks_for(request.place.prompt_tokens + 1)
        link.account.promise(request.id, tokens=request.place.prompt_tokens, blocks=blocks)

    def __repr__(self) -> str:
        return f"<Dispatcher [{len(self._queue)} queued, {len(self._seekers)} seek a decode instance]>"
