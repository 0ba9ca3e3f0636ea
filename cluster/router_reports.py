"""What routers report on their membership streams: the newest word of each, and when it came."""

from collections.abc import Callable
from dataclasses import dataclass

from biphase.cluster.router_silence import STALE_S
from biphase.protos import controller_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    at_s: float
    report: controller_pb2.RouterReport


class RouterReports:
    """Owned by the controller. Of a router's lives the newest counts; the last word of one that is silent gets stale."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.newest: dict[str, Heard] = {}
        self.listeners: list[Callable[[float, controller_pb2.RouterReport], None]] = []

    def add(self, report: controller_pb2.RouterReport) -> None:
        at_s = self._clock()
        before = self.newest.get(report.name)
        if before is None or before.report.incarnation <= report.incarnation:
            self.newest[report.name] = Heard(at_s=at_s, report=report)
        for listen in self.listeners:
            listen(at_s, report)

    def broken_pairs(self) -> list[controller_pb2.BrokenPair]:
        """As the routers see them that are heard now."""
        fresh_s = self._clock() - STALE_S
        return [pair for heard in self.newest.values() if heard.at_s > fresh_s for pair in heard.report.broken_pairs]
