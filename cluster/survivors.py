"""Whether a supervisor goes on with what an earlier one of its name left in a Ray cluster, or begins anew. Pure: values only.

An orderly end takes away what is kept. What is there nevertheless was left by a supervisor that was killed, or outlived the
cluster's head: then the deployment goes on, where it is the one that is asked for.
"""

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from biphase.cluster.backend import CONTROLLER, Handle
from biphase.cluster.controller_state import ControllerState
from biphase.cluster.deployment import Deployment

SERVED = "served"
"""The key of what was served last, beside the controller's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What `biphase serve` was given last, as JSON, and its newest controller."""

    deployment: str
    controller_address: str
    controller_incarnation: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Served":
        """Raises ValueError or TypeError for anything else."""
        return Served(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``state`` is what the next controller begins with: all that is kept, or just what must not be used twice."""

    goes_on: bool
    reason: str
    """Empty where nothing of an earlier life was found."""
    kept: Mapping[str, Handle]
    to_kill: tuple[tuple[Handle, str], ...]
    """With why."""
    state: ControllerState
    controller_incarnation: int
    """Of the next controller."""
    controller_address: str
    """Of the last one; empty: unknown."""


def sort_out(
    wanted: Mapping[str, int], living: Iterable[Handle], given_away: Container[tuple[str, int]] = ()
) -> tuple[dict[str, Handle], list[tuple[Handle, str]]]:
    """The newest life of each wanted name, and those to be killed, with why. ``wanted``: the life that is known of each name.

    Controllers are neither, nor are lives whose places were ``given_away``: those are told to end by themselves.
    """
    kept: dict[str, Handle] = {}
    former: list[tuple[Handle, str]] = []
    for handle in sorted(living, key=lambda handle: handle.incarnation):
        if handle.kind == CONTROLLER or (handle.name, handle.incarnation) in given_away:
            continue
        if handle.name not in wanted or handle.incarnation < wanted[handle.name]:
            former.append((handle, "a former life"))
            continue
        if handle.name in kept:
            former.append((kept[handle.name], "a newer life runs"))
        kept[handle.name] = handle
    return kept, former


def plan(served_text: str | None, wanted: Deployment, state_text: str | None, living: Iterable[Handle]) -> Plan:
    """What becomes of ``living`` when ``wanted`` is to be served, by what is kept of the last serve. Former controllers among
    them have been killed already: they just count."""
    handles = list(living)
    controllers = [handle.incarnation for handle in handles if handle.kind == CONTROLLER]
    living = [handle for handle in handles if handle.kind != CONTROLLER]
    served, state = _served(served_text), _state(state_text)
    newest = max([served.controller_incarnation if served else 0, *controllers])
    address = served.controller_address if served is not None else ""
    refusal = _reason_against(served, wanted, state)
    if refusal is None and state is not None:
        given_away = {(life.name, life.life) for life in state.abandoned}
        kept, former = sort_out({name: slot.life for name, slot in state.slots.items()}, living, given_away)
        found = ", ".join(f"{handle.name}#{handle.incarnation}" for handle in kept.values())
        return Plan(
            goes_on=True,
            reason=f"the same deployment was served here: its state goes on, with {found or 'no process that still lives'}",
            kept=kept,
            to_kill=tuple(former),
            state=state,
            controller_incarnation=newest + 1,
            controller_address=address,
        )
    there = bool(served_text or state_text or living or controllers)
    return Plan(
        goes_on=False,
        reason=f"begins anew, {refusal}" if there else "",
        kept={},
        to_kill=tuple((handle, "an earlier life") for handle in living),
        state=_used(state or ControllerState(), living),
        controller_incarnation=newest + 1,
        controller_address=address,
    )


def with_routers_anew(state: ControllerState, drain_s: float) -> ControllerState:
    """The state in which every router drains, for at most ``drain_s``, and starts again: those that run look for the
    controller elsewhere."""
    slots = {
        name: replace(slot, ending="again", grace_s=drain_s) if slot.kind == "router" and not slot.ending else slot
        for name, slot in state.slots.items()
    }
    return replace(state, slots=slots)


def _reason_against(served: Served | None, wanted: Deployment, state: ControllerState | None) -> str | None:
    """Why the last serve is not gone on with; None where it is."""
    if served is None:
        return "nothing says what was served here before"
    if state is None or not state.slots:
        return "no state is kept of what was served here before"
    first, now = _deployment(served.deployment), _deployment(state.deployments.get(state.generation, ""))
    if wanted in (first, now):
        return None
    # an update brought what is served now, and kept the served name, which a deploy file need not say
    if first and now and now != first and wanted == replace(now, served_model_name=wanted.served_model_name):
        return None
    return "another deployment was served under this name"


def _used(state: ControllerState, living: Iterable[Handle]) -> ControllerState:
    """What is used up: epochs and incarnations, and the lives that are not seen gone yet."""
    used = dict(state.former)
    for name, slot in state.slots.items():
        turning = slot.flip.incarnation if slot.flip is not None else 0
        used[name] = max(used.get(name, 0), slot.incarnation, slot.life, turning)
    for handle in living:
        used[handle.name] = max(used.get(handle.name, 0), handle.incarnation)
    return ControllerState(epoch=state.epoch, former=used, abandoned=state.abandoned)


def _served(text: str | None) -> Served | None:
    try:
        return Served.from_json(text) if text else None
    except (ValueError, TypeError):
        return None


def _state(text: str | None) -> ControllerState | None:
    try:
        return ControllerState.from_json(text) if text else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _deployment(text: str) -> Deployment | None:
    try:
        return Deployment.from_json(text) if text else None
    except (ValueError, KeyError, TypeError):
        return None
