"""What biphase calls its things in a Ray cluster, so that every life of a controller finds them. Pure: strings.

Actors are ``<kind>/<process>#<incarnation>`` in the deployment's namespace, with ``.<rank>of<ranks>`` behind for an
instance of several; the placement group of an instance is ``<namespace>/<process>#<incarnation>``.
"""

import re
from dataclasses import dataclass
from typing import cast

from biphase.cluster.backend import Kind
from biphase.protos.values import Role

_ACTOR = re.compile(r"(?P<kind>[a-z]+)/(?P<name>.+)#(?P<incarnation>\d+)(\.(?P<rank>\d+)of(?P<num_ranks>\d+))?")


_REQUEST = "node-for-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorName:
    """One rank of one life of one process."""

    name: str
    kind: Kind
    incarnation: int
    rank: int = 0
    num_ranks: int = 1

    def __str__(self) -> str:
        rank = f".{self.rank}of{self.num_ranks}" if self.num_ranks > 1 else ""
        return f"{self.kind}/{self.name}#{self.incarnation}{rank}"

    @staticmethod
    def parse(text: str) -> "ActorName":
        """Raises ValueError for another's name."""
        found = _ACTOR.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no name of an actor of biphase")
        return ActorName(
            name=found["name"],
            kind=cast("Kind", found["kind"]),
            incarnation=int(found["incarnation"]),
            rank=int(found["rank"] or 0),
            num_ranks=int(found["num_ranks"] or 1),
        )


def namespace_of(deployment_name: str) -> str:
    return f"biphase-{deployment_name}"


def group_name(namespace: str, name: str, incarnation: int) -> str:
    """Of an instance's placement group; groups have one list for all namespaces."""
    return f"{namespace}/{name}#{incarnation}"


def request_name(namespace: str, role: Role) -> str:
    """Of the placement group that asks for a host for one more instance of a role."""
    return f"{namespace}/{_REQUEST}{role}"


def is_request(name: str) -> bool:
    """Whether a placement group asks for a host; no process has such a name."""
    return name.rpartition("/")[2].startswith(_REQUEST)
