"""Where in the cluster processes go: an instance's placement group, a router's host; and the groups that are there.

A group has one bundle per stage, which Ray never divides between hosts. Where the deployment wants stages to lie is told to
Ray by their labels, which it obeys to the letter: what then finds no room is made anew without.
"""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from biphase.cluster.backend import Kind, NodeView, ProcessSpec
from biphase.cluster.deployment import Placement
from biphase.cluster.gpus import GpuPart
from biphase.cluster.ray_group import RayGroup
from biphase.cluster.ray_names import group_name
from biphase.cluster.ray_nodes import SOON_S, NodeBook
from biphase.cluster.ray_place import Verdict, choose_each, given_back, is_better, is_outdated, missed, on_granted
from biphase.cluster.ray_room import NOTHING, Room, bundles_of, fits, rooms_asked
from biphase.protos.errors import SetupError

NODE_ID_LABEL = "ray.io/node-id"
PINNED_S = 2.0
"""How long stages have to find room on the very hosts that were chosen for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A placement group as Ray was asked for it."""

    spec: ProcessSpec
    at_s: float
    without: frozenset[str]
    """Ids of hosts where it may not go."""
    targets: tuple[str, ...]
    """Ids of those where it is to go, stage by stage; none: anywhere else."""
    pinned: bool
    """It may go nowhere but there."""
    moved: bool
    """It was made anew for the sake of the placement."""
    lies_on: tuple[str, ...] = ()
    """Ids of hosts where it has found room, or is about to be asked for."""


class RayPlacement:
    """Of one deployment. ``groups``: all lives that its backend holds; ``joined``: whether there are several hosts."""

    def __init__(
        self, namespace: str, book: NodeBook, groups: Mapping[tuple[str, int], RayGroup], *, joined: bool
    ) -> None:
        self._namespace, self._book, self._groups, self._joined = namespace, book, groups, joined
        self._made: dict[tuple[str, int], Made] = {}
        self._stages: dict[Kind, Room] = {}
        """What a stage of an instance asks for, of those that were placed last."""
        self._wanted: Placement = "pack"

    def options(self, spec: ProcessSpec, share: float) -> Callable[[int], dict[str, Any]]:
        """Of the actors of a stage. Makes an instance's placement group; a blocking Ray call."""
        if spec.kind == "router" or spec.kind == "controller":
            address = self.address_of(spec.deployment.router_place(spec.name).node) if spec.kind == "router" else ""
            if address:  # Ray gives each host a resource of that name: one that is not there yet is waited for
                return lambda stage: {"resources": {f"node:{address}": 0.001}}
            # where the user is: they listen on this host's addresses
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            return lambda stage: {"scheduling_strategy": here}
        return inside(self.make(spec, share))

    def make(self, spec: ProcessSpec, share: float) -> PlacementGroup:
        """An instance's group, which Ray gives room in a moment or later; a blocking Ray call."""
        bundles, stages = bundles_of(spec, share), _stages_of(spec, share)
        shunned = self.shunned(spec)
        targets = self._targets(spec, stages, shunned) if self._joined else []
        before = self._made.get((spec.name, spec.incarnation))
        pinned = len(targets) > 1 and (before is None or before.targets != tuple(targets))
        options: dict[str, Any] = {"strategy": "PACK"}
        if len(targets) == 1:
            options = {"strategy": "STRICT_PACK", "_soft_target_node_id": targets[0]}
        if pinned:
            options["bundle_label_selector"] = [{NODE_ID_LABEL: target} for target in targets]
        else:
            options |= avoiding(shunned, len(bundles))
        group: PlacementGroup = placement_group(
            bundles, name=group_name(self._namespace, spec.name, spec.incarnation), lifetime="detached", **options
        )
        self._note(spec, stages[0], shunned, targets, pinned=pinned)
        return group

    def _note(self, spec: ProcessSpec, stage: Room, shunned: set[str], targets: list[str], *, pinned: bool) -> None:
        before = self._made.get((spec.name, spec.incarnation))
        made = Made(
            spec=spec,
            at_s=time.monotonic(),
            without=frozenset(shunned),
            targets=tuple(targets),
            pinned=pinned,
            moved=before is not None and before.moved,
        )
        living = {key: one for key, one in self._made.items() if key in self._groups and self._groups[key].end is None}
        self._made = {**living, (spec.name, spec.incarnation): made}
        self._stages[spec.kind] = stage
        self._wanted = spec.deployment.placement

    def verdict(self, spec: ProcessSpec, share: float, lies_on: Sequence[str]) -> Verdict:
        """Of an instance that nothing runs of. ``lies_on``: the hosts of its stages, by their ids; empty: no room yet. Where ``make``
        is called, too: what was made is one thread's."""
        key = spec.name, spec.incarnation
        made = self._made[key]
        shunned, unknown = self.shunned(spec), self._book.unknown(spec.deployment)
        there = {host.node_id for host in self._book.hosts}
        if not lies_on:
            late = made.pinned and time.monotonic() - made.at_s >= PINNED_S
            return "anew" if late or is_outdated(made.without, shunned, unknown, there) else "wait"
        self._made[key] = made = replace(made, lies_on=tuple(lies_on))
        found = on_granted(lies_on, shunned, unknown, there)
        if found == "wait" and self._has_room(spec, share, shunned):
            return "anew"  # on hosts that have passed, rather than wait for the check of this one
        if found == "start" and not made.targets and not made.moved:
            return self._by_wish(made, share, shunned)
        return found

    def _by_wish(self, made: Made, share: float, shunned: set[str]) -> Verdict:
        """Of one for which no hosts could be chosen when it was made: several may be there by now."""
        spec, stages = made.spec, _stages_of(made.spec, share)
        placement = spec.deployment.placement
        if placement != "pack" and self._book.reason_to_wait_for_checks(spec.deployment, SOON_S):
            return "wait"
        hosts, tenants = given_back(self._book.hosts, made.lies_on, stages), self._tenants(but=spec.name)
        chosen = tuple(host.node_id for host in choose_each(placement, spec.kind, stages, hosts, tenants, shunned))
        if not chosen or not is_better(placement, spec.kind, chosen, made.lies_on, tenants):
            return "start"
        # others that are looked at before it is made must know already that it goes
        self._made[spec.name, spec.incarnation] = replace(made, moved=True, lies_on=chosen)
        return "anew"

    def reason_to_wait(self, spec: ProcessSpec, share: float) -> str:
        """Why an instance is not placed just now: who has room may be known in a moment. Empty: it is to be placed."""
        if self._has_room(spec, share, self.shunned(spec)):
            return ""
        return self._book.reason_to_wait_for_checks(spec.deployment, SOON_S)

    def _has_room(self, spec: ProcessSpec, share: float, shunned: set[str]) -> bool:
        return fits(_stages_of(spec, share), [host.free for host in self._book.hosts if host.node_id not in shunned])

    def views(self) -> list[NodeView]:
        shunned = self._book.shunned()
        takes = {
            host.node_id: tuple(kind for kind, stage in self._stages_by_role() if fits([stage], [host.total]))
            for host in self._book.hosts
            if host.node_id not in shunned
        }
        return self._book.views(takes, missed(self._wanted, self._tenants(planned=False)))

    def _stages_by_role(self) -> list[tuple[Kind, Room]]:
        return [("prefill", self._stages.get("prefill", NOTHING)), ("decode", self._stages.get("decode", NOTHING))]

    def _targets(self, spec: ProcessSpec, stages: list[Room], shunned: set[str]) -> list[str]:
        """The hosts that the deployment's placement wants for the stages; none where not all find room now."""
        placement, tenants = spec.deployment.placement, self._tenants(but=spec.name)
        found = choose_each(placement, spec.kind, stages, self._book.hosts, tenants, shunned)
        return [host.node_id for host in found]

    def _tenants(self, *, but: str = "", planned: bool = True) -> dict[str, list[Kind]]:
        """The roles on each host. ``planned``: with instances that are not there yet, where Ray was asked to place them."""
        tenants: dict[str, list[Kind]] = {}
        for key, group in self._groups.items():
            if group.end is not None or key[0] == but or group.kind not in ("prefill", "decode"):
                continue
            words = [word for rank in group.ranks if (word := rank.word()) is not None]
            found = {host.node_id for word in words if (host := self._book.find(word.node)) is not None}
            if not found and planned and key in self._made:
                found = set(self._made[key].lies_on or self._made[key].targets)
            role: Kind = group.kind if not words else "prefill" if words[0].kind == "prefill" else "decode"
            for node in found:
                tenants.setdefault(node, []).append(role)
        return tenants

    def address_of(self, node: str) -> str:
        """Of the host that a deployment calls ``node``; empty for the one we are on."""
        found = self._book.find(node)
        if not node or found is not None:
            return found.address if found is not None else ""
        try:
            return socket.gethostbyname(node)
        except OSError as error:
            there = ", ".join(host.address for host in self._book.hosts)
            raise SetupError(f"routers: node {node!r} is no address and no known host; there are {there}") from error

    def shunned(self, spec: ProcessSpec) -> set[str]:
        """Ids of hosts where it may not go."""
        avoided = {host.node_id for host in self._book.hosts if any(host.is_called(name) for name in spec.avoid_nodes)}
        return self._book.shunned(spec.deployment) | avoided


