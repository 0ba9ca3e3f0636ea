"""Whether instances that start one after the other find room, each once others have given theirs back. Counts only, no Ray."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biphase.cluster.ray_room import Room, room_of

Held = Mapping[str, Sequence[tuple[str, Room]]]
"""By instance: the host of each of its stages, and what it holds there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A start of stages, the largest first. ``emptied``: who has given back before; ``shunned``: hosts that are no choice."""

    name: str
    stages: Sequence[Room]
    emptied: Sequence[str] = ()
    shunned: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """The first that finds none; ``free``: what the hosts that it may go to have left then."""

    turn: Turn
    free: Sequence[Room]


def held_of(groups: Iterable[Mapping[str, Any]], namespace: str) -> dict[str, list[tuple[str, Room]]]:
    """From Ray's table of placement groups; of the lives of one name the newest."""
    newest: dict[str, tuple[int, list[tuple[str, Room]]]] = {}
    for group in groups:
        owner, _, life = group["name"].rpartition("/")
        name, _, incarnation = life.rpartition("#")
        if owner != namespace or not incarnation.isdecimal() or group["state"] != "CREATED":
            continue
        if int(incarnation) >= newest.get(name, (0, []))[0]:
            nodes = group["bundles_to_node_id"]
            rooms = [(nodes[index], room_of(bundle)) for index, bundle in group["bundles"].items()]
            newest[name] = int(incarnation), rooms
    return {name: rooms for name, (_, rooms) in newest.items()}


def first_without_room(turns: Sequence[Turn], free: Mapping[str, Room], held: Held) -> NoRoom | None:
    """First fit by host, on those that were just given back before the others; None where all find room."""
    left, holding = dict(free), dict(held)
    for turn in turns:
        given_back = [one for name in turn.emptied for one in holding.pop(name, ())]
        for host, room in given_back:
            if host in left:
                left[host] = Room(left[host].gpus + room.gpus, left[host].cpus + room.cpus)
        roomiest = sorted(left, key=lambda host: left[host], reverse=True)
        own_first = dict.fromkeys([*(host for host, _ in given_back), *roomiest])
        hosts = [host for host in own_first if host in left and host not in turn.shunned]
        there = [left[host] for host in hosts]
        taken = _place(turn.stages, hosts, left)
        if taken is None or not hosts:
            return NoRoom(turn=turn, free=there)
        holding[turn.name] = taken
    return None


def _place(stages: Sequence[Room], hosts: Sequence[str], left: dict[str, Room]) -> list[tuple[str, Room]] | None:
    taken = []
    for stage in stages:
        found = next((h for h in hosts if left[h].gpus >= stage.gpus and left[h].cpus >= stage.cpus), None)
        if found is None:
            return None
        left[found] = Room(left[found].gpus - stage.gpus, left[found].cpus - stage.cpus)
        taken.append((found, stage))
    return taken
