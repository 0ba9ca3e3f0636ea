"""What is known of hosts that are checked before they get anything, and when each is checked (again). Pure.

A check that fails says little of its host and is tried a few times; one that is answered counts at once. Whoever is refused is
looked at again, later and later: weights may have been copied, a package installed.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MAX_FAILED_CHECKS = 3
RETRY_S = 2.0
"""After a check that failed, until too many have."""
FIRST_AGAIN_S, MAX_AGAIN_S = 10.0, 300.0
"""After a refusal: doubled from one check to the next."""
NEVER_S = float("inf")
Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Checked:
    since_s: float
    due_s: float
    """When the next check is to begin; never while one runs, and for those that have passed."""
    failures: int = 0
    """Checks in a row that failed."""
    refusals: int = 0
    reason: str = ""
    """Why it is refused."""
    passed: bool = False


@dataclass(slots=True)
class HostChecks(Generic[Key]):
    """Hosts by whatever tells them apart."""

    _hosts: dict[Key, _Checked] = field(default_factory=dict)

    def join(self, key: Key, now_s: float) -> None:
        """One that is known stays as it is."""
        self._hosts.setdefault(key, _Checked(since_s=now_s, due_s=now_s))

    def keep(self, wanted: Callable[[Key], bool]) -> None:
        """Forget those that are not wanted."""
        self._hosts = {key: host for key, host in self._hosts.items() if wanted(key)}

    def due(self, now_s: float) -> list[Key]:
        """Whose check begins now; each is to be told how it went."""
        keys = [key for key, host in self._hosts.items() if host.due_s <= now_s]
        for key in keys:
            self._hosts[key].due_s = NEVER_S
        return keys

    def answered(self, key: Key, reason: str, now_s: float) -> None:
        """``reason``: what it lacks; empty: it passes."""
        host = self._hosts.get(key)
        if host is not None and reason:
            self._refuse(host, reason, now_s)
        elif host is not None:
            host.passed, host.reason, host.due_s = True, "", NEVER_S
            host.failures = host.refusals = 0

    def failed(self, key: Key, reason: str, now_s: float) -> None:
        """The check came to no end. A refusal stands with the words that it has."""
        host = self._hosts.get(key)
        if host is None:
            return
        host.failures += 1
        if host.reason or host.failures >= MAX_FAILED_CHECKS:
            self._refuse(host, host.reason or reason, now_s)
        else:
            host.due_s = now_s + RETRY_S

    def _refuse(self, host: _Checked, reason: str, now_s: float) -> None:
        host.due_s = now_s + min(MAX_AGAIN_S, FIRST_AGAIN_S * 2.0 ** min(host.refusals, 16))
        host.reason, host.refusals, host.passed = reason, host.refusals + 1, False

    @property
    def refused(self) -> dict[Key, str]:
        return {key: host.reason for key, host in self._hosts.items() if host.reason}

    def passes(self, key: Key) -> bool:
        """Whether it gets anything: neither refused nor unknown."""
        return key in self._hosts and self._hosts[key].passed

    def unknown(self, now_s: float, within_s: float = NEVER_S) -> set[Key]:
        """Those of which nothing is known yet, and that are there for less than ``within_s``."""
        return {
            key
            for key, host in self._hosts.items()
            if not host.passed and not host.reason and now_s - host.since_s < within_s
        }
