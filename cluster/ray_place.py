"""Which hosts the next instance goes to: hosts and counts in, hosts out. Ray is told it as a wish, not as an order."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from biphase.cluster.backend import Kind
from biphase.cluster.deployment import Placement
from biphase.cluster.ray_hosts import RayHost
from biphase.cluster.ray_room import Room

Tenants = Mapping[str, Sequence[Kind]]
"""The instances of the deployment on each host, by its id."""
Verdict = Literal["start", "wait", "anew"]
"""What becomes of an instance that has a placement group and runs nowhere yet; anew: in another group."""


def choose(
    placement: Placement,
    kind: Kind,
    stage: Room,
    hosts: Sequence[RayHost],
    tenants: Tenants,
    shunned: Collection[str] = (),
    *,
    num_stages: int = 1,
    own: Collection[str] = (),
) -> RayHost | None:
    """The host for a stage that asks for ``stage``; None: none has room now.

    ``num_stages``: so many of the instance are left; ``own``: ids of the hosts of those before; ``shunned``: of hosts that
    get none. Among equals the one with most of the deployment's instances under ``pack``
    and ``near``, with fewest under ``spread``, and before that an own one, then one with room for more of what is left;
    workers before the head, then by address, so that the answer is the same every time.
    """
    roomy = [
        host
        for host in hosts
        if host.node_id not in shunned and host.free.gpus >= stage.gpus and host.free.cpus >= stage.cpus
    ]

    def order(host: RayHost) -> tuple[int, bool, int, int, bool, str]:
        there = tenants.get(host.node_id, ())
        others = sum(one != kind for one in there)
        away, fitting = host.node_id not in own, _how_many(stage, host.free, num_stages)
        match placement:
            case "spread":
                return others, away, -fitting, len(there), host.is_head, host.address
            case "near":
                return -others, away, -fitting, -len(there), host.is_head, host.address
            case "pack":
                return 0, away, -fitting, -len(there), host.is_head, host.address

    return min(roomy, key=order, default=None)


def _how_many(stage: Room, free: Room, most: int) -> int:
    """Of the stages, at most ``most``."""
    counts = [there // each for there, each in zip(free, stage, strict=True) if each]
    return min([most, *counts])


def choose_each(
    placement: Placement,
    kind: Kind,
    stages: Sequence[Room],
    hosts: Sequence[RayHost],
    tenants: Tenants,
    shunned: Collection[str] = (),
) -> list[RayHost]:
    """The host of each stage of an instance, on as few as ``placement`` leaves; empty: not all of them find room now."""
    left = {host.node_id: host for host in hosts}
    chosen: list[RayHost] = []
    for index, stage in enumerate(stages):
        own, number = [host.node_id for host in chosen], len(stages) - index
        found = choose(placement, kind, stage, list(left.values()), tenants, shunned, num_stages=number, own=own)
        if found is None:
            return []
        free = Room(found.free.gpus - stage.gpus, found.free.cpus - stage.cpus)
        left[found.node_id] = replace(found, free=free)
        chosen.append(found)
    return chosen


def missed(placement: Placement, tenants: Tenants) -> dict[str, str]:
    """What of the placement is not so, by the id of the host, in words."""
    if len({kind for there in tenants.values() for kind in there}) < 2:
        return {}
    roles = {key: sorted(set(there)) for key, there in tenants.items() if there}
    match placement:
        case "spread":
            words = "placement is spread, yet prefill and decode are both there: nowhere else was room"
            return {key: words for key, there in roles.items() if len(there) > 1}
        case "near":
            words = "placement is near, yet only {} is there: beside the other role was no room"
            return {key: words.format(there[0]) for key, there in roles.items() if len(there) == 1}
        case "pack":
            return {}


def is_outdated(
    without: Collection[str], shunned: Collection[str], unknown: Collection[str], there: Collection[str]
) -> bool:
    """Whether what waits for room was told to go to other hosts than it may go to now.

    All are ids: ``without``: those it was told to leave out; ``shunned``: those that get nothing now; ``unknown``: of these,
    those that are being checked, for which nothing is changed yet; ``there``: those that there are.
    """
    may_be_used = set(without) & set(there) - set(shunned)
    must_be_left_out = set(shunned) - set(unknown) - set(without)
    return bool(may_be_used or must_be_left_out)


def on_granted(
    lies_on: Collection[str], shunned: Collection[str], unknown: Collection[str], there: Collection[str]
) -> Verdict:
    """Of a group whose room is on ``lies_on``; the others as in ``is_outdated``. Ray gives room on hosts that nobody has
    checked, and that no list named when the group was made."""
    nodes = set(lies_on)
    if nodes & (set(shunned) - set(unknown)):
        return "anew"
    return "wait" if nodes & set(unknown) or nodes - set(there) else "start"


def is_better(
    placement: Placement, kind: Kind, chosen: Collection[str], lies_on: Collection[str], tenants: Tenants
) -> bool:
    """Whether ``chosen`` (ids of hosts) is more what ``placement`` wants for an instance than where it has room."""

    def others(nodes: Collection[str]) -> int:
        return sum(one != kind for node in set(nodes) for one in tenants.get(node, ()))

    match placement:
        case "spread":
            return others(chosen) < others(lies_on)
        case "near":
            return others(chosen) > others(lies_on)
        case "pack":
            return False


def given_back(hosts: Sequence[RayHost], lies_on: Sequence[str], stages: Sequence[Room]) -> list[RayHost]:
    """The hosts as they would be without the room that an instance's stages have there."""
    free = {host.node_id: host.free for host in hosts}
    for node, stage in zip(lies_on, stages, strict=True):
        if node in free:
            free[node] = Room(free[node].gpus + stage.gpus, free[node].cpus + stage.cpus)
    return [
        replace(
            host,
            free=Room(min(host.total.gpus, free[host.node_id].gpus), min(host.total.cpus, free[host.node_id].cpus)),
        )
        for host in hosts
    ]
