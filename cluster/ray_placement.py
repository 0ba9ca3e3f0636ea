"""Where in the cluster processes go: an instance's placement group, a router's host; and the groups that are there.

A group has one bundle per stage, which Ray never divides between hosts; stages are packed where they fit.
"""

import socket
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from biphase.cluster.backend import Kind, ProcessSpec
from biphase.cluster.gpus import GpuPart
from biphase.cluster.ray_group import RayGroup
from biphase.cluster.ray_names import group_name
from biphase.cluster.ray_nodes import NodeBook
from biphase.cluster.ray_place import choose
from biphase.cluster.ray_room import NOTHING, bundles_of, rooms_asked
from biphase.protos.errors import SetupError

NODE_ID_LABEL = "ray.io/node-id"


class RayPlacement:
    """Of one deployment. ``groups``: all lives that its backend holds; ``joined``: whether there are several hosts."""

    def __init__(
        self, namespace: str, book: NodeBook, groups: Mapping[tuple[str, int], RayGroup], *, joined: bool
    ) -> None:
        self._namespace, self._book, self._groups, self._joined = namespace, book, groups, joined
        self._targets: dict[tuple[str, int], str] = {}
        """Where Ray was asked to place an instance."""

    def options(self, spec: ProcessSpec, share: float) -> Callable[[int], dict[str, Any]]:
        """Of the actors of a stage. Makes an instance's placement group; a blocking Ray call."""
        if spec.kind == "router" or spec.kind == "controller":
            address = self.address_of(spec.deployment.router_place(spec.name).node) if spec.kind == "router" else ""
            if address:  # Ray gives each host a resource of that name: one that is not there yet is waited for
                return lambda stage: {"resources": {f"node:{address}": 0.001}}
            # where the user is: they listen on this host's addresses
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            return lambda stage: {"scheduling_strategy": here}
        bundles = bundles_of(spec, share)
        shunned = self.shunned(spec)
        wish = self._wish(spec, share, shunned) if self._joined and len(bundles) == 1 else None
        options: dict[str, Any] = {"strategy": "PACK"}
        if wish is not None:
            options = {"strategy": "STRICT_PACK", "_soft_target_node_id": wish}
            self._targets[spec.name, spec.incarnation] = wish
        options |= avoiding(shunned, len(bundles))
        group = placement_group(
            bundles, name=group_name(self._namespace, spec.name, spec.incarnation), lifetime="detached", **options
        )
        return lambda stage: {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=stage)
        }

    def _wish(self, spec: ProcessSpec, share: float, shunned: set[str]) -> str | None:
        """The host that the deployment's placement wants for an instance of one stage."""
        assert spec.kind == "prefill" or spec.kind == "decode"
        tenants: dict[str, list[Kind]] = {}
        for key, group in self._groups.items():
            node = self._targets.get(key)
            word = group.ranks[0].word()
            if word is not None and (host := self._book.find(word.node)) is not None:
                node = host.node_id
            if node is not None and group.end is None and key[0] != spec.name:
                tenants.setdefault(node, []).append(group.kind)
        stages = rooms_asked([spec], {spec.name: GpuPart(share=share)}) or [NOTHING]
        found = choose(spec.deployment.placement, spec.kind, stages[0], self._book.hosts, tenants, shunned)
        return found.node_id if found is not None else None

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


def avoiding(shunned: set[str], num_bundles: int) -> dict[str, Any]:
    """Options of a placement group none of whose bundles may lie on these hosts."""
    if not shunned:
        return {}
    return {"bundle_label_selector": [{NODE_ID_LABEL: f"!in({','.join(sorted(shunned))})"}] * num_bundles}


def groups_there() -> dict[str, str]:
    """The names of all placement groups of the cluster, by id."""
    return {key: group["name"] for key, group in placement_group_table().items() if group["state"] != "REMOVED"}


def remove_groups(names: set[str]) -> None:
    """What runs in them ends with them. Those that are not there are done."""
    for key, name in groups_there().items() if names else ():
        if name in names:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
