"""The hosts of a Ray cluster as values, and what each has and has free. Asked for every few seconds, not per instance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biphase.cluster.gpus import WHOLE
from biphase.cluster.ray_room import NOTHING, Room, room_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHost:
    """A living one."""

    node_id: str
    address: str
    hostname: str
    is_head: bool = False
    total: Room = NOTHING
    free: Room = NOTHING

    def is_called(self, name: str) -> bool:
        return name in (self.address, self.hostname, self.node_id)

    def __str__(self) -> str:
        gpus = f", {self.total.gpus / WHOLE:g} GPUs" if self.total.gpus else ""
        return f"{self.address} ({self.total.cpus / WHOLE:g} CPUs{gpus})"


@dataclass(slots=True)
class HostsSeen:
    """What changed from one look at the hosts to the next. Pure."""

    hosts: dict[str, RayHost] = field(default_factory=dict)

    def look(self, hosts: Sequence[RayHost]) -> tuple[list[RayHost], list[RayHost]]:
        """Those that have joined and those that are gone since the last look."""
        now = {host.node_id: host for host in hosts}
        joined = [host for key, host in now.items() if key not in self.hosts]
        gone = [host for key, host in self.hosts.items() if key not in now]
        self.hosts = now
        return joined, gone


def hosts_of(
    nodes: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, Any]], room: Callable[..., Room] = room_of
) -> list[RayHost]:
    """From Ray's own words: ``ray.nodes()`` and what is available by node id."""
    return [
        RayHost(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            is_head="node:__internal_head__" in node["Resources"],
            total=room(node["Resources"]),
            free=room(free.get(node["NodeID"], {})),
        )
        for node in nodes
        if node["Alive"]
    ]