def inside(group: PlacementGroup) -> Callable[[int], dict[str, Any]]:
    """Options of the actors of a stage."""
    return lambda stage: {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=stage)
    }


def lies_on(group: PlacementGroup) -> list[str] | None:
    """The hosts of its bundles, by their ids; empty: it has no room yet. None: it is gone. A blocking Ray call."""
    found = placement_group_table(group)
    match found.get("state", "REMOVED"):
        case "REMOVED":
            return None
        case "CREATED":
            return [found["bundles_to_node_id"][bundle] for bundle in sorted(found["bundles_to_node_id"])]
        case _:
            return []


def avoiding(shunned: set[str], num_bundles: int) -> dict[str, Any]:
    """Options of a placement group none of whose bundles may lie on these hosts."""
    if not shunned:
        return {}
    return {"bundle_label_selector": [{NODE_ID_LABEL: f"!in({','.join(sorted(shunned))})"}] * num_bundles}


def _stages_of(spec: ProcessSpec, share: float) -> list[Room]:
    return rooms_asked([spec], {spec.name: GpuPart(share=share)}) or [NOTHING] * spec.plan.pp


def groups_there() -> dict[str, str]:
    """The names of all placement groups of the cluster, by id."""
    return {key: group["name"] for key, group in placement_group_table().items() if group["state"] != "REMOVED"}


def remove_groups(names: set[str]) -> None:
    """What runs in them ends with them. Those that are not there are done."""
    for key, name in groups_there().items() if names else ():
        if name in names:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
