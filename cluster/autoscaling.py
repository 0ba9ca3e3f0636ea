"""The autoscaler's shell: collects signals, asks ``planner.autoscaler`` once per interval, does what it says, writes down why.

It decides nothing itself. Its state is kept with the controller's, so that the next life respects every cooldown; a pin is
handed in as the ratio that somebody asked for.
"""

import asyncio
import json
import logging
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.planner_view import members_of, role_of
from biphase.cluster.policy_source import changed_since, name_of, parse_policy, read_policy
from biphase.cluster.signal_history import SignalHistory
from biphase.cluster.signal_reports import instance_report, router_report, setup_of
from biphase.cluster.wanted import spec_of
from biphase.planner.autoscaler import decide
from biphase.planner.autoscaler_state import (
    Action,
    AskNode,
    AutoscalerState,
    FlipInstance,
    Hold,
    StartInstance,
    StopInstance,
    WithdrawNode,
)
from biphase.planner.capacity import Setup
from biphase.planner.history import Moment
from biphase.planner.policy import Policy
from biphase.planner.ratio import Ratio
from biphase.planner.reports import Member, Report, Room
from biphase.planner.signals import SignalWindow
from biphase.protos import controller_pb2, worker_pb2
from biphase.protos.errors import BiphaseError, SetupError, one_line
from biphase.protos.values import Role

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

MOST_UNWRITTEN = 10_000
"""Reports between two moments of the history; older ones are dropped, where none can be written."""
LOOK_S = 1.0
"""How often the policy file is looked at."""
ROLES: tuple[Role, Role] = ("prefill", "decode")
logger = logging.getLogger("biphase.cluster.autoscaling")


