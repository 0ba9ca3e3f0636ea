"""The instances that a router knows: one link per member, and what they are as a whole."""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence

from biphase.protos.ids import LegId
from biphase.protos.values import Role
from biphase.router.config import Waits
from biphase.router.links import InstanceInfo, Link
from biphase.router.pairs import PairTable
from biphase.router.validate import Capacity
from biphase.router.view import ClusterView, InstanceKey, Member

logger = logging.getLogger(__name__)


class Fleet:
    """Owns every link. ``on_change`` is called, in the loop, whenever placement may come out differently."""

    def __init__(self, router_name: str, waits: Waits, on_change: Callable[[], None]) -> None:
        self.router_name = router_name
        self.membership_epoch = 0
        self.links: dict[InstanceKey, Link] = {}
        self.pairs = PairTable()
        self._waits = waits
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._leg_ids = itertools.count(secrets.randbits(32) << 31)  # no leg of this router's last life has the same
        self._closing: set[asyncio.Task[None]] = set()
        now_s = self._loop.time()
        self._none_since_s: dict[Role, float | None] = {"prefill": now_s, "decode": now_s}

    def apply(self, members: Sequence[Member], epoch: int) -> None:
        """Make the links those of ``members``. A new incarnation replaces the old one at once; a member that is no
        longer named gets no new work and goes when its legs have ended."""
        self.membership_epoch = max(self.membership_epoch, epoch)
        named = {member.key: member for member in members}
        for key, link in list(self.links.items()):
            member = named.get(key)
            if member is None:
                link.retiring = True
                self._drop_if_idle(link)
            elif (member.incarnation, member.address, member.role) != (
                link.member.incarnation,
                link.member.address,
                link.member.role,
            ):
                self._drop(link, f"replaced by incarnation {member.incarnation} at {member.address}")
            else:
                link.member, link.retiring = member, False
        for key, member in named.items():
            if key not in self.links:
                link = self.links[key] = Link(member, self, self._waits)
                link.start()
        self._refresh()

    async def close(self) -> None:
        for link in list(self.links.values()):
            self._drop(link, "the router is shutting down")
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _drop(self, link: Link, reason: str) -> None:
        self.links.pop(link.member.key, None)
        self.pairs.forget(link.member.key)
        task = self._loop.create_task(link.close(reason), name=f"close link {link.member.key}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _drop_if_idle(self, link: Link) -> None:
        if link.retiring and (not link.legs or link.state != "ready"):
            self._drop(link, "the controller no longer names it")

    # ---- what links tell (LinkObserver)

    def next_leg_id(self) -> LegId:
        return LegId(next(self._leg_ids))

    def objection(self, link: Link, info: InstanceInfo) -> str | None:
        """All ready instances of one generation serve one model."""
        for other in self.links.values():
            if other is link or other.state != "ready" or other.info is None:
                continue
            if other.member.generation != link.member.generation:
                continue  # while one takes the other's place
            if other.info.model.model_hash != info.model.model_hash:
                ours, theirs = other.info.model, info.model
                return (
                    f"{info.label} serves {theirs.name} of hash {theirs.model_hash.hex()[:12]}, but {other.info.label}"
                    f" serves {ours.name} of hash {ours.model_hash.hex()[:12]}"
                )
        return None

    def link_changed(self, link: Link) -> None:
        if self.links.get(link.member.key) is link:
            if link.state == "lost":
                self.pairs.forget(link.member.key)
            self._drop_if_idle(link)
        self._refresh()

    def _refresh(self) -> None:
        for link in self.links.values():
            link.note_state()
        for role in self._none_since_s:
            if any(link.state == "ready" and link.member.role == role for link in self.links.values()):
                self._none_since_s[role] = None
            elif self._none_since_s[role] is None:
                self._none_since_s[role] = self._loop.time()
        self._on_change()

    # ---- what they are as a whole

    def view(self) -> ClusterView:
        now_s = self._loop.time()
        return ClusterView(
            instances=tuple(link.view() for link in self.links.values()),
            now_s=now_s,
            broken=self.pairs.broken(now_s),
            retry_s=self.pairs.next_retry_s(now_s),
            no_prefill_since_s=self._none_since_s["prefill"],
            no_decode_since_s=self._none_since_s["decode"],
        )

    def capacity(self, *, vocab_size: int, max_context: int) -> Capacity:
        """What can be asked of the deployment; the tokenizer's word stands in until an instance has given its own."""
        infos = [link.info for link in self.links.values() if link.info is not None]
        decodes = [info for info in infos if info.role == "decode"]
        largest = max(decodes, key=lambda info: info.num_blocks * info.block_size, default=None)
        return Capacity(
            vocab_size=min((info.model.vocab_size for info in infos), default=vocab_size),
            max_model_len=min((info.model.max_model_len for info in infos), default=max_context),
            num_blocks=largest.num_blocks if largest is not None else None,
            block_size=largest.block_size if largest is not None else 1,
        )

    @property
    def num_legs(self) -> int:
        return sum(len(link.legs) for link in self.links.values())

    def any_info(self) -> InstanceInfo | None:
        """Some instance's Welcome, a decode instance's first: what the model is."""
        links = sorted(self.links.values(), key=lambda link: (link.member.role, link.member.key))
        return next((link.info for link in links if link.info is not None), None)

    def can_serve(self) -> bool:
        return self._none_since_s["decode"] is None

    def __repr__(self) -> str:
        return f"<Fleet {[*self.links.values()]}>"
