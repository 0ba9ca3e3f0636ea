"""The ``dist`` data plane: payloads over pair groups of two, references in the frames' stream.

A group of two beside the instance's own groups, and few of them: at most ``max_pairs`` are open in a process, the least
recently used idle one is closed for a new one, so memory per communicator is bounded. Groups are built beside
requests: whoever pulls asks ``ready`` first, has the group built where it is not and goes another way meanwhile; one that
comes all the same waits ``patience_s`` for it. A peer that dies or stops costs its group, within the deadline.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter, OrderedDict
from typing import Any, TypeVar

from biphase.kvtransfer.pair_groups.backends import make_backend
from biphase.kvtransfer.pair_groups.buffers import Buffers
from biphase.kvtransfer.pair_groups.ends import DistReceiver, DistSender
from biphase.kvtransfer.pair_groups.messages import Answer, MessageError, Wish
from biphase.kvtransfer.pair_groups.pair import Pair
from biphase.kvtransfer.pair_groups.receiving import ReceivingPair
from biphase.kvtransfer.pair_groups.rendezvous import Rendezvous
from biphase.kvtransfer.pair_groups.sending import SendingPair
from biphase.kvtransfer.wire import NotReady

_log = logging.getLogger(__name__)

_AnyPair = TypeVar("_AnyPair", bound=Pair)

DEADLINE_S = 5.0
"""How long nothing may move on a pair group."""

_PATIENCE_S = {"gloo": 0.5, "nccl": 0.05}
"""How long a pull waits for a group: gloo's is there in milliseconds, nccl's takes a second."""

_WAIT = 1.5
"""How much longer a pull waits for room: a group that is lost is to end first, so that the next pull finds none."""

_GRACE_S = 1.0
"""For taking a group apart, beyond the deadline of what is under way on it."""

_KEEP_BYTES = 128 << 20


class DistPlane:
    """Owns the pair groups of one process, their store and their buffers. Lives in one event loop."""

    name = "dist"

    def __init__(
        self,
        host: str,
        *,
        device: str = "cpu",
        max_pairs: int = 8,
        patience_s: float | None = None,
        build_s: float = 10.0,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._backend = make_backend(host, device)
        self._rendezvous = Rendezvous(host, timeout_s=build_s)
        self._buffers = Buffers(_KEEP_BYTES, self._backend.buffer)
        self._max_pairs = max_pairs
        self._patience_s = _PATIENCE_S[self._backend.name] if patience_s is None else patience_s
        self._build_s = build_s
        self._deadline_s = deadline_s
        self._id = secrets.token_hex(8)
        self._pairs: OrderedDict[tuple[str, str], Pair] = OrderedDict()
        self._all: list[Pair] = []
        """With those that have been dropped and whose threads have not ended."""
        self._lives: Counter[str] = Counter()
        self._num_built = 0
        self._counters: Counter[str] = Counter()
        self._closed = False

    def counters(self) -> dict[str, int]:
        names = ("built", "broken", "closed_for_room")
        return {"dist_pairs": len(self._pairs), **{f"dist_pairs_{name}": self._counters[name] for name in names}}

    @property
    def store(self) -> tuple[str, int]:
        """Where groups that it sends on are built."""
        return self._rendezvous.address

    async def sender(self, hello: bytes, peer: str) -> "DistSender":
        try:
            wish = Wish.unpacked(hello)
        except MessageError as error:
            raise ConnectionError(f"a request from {peer} that dist cannot read: {error}") from None
        reader, life = wish.reader, wish.life
        if wish.backend != self._backend.name:
            raise ConnectionError(f"the reader's pair groups are {wish.backend}, ours {self._backend.name}")
        pair = self._pairs.get(("to", reader))
        if pair is not None and life > self._lives[reader]:
            self._drop(pair, "the reader has dropped the pair group")
            pair = None
        self._lives[reader] = max(life, self._lives[reader])
        if pair is None:
            self._num_built += 1
            pair = self._open(SendingPair, "to", reader, f"{self._id}.{self._num_built}", None)
        assert isinstance(pair, SendingPair)
        self._pairs.move_to_end(("to", reader))
        pair.acknowledge(wish.last)
        pull = pair.new_pull()
        answer = Answer(store=self.store, pair=pair.key, pull=pull, standing=pair.standing())
        return DistSender(pair, pull, self._buffers, answer.packed(), wait_s=self._deadline_s * _WAIT)

    async def receiver(self, peer: str) -> "DistReceiver":
        pair = self._pairs.get(("from", peer))
        last = pair.last if isinstance(pair, ReceivingPair) else 0
        wish = Wish(reader=self._id, life=self._lives[peer], last=last, backend=self._backend.name)
        return DistReceiver(self.join, self.leave, self._buffers, peer, wish.packed())

    def ready(self, peer: str) -> bool:
        """Whether a pull from there finds its group."""
        pair = self._pairs.get(("from", peer))
        return pair is not None and pair.ready

    async def join(self, peer: str, answer: bytes) -> tuple[ReceivingPair, int]:
        """The group that a sender's answer names, built if it must be, and the pull's number on it, for ``leave``."""
        try:
            said = Answer.unpacked(answer)
        except MessageError as error:
            raise ConnectionError(f"an answer of {peer} that dist cannot read: {error}") from None
        key, pull = said.pair, said.pull
        pair = self._pairs.get(("from", peer))
        if pair is not None and pair.key != key:
            self._drop(pair, f"{peer} has dropped the pair group")
            pair = None
        if pair is None:
            pair = self._open(ReceivingPair, "from", peer, key, said.store)
        assert isinstance(pair, ReceivingPair)
        self._pairs.move_to_end(("from", peer))
        pair.users += 1
        pair.begin(pull)
        try:
            async with asyncio.timeout(self._patience_s):
                await asyncio.shield(pair.built)
            pair.learn(said.standing)
        except TimeoutError:
            self.leave(pair, pull)
            raise NotReady(f"the pair group with {peer} is still being built") from None
        except BaseException:
            self.leave(pair, pull)
            raise
        return pair, pull

    def leave(self, pair: ReceivingPair, pull: int) -> None:
        pair.users -= 1
        pair.end(pull)

    async def close(self) -> None:
        """Returns when every group's thread has ended, at the latest after the deadline: a process that leaves while one
        still takes gloo apart is aborted."""
        self._closed = True
        for pair in list(self._pairs.values()):
            self._drop(pair, "the instance is stopping")
        await asyncio.get_running_loop().run_in_executor(
            None, self._join, [pair for pair in self._all if not pair.over]
        )

    def _join(self, pairs: list[Pair]) -> None:
        """In a thread."""
        until_s = time.monotonic() + self._deadline_s + _GRACE_S
        left = [pair for pair in pairs if not pair.join(until_s - time.monotonic())]
        if left:
            _log.warning("%d pair groups have not ended within %g s", len(left), self._deadline_s + _GRACE_S)

    def _open(self, kind: type[_AnyPair], way: str, peer: str, key: str, address: tuple[str, int] | None) -> _AnyPair:
        if self._closed:
            raise ConnectionError("the instance is stopping")
        self._make_room()

        def store() -> Any:
            return self._rendezvous.ours(key) if address is None else self._rendezvous.theirs(address, key)

        def broke(pair: Pair) -> None:
            self._counters["broken"] += 1
            _log.warning("the pair group %s %s is dropped: %s", way, peer, pair.broken)
            self._forget(pair)

        pair = kind(
            key,
            self._backend,
            store,
            build_s=self._build_s,
            deadline_s=self._deadline_s,
            on_broken=broke,
            buffers=self._buffers,
        )

        def is_built(future: "asyncio.Future[None]") -> None:
            if address is None:
                asyncio.get_running_loop().run_in_executor(None, self._rendezvous.forget, key)
            if not future.cancelled() and future.exception() is None:
                self._counters["built"] += 1

        pair.built.add_done_callback(is_built)
        self._all = [each for each in self._all if not each.over] + [pair]
        self._pairs[way, peer] = pair
        return pair

    def _make_room(self) -> None:
        """Close the least recently used of those that nobody uses. Raises ConnectionError where all are in use."""
        while len(self._pairs) >= self._max_pairs:
            idle = next((pair for pair in self._pairs.values() if pair.idle), None)
            if idle is None:
                raise ConnectionError(f"all {self._max_pairs} pair groups are in use")
            self._counters["closed_for_room"] += 1
            self._drop(idle, "closed for another pair group")

    def _drop(self, pair: Pair, reason: str) -> None:
        pair.close(reason)
        self._forget(pair)

    def _forget(self, pair: Pair) -> None:
        for (way, peer), other in self._pairs.items():
            if other is pair:
                del self._pairs[way, peer]
                if way == "from":
                    self._lives[peer] += 1
                return
