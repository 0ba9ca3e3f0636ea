"""Which host the next instance goes to: hosts and counts in, a host out. Ray is told it as a wish, not as an order."""

from collections.abc import Collection, Mapping, Sequence

from biphase.cluster.backend import Kind
from biphase.cluster.deployment import Placement
from biphase.cluster.ray_hosts import RayHost
from biphase.cluster.ray_room import Room

Tenants = Mapping[str, Sequence[Kind]]
"""The instances of the deployment on each host, by its id."""


def choose(
    placement: Placement,
    kind: Kind,
    stage: Room,
    hosts: Sequence[RayHost],
    tenants: Tenants,
    shunned: Collection[str] = (),
) -> RayHost | None:
    """The host for an instance of one stage that asks for ``stage``; None: none has room now.

    ``shunned``: ids of hosts that get none. Among equals the one with most of the deployment's instances under ``pack``
    and ``near``, with fewest under ``spread``; workers before the head, then by address, so that the answer is the same
    every time.
    """
    roomy = [
        host
        for host in hosts
        if host.node_id not in shunned and host.free.gpus >= stage.gpus and host.free.cpus >= stage.cpus
    ]

    def order(host: RayHost) -> tuple[int, int, bool, str]:
        there = tenants.get(host.node_id, ())
        others = sum(one != kind for one in there)
        match placement:
            case "spread":
                return others, len(there), host.is_head, host.address
            case "near":
                return -others, -len(there), host.is_head, host.address
            case "pack":
                return -len(there), 0, host.is_head, host.address

    return min(roomy, key=order, default=None)