class Autoscaling:
    """Owns the signals of one controller's life, and the policy that is obeyed now."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self.window = SignalWindow()
        self.policy: Policy | None = None
        self._state = AutoscalerState()
        self._seen: tuple[str, tuple[int, int] | None] | None = None
        """The policy's source as it was last looked at."""
        self._history: SignalHistory | None = None
        self._kv_tokens: tuple[str, dict[Role, int]] = "", {}
        """Of a generation: what an instance of a role has held."""
        self._unwritten: deque[Report] = deque(maxlen=MOST_UNWRITTEN)
        controller.reports.listeners.append(self._heard_router)

    # -- signals ----------------------------------------------------------------------------------------------------

    def _heard_router(self, now_s: float, message: controller_pb2.RouterReport) -> None:
        if message.uptime_s > 0:  # the first word of a stream says only who asks
            report = router_report(message)
            self._take(report, now_s)

    def heard_instance(self, name: str, welcome: worker_pb2.Welcome | None, message: worker_pb2.WorkerSignals) -> None:
        slot = self._controller.core.slots.get(name)
        if slot is not None and slot.is_instance:
            report = instance_report(
                name,
                role_of(slot),
                slot.incarnation,
                message,
                num_blocks=welcome.num_blocks if welcome is not None else 0,
                block_size=welcome.block_size if welcome is not None else 0,
            )
            self._take(report, self._controller.now_s())

    def _hear_silent(self, now_s: float) -> None:
        """An instance that has nothing to do says nothing: while its link stands its last word holds."""
        for name, life in self._controller.lives.items():
            if life.signals is not None and life.is_silent_as_idle and life.signals[1] < now_s - LOOK_S:
                message = worker_pb2.WorkerSignals()
                message.CopyFrom(life.signals[2])
                message.uptime_s += now_s - life.signals[1]
                self.heard_instance(name, life.welcome, message)

    def _take(self, report: Report, now_s: float) -> None:
        if self.window.add(report, now_s) and self.policy is not None and not self._is_held:
            self._unwritten.append(report)  # else there is no moment that it belongs to, for as long as that lasts

    # -- policy -----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """What the last life left: its state and the policy that it obeyed."""
        controller = self._controller
        try:
            if controller.autoscaler_state:
                self._state = AutoscalerState.from_json(json.dumps(controller.autoscaler_state))
            if controller.policy_text and controller.deployment.autoscale:
                self.policy = parse_policy(controller.deployment, controller.policy_text)
        except (SetupError, ValueError, KeyError, TypeError) as error:
            logger.warning("the last life's autoscaling cannot be read: %s", one_line(error))
        if not controller.deployment.autoscale:
            controller.policy_text = ""

    def look(self) -> None:
        """Take the policy anew where its source has changed; a bad one is refused and the old one stays."""
        controller = self._controller
        deployment = controller.deployment
        if not deployment.autoscale:
            if self.policy is not None:
                controller.events.add("policy", "", "the deployment names no policy any more")
            self.policy, controller.policy_text, self._seen = None, "", None
            return
        seen = deployment.autoscale, changed_since(deployment)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            text = read_policy(deployment)
            policy = parse_policy(deployment, text)
        except Exception as error:  # whatever a user's file brings about, the controller must live on
            if not isinstance(error, SetupError):
                logger.exception("the policy")
            stays = "the old policy stays" if self.policy is not None else "nothing scales"
            controller.events.add("policy", "", f"policy refused, {stays}: {one_line(error)}")
            controller.policy_line = f"{name_of(deployment)}, refused as it is now: {one_line(error)}"
            return
        if policy != self.policy:
            dry = ", a dry run" if policy.dry_run else ""
            controller.events.add("policy", "", f"policy of {name_of(deployment)} is obeyed{dry}")
        self.policy, controller.policy_text = policy, text
        controller.policy_line = name_of(deployment) + (" (dry run)" if policy.dry_run else "")

    # -- deciding ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Once per interval, until cancelled."""
        controller = self._controller
        next_s = 0.0
        obeyed: tuple[Policy | None] | None = None
        while True:
            self.look()
            if obeyed != (self.policy,):
                try:
                    await self.keep_requests()
                    obeyed = (self.policy,)
                except Exception:  # whatever the backend has: tried again
                    logger.exception("requests for nodes cannot be looked at")
            await controller.keep_events()
            now_s = controller.now_s()
            if self.policy is not None and now_s >= next_s and not self._is_held:
                try:
                    await self.tick()
                except Exception:  # the next tick may do better; the controller must live on
                    logger.exception("a tick failed")
                next_s = now_s + self.policy.interval_s
            wait_s = LOOK_S if self.policy is None else min(LOOK_S, max(0.01, next_s - controller.now_s()))
            await asyncio.sleep(wait_s)

    @property
    def _is_held(self) -> bool:
        """Nothing is decided now."""
        controller = self._controller
        return controller.stopping or not controller.core.was_ready or controller.updating.is_under_way

    async def tick(self) -> None:
        controller, policy = self._controller, self.policy
        assert policy is not None
        now_s = controller.now_s()
        self._hear_silent(now_s)
        members = members_of(controller.core.slots.values(), now_s)
        setup, room = self._setup(), await self._room()
        self._write_down(now_s, setup, members, room)
        signals = self.window.over(
            policy.window_s, now_s, interval_s=policy.interval_s, members=members, room=room, setup=setup
        )
        decision = decide(policy, signals, self._state, now_s, pinned=self._pinned())
        self._state = decision.state
        if decision.is_news and decision.reasons:
            words = "; ".join(decision.reasons)
            controller.events.add("decision", "", f"dry run: {words}" if decision.dry_run else words)
            dry = " (dry run)" if policy.dry_run else ""
            wants = "" if decision.target == self._pinned() else f": {decision.target}"
            controller.policy_line = f"{name_of(controller.deployment)}{dry}{wants}"
        if not decision.dry_run:
            for action in decision.actions:
                await self._do(action)
        controller.autoscaler_state = json.loads(decision.state.to_json())
        await controller.save()
        controller.changed()

    def _write_down(self, now_s: float, setup: Setup, members: tuple[Member, ...], room: Room) -> None:
        """What a replay needs."""
        controller = self._controller
        if self._history is None:
            path = Path(controller.spec.run_dir) / "signals.jsonl"
            self._history = SignalHistory(path, anew=controller.epoch <= 1)
        moment = Moment(unix_s=now_s, members=members, room=room, reports=tuple(self._unwritten))
        self._history.add(moment, setup)
        self._unwritten.clear()

    def _pinned(self) -> Ratio | None:
        pin = self._controller.pin
        return Ratio(prefill=pin.prefill, decode=pin.decode) if pin is not None else None

    async def _do(self, action: Action) -> None:
        """A refusal is written down; the next tick sees what really is."""
        controller = self._controller
        try:
            match action:
                case StartInstance(role=role, on_new_node=on_new_node):
                    if on_new_node:  # its room is for this one
                        await controller.backend.withdraw_node(role)
                    await controller.admin.start_instance(role)
                case StopInstance(name=name):
                    controller.admin.stop_instance(name)
                case FlipInstance(name=name):
                    controller.admin.flip_instance(name)
                case AskNode(role=role):
                    reason = await controller.backend.ask_node(self._spec(role))
                    if reason:
                        controller.events.add("refused", "", f"no node for {role} can be had: {reason}")
                case WithdrawNode(role=role):
                    await controller.backend.withdraw_node(role)
                case Hold():
                    pass
        except BiphaseError as error:
            controller.events.add("refused", "", f"the policy's wish: {one_line(error)}")

    def _spec(self, role: Role) -> ProcessSpec:
        controller = self._controller
        avoid = sorted(controller.core.avoided)
        return spec_of(controller.spec, f"{role}-wish", 0, kind=role, deployment=controller.deployment, avoid=avoid)

    async def _room(self) -> Room:
        backend = self._controller.backend
        asked = [role for role in ROLES if self._state.of(role).asked_s is not None]
        came = tuple([role for role in asked if await backend.node_came(self._spec(role))])
        idle = {role: await backend.idle(self._spec(role)) + (role in came) for role in ROLES}
        return Room(prefill=idle["prefill"], decode=idle["decode"], can_grow=backend.can_grow, came=came)

    async def keep_requests(self) -> None:
        """The nodes that the state says are asked for are asked for, for as long as is left, and no others: requests
        outlive the controller, and a policy that made some."""
        backend = self._controller.backend
        for role in ROLES:
            obeyed = self.policy is not None and not self.policy.dry_run
            there = await backend.node_came(self._spec(role)) is not None
            if obeyed and self._state.of(role).asked_s is not None:
                if not there:
                    await backend.ask_node(self._spec(role))
            else:
                self._state = self._state.having(role, asked_s=None)
                if there:
                    await backend.withdraw_node(role)

    def _setup(self) -> Setup:
        """KV blocks differ by instance, and nobody may serve a role for a while: the most that was seen counts."""
        controller = self._controller
        if self._kv_tokens[0] != controller.generation:
            self._kv_tokens = controller.generation, {}
        tokens = self._kv_tokens[1]
        for slot in controller.core.slots.values():
            life = controller.lives.get(slot.name)
            if (
                slot.is_instance
                and slot.generation == controller.generation
                and life is not None
                and life.welcome is not None
            ):
                role = role_of(slot)
                tokens[role] = max(tokens.get(role, 0), life.welcome.num_blocks * life.welcome.block_size)
        setup = setup_of(controller.deployment)
        return replace(
            setup,
            prefill=replace(setup.prefill, kv_tokens=tokens.get("prefill", 0)),
            decode=replace(setup.decode, kv_tokens=tokens.get("decode", 0)),
        )
