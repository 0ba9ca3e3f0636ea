"""The controller's view as messages: the membership for routers, the status for people."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from biphase.cluster.events import Event
from biphase.cluster.open_ports import open_inner_ports, open_ports
from biphase.cluster.reach import CUT_OFF
from biphase.cluster.slot import Slot
from biphase.cluster.version import version
from biphase.protos import common_pb2, controller_pb2

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

NUM_DECISIONS = 5
DECISIONS = frozenset({"decision", "scale", "flip", "drain", "update", "policy", "node"})
"""Kinds of events that changed what is wanted, or would have."""


def membership_of(controller: "Controller") -> controller_pb2.Membership:
    core = controller.core
    members = [
        controller_pb2.Member(
            name=member.name,
            role=_role(member.kind),
            incarnation=member.incarnation,
            address=member.address,
            draining=member.draining,
            generation=member.generation,
            node=member.node,
        )
        for member in core.members
    ]
    return controller_pb2.Membership(epoch=controller.epoch, version=core.version, members=members)


def event_message(event: Event) -> controller_pb2.Event:
    return controller_pb2.Event(
        number=event.number, unix_s=event.unix_s, kind=event.kind, subject=event.subject, text=event.text
    )


def status_of(controller: "Controller") -> controller_pb2.ClusterStatus:
    deployment = controller.deployment
    own = controller.announcer.current
    processes = [_process_status(controller, slot) for slot in controller.core.slots.values()]
    processes.append(
        controller_pb2.ProcessStatus(
            name=own.name,
            kind=own.kind,
            incarnation=own.incarnation,
            state=own.state,
            progress=1.0,
            pid=own.pid,
            address=own.address,
            restarts=controller.epoch - 1,
            log_file=own.log_file,
            node=own.node,
        )
    )
    problems = [f"{process.name}: {process.detail}" for process in processes if process.state in ("lost", "waiting")]
    return controller_pb2.ClusterStatus(
        deployment=deployment.name,
        state=controller.state,
        detail="; ".join(problems),
        backend=deployment.backend,
        model=deployment.served_model_name or deployment.model,
        mode=deployment.mode,
        uptime_s=controller.now_s() - controller.started_s,
        processes=processes,
        router_addresses=controller.router_addresses(),
        version=version(),
        epoch=controller.epoch,
        ratio=ratio_line(controller.core.slots.values()),
        pinned=pinned_line(controller),
        policy=controller.policy_line,
        decisions=[event_message(event) for event in controller.events.last(NUM_DECISIONS, DECISIONS)],
        warnings=warnings_of(controller),
        cordoned_nodes=[f"{node}: {why}" for node, why in controller.core.node_failures.cordoned.items()],
    )


def ratio_line(slots: Iterable[Slot]) -> str:
    """ "2P:1D", with what does not take work now."""
    slots = list(slots)
    missing = [f"{slot.name} ({_why_away(slot)})" for slot in slots if _is_wanted(slot) and not slot.serves]
    return ratio_of(slots) + (f", without {', '.join(missing)}" if missing else "")


def ratio_of(slots: Iterable[Slot]) -> str:
    """ "2P:1D": the instances wanted in either role."""
    roles = [slot.role for slot in slots if _is_wanted(slot)]
    return f"{roles.count('prefill')}P:{roles.count('decode')}D"


def _is_wanted(slot: Slot) -> bool:
    return slot.is_instance and slot.ending != "remove"


def _why_away(slot: Slot) -> str:
    if slot.flip is not None:
        return f"turning to {slot.flip.kind}"
    if slot.held or slot.ending:
        return "draining"
    if slot.slow:
        return "slow"
    return slot.phase if slot.phase != "ready" else "its link is not up"


def avoided_line(nodes: Iterable[str], cordoned: Mapping[str, str]) -> str:
    """Where an instance that waits for room may not go, and why."""
    return ", ".join(f"{node} ({'cordoned' if node in cordoned else 'could not be reached'})" for node in sorted(nodes))


def pinned_line(controller: "Controller") -> str:
    pin = controller.pin
    if pin is None:
        return ""
    if pin.until_s is None:
        return f"{pin.text}, until `biphase scale auto`"
    return f"{pin.text}, for another {max(0.0, pin.until_s - controller.now_s()):.0f} s"


def warnings_of(controller: "Controller") -> list[str]:
    warnings = list(controller.warnings)
    if controller.core.reach.is_cut_off:
        warnings.append(CUT_OFF)
    reached = _reached(controller)
    if reached:
        warnings.append(f"not on loopback and without protection: {', '.join(reached)}")
    if controller.deployment.inject_faults:
        warnings.append(f"faults are injected into the KV transfer: {controller.deployment.inject_faults}")
    for pair in controller.reports.broken_pairs():
        warnings.append(f"{pair.decode} cannot pull from {pair.prefill}: {pair.detail}")
    return warnings


def _reached(controller: "Controller") -> list[str]:
    """Ports that others of the network reach."""
    deployment, slots = controller.deployment, controller.core.slots
    said = [(slot.name, slot.announcement.address) for slot in slots.values() if slot.announcement is not None]
    said.append(("controller", controller.announcer.current.address))
    inner: list[tuple[str, str, str]] = []
    for name, life in controller.lives.items():
        slot = slots.get(name)
        if slot is not None and slot.announcement is not None:
            kv_address = life.welcome.kv_address if life.welcome is not None else ""
            inner.append((name, kv_address, slot.announcement.rank_address))
    found = open_ports(said, deployment.router_places)
    return found + open_inner_ports(inner, only_grpc=deployment.kv_transport == "grpc")


def _role(kind: str) -> common_pb2.Role.ValueType:
    return common_pb2.ROLE_PREFILL if kind == "prefill" else common_pb2.ROLE_DECODE


def _process_status(controller: "Controller", slot: Slot) -> controller_pb2.ProcessStatus:
    status = controller_pb2.ProcessStatus(
        name=slot.name,
        kind=slot.kind,
        incarnation=slot.incarnation,
        state=slot.phase,
        detail=slot.reason if slot.phase in ("waiting", "lost") else "",
        restarts=slot.restarts,
        node=slot.node,
        health=_health(controller, slot),
        generation=slot.generation if slot.is_instance else "",
    )
    life = controller.lives.get(slot.name)
    if slot.is_instance:
        status.role = _role(slot.kind)
        plan_of = controller.deployments.get(slot.generation, controller.deployment)
        status.plan = str(plan_of.plan("prefill" if slot.kind == "prefill" else "decode").parallel)
    if slot.is_leaving and slot.phase == "ready":
        status.state = "draining"
    if life is not None and life.handle.end is None:
        status.pid = life.handle.pid
        if len(life.handle.pids) > 1 and all(life.handle.pids):  # 0: an actor that has not spoken yet
            status.rank_pids.extend(life.handle.pids)
        if life.welcome is not None:
            status.num_blocks = life.welcome.num_blocks
    if slot.announcement is not None:
        said = slot.announcement
        status.pid, status.address, status.threads = said.pid, said.address, said.threads
        status.kv_bytes, status.log_file, status.progress = said.kv_bytes, said.log_file, said.progress
        status.device = said.device
        status.detail = status.detail or said.detail
    if slot.avoids and (slot.no_room or not slot.is_placed):
        status.detail += f"; not on {avoided_line(slot.avoids, controller.core.node_failures.cordoned)}"
    if slot.work is not None:
        status.queued_tokens, status.running = slot.work.queued_tokens, slot.work.running
        status.free_blocks, status.legs = slot.work.free_blocks, slot.work.legs
    status.drained, status.grace_left_s = slot.is_drained, slot.grace_left_s(controller.now_s())
    return status


def _health(controller: "Controller", slot: Slot) -> str:
    """Why it gets no or less work than another."""
    if slot.flip is not None:
        return f"turning to {slot.flip.kind}"
    if slot.ending:
        return "stopping" if slot.ending == "remove" else "to start anew"
    if slot.held:
        return "drained by hand"
    if slot.silent:
        return "silent"
    if slot.slow or slot.health:
        return slot.health or "slow"
    if slot.no_room:
        return "no room"
    if slot.phase == "waiting" and slot.failures > 1:
        return f"crash loop, {slot.failures} failed starts"
    if slot.node and slot.node in controller.core.node_failures.cordoned:
        return "cordoned"
    return ""
