"""What a controller may ask of an instance as a whole: drain, resume, turn to the other role, retire.

An order is obeyed, or refused in one line that changes nothing. Who waits for what follows from it is life.py.
"""

import asyncio
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from biphase.engine.link import Identity
from biphase.protos.values import Role

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The life that follows this one on the same engine."""

    role: Role
    incarnation: int


class Drainable(Protocol):
    """What orders need of the worker."""

    @property
    def draining(self) -> bool: ...

    def drain(self, grace_s: float = 0.0) -> None: ...

    def resume(self) -> None: ...


class Orders:
    """Of one life of an instance. ``turning`` is set with ``turn``, ``retiring`` with ``retired``, the reason.

    ``roles``: those that this process can serve.
    """

    def __init__(self, worker: Drainable, identity: Identity, roles: Collection[Role] = ()) -> None:
        self.turn: Turn | None = None
        self.retired = ""
        self.stopping = False
        """The process was asked to stop: what it does about that is not the controller's."""
        self.turning = asyncio.Event()
        self.retiring = asyncio.Event()
        self._worker = worker
        self._identity = identity
        self._roles = roles

    def drain(self, grace_s: float) -> str | None:
        """Take nothing new; what still runs after ``grace_s`` (0: as long as it takes) is ended. Again: the new grace."""
        refusal = self._reason_against_grace(grace_s) or self._reason_as_it_ends()
        if refusal is None:
            self._worker.drain(grace_s)
        return refusal

    def resume(self) -> str | None:
        refusal = self._reason_as_it_ends()
        if refusal is None:
            self._worker.resume()
        return refusal

    def flip(self, role: Role | None, incarnation: int, grace_s: float) -> str | None:
        """Drain, then live on as another. ``role`` None: one that is not known here."""
        us = self._identity
        if role is not None and not self.stopping and self.turn == Turn(role=role, incarnation=incarnation):
            return None  # asked again, by a controller that does not know that it did
        refusal = self._reason_against_grace(grace_s) or self._reason_as_it_ends()
        if refusal is not None:
            return refusal
        if role is None:
            return "the role is unknown, there are: prefill, decode"
        if role == us.role:
            return f"{us.name} is a {role} instance already"
        if role not in self._roles:
            return f"{us.name} cannot turn into a {role} instance: its process has no part for that"
        if incarnation <= us.incarnation:
            return f"incarnation {incarnation} is not above {us.incarnation}, which {us.name} lives"
        if self._worker.draining:
            return f"{us.name} is draining already: it is resumed first, or it ends"
        _log.info("%s turns into a %s instance, incarnation %d, within %g s", us.name, role, incarnation, grace_s)
        self.turn = Turn(role=role, incarnation=incarnation)
        self._worker.drain(grace_s)
        self.turning.set()
        return None

    def retire(self, reason: str) -> str | None:
        if not self.retired:
            self.retired = reason or "it is wanted no more"
            _log.warning("%s retires: %s", self._identity.name, self.retired)
            self.retiring.set()
        return None

    def _reason_as_it_ends(self) -> str | None:
        if self.retired:
            return f"{self._identity.name} retires: {self.retired}"
        if self.stopping:
            return f"{self._identity.name} drains to stop"
        if self.turn is not None:
            return f"{self._identity.name} turns into a {self.turn.role} instance already"
        return None

    def _reason_against_grace(self, grace_s: float) -> str | None:
        if math.isfinite(grace_s) and grace_s >= 0:
            return None
        return f"grace_s is {grace_s}, it must be a number from 0 up"
