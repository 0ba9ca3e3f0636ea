"""Which routers are silent, and for how long. Pure: values and times come in.

A router reports about once a second. Its silence is its own only where somebody else is heard over the network: a
controller that is cut off hears nobody, and must blame nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STALE_S = 5.0
"""A router whose last word is older is silent."""
WITNESS_S = 2.5
"""Who was heard since then is reached now. Shorter than STALE_S by more than routers' reports lie apart: of those that are
cut off together none is taken for silent because another was heard last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A process that should be heard. ``heard_s``: its last word, or since when one could have come."""

    name: str
    node: str
    heard_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``silent``: since when, by name; ``kill``: those that were silent for ``replace_after_s``."""

    silent: Mapping[str, float] = field(default_factory=dict)
    kill: tuple[str, ...] = ()


def judge(
    routers: Sequence[Heard],
    instances: Sequence[Heard],
    before: Mapping[str, float],
    *,
    own_node: str,
    replace_after_s: float,
    now_s: float,
) -> Verdict:
    """``before``: the last verdict's ``silent``; ``own_node``: the controller's host. A silence that nobody stands witness
    for is none, and one that was found before begins anew."""
    reached = [other for other in (*routers, *instances) if now_s - other.heard_s <= WITNESS_S]
    silent: dict[str, float] = {}
    kill = []
    for router in routers:
        if now_s - router.heard_s < STALE_S:
            continue
        if not any(router.node == own_node or witness.node != own_node for witness in reached):
            if router.name in before:
                silent[router.name] = now_s
            continue
        silent[router.name] = before.get(router.name, now_s)
        if now_s - silent[router.name] >= replace_after_s:
            kill.append(router.name)
    return Verdict(silent=silent, kill=tuple(kill))
