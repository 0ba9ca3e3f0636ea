"""What people and the policy may change of a running deployment: checked whole, then done, kept and written down.

Every method answers in words for people, or raises InvalidRequest with the reason before anything has changed.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from biphase.cluster import wanted_set
from biphase.cluster.backend import Kind
from biphase.cluster.controller_state import Pin
from biphase.cluster.deployment import Deployment
from biphase.cluster.rescue import rescue
from biphase.cluster.signal_reports import setup_of
from biphase.cluster.slot import Slot
from biphase.cluster.wanted import spec_of
from biphase.cluster.wanted_set import ROLES, ScalePlan
from biphase.planner.autoscaler import reason_against
from biphase.planner.policy import other
from biphase.planner.ratio import Ratio
from biphase.protos.errors import InvalidRequest, SetupError, one_line
from biphase.protos.values import Mode, Role

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

RESCUE_GRACE_S = 1.0
"""Nobody can take over what waits, so little is waited for."""
MAX_GRACE_S = 86_400.0
MAX_FOR_S = 365 * 86_400.0


class Admin:
    """Changes the wanted set of one controller. No state of its own."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller

    @property
    def can_flip(self) -> bool:
        """Whether an instance can turn in place: both roles are cut alike. Else a change of role starts it anew."""
        return self._controller.deployment.turns_in_place

    # -- counts and roles -------------------------------------------------------------------------------------------

    async def scale(self, wanted: Mapping[Role, int], *, for_s: float) -> str:
        """Pin these counts."""
        self._check_open()
        until_s = self._until_s(for_s)
        if not wanted:
            raise InvalidRequest("give counts as in prefill=2 decode=1, or auto")
        plan = self._plan(wanted)
        self._check_budget(wanted)
        await self._check_fits(plan, self._controller.deployment)
        counts = ", ".join(f"{role} {count}" for role, count in wanted.items())
        self._apply(plan)
        pin = self._pin(f"scaled by hand to {counts}", until_s)
        await self._done("scale", "", f"{pin.text}{_for(for_s)}: {plan}")
        return f"{plan}; pinned{_for(for_s) or ' until `biphase scale auto`'}"

    async def unpin(self, why: str) -> str:
        """Back to the policy, or to the deployment's own counts where there is none; where these are refused the pin stays."""
        controller, pin = self._controller, self._controller.pin
        self._check_open()
        text = "the policy decides"
        if controller.has_policy:
            controller.pin = None
        else:
            deployment = controller.deployment
            plan = await self.check_counts({role: deployment.plan(role).replicas for role in ROLES}, deployment)
            if controller.updating.is_under_way:
                raise InvalidRequest("an update is under way, the counts stay as they are until it has ended")
            if controller.pin is not pin:
                raise InvalidRequest("the counts were pinned anew meanwhile")
            controller.pin = None
            self._apply(plan)
            text = f"there is no policy, the deployment's own counts are wanted: {plan}"
        await self._done("scale", "", f"{why}: {text}")
        return text

    async def check_counts(
        self, wanted: Mapping[Role, int], deployment: Deployment, renewed: Mapping[str, Role] | None = None
    ) -> ScalePlan:
        """What ``take_counts`` would do for instances of ``deployment``; nothing changes. ``renewed``: the instances that
        start anew before, in their order."""
        plan = self._plan(wanted, can_flip=deployment.turns_in_place) if wanted else ScalePlan()
        await self._check_fits(plan, deployment, renewed)
        return plan

    async def take_counts(self, wanted: Mapping[Role, int]) -> ScalePlan:
        """Have these counts, without a pin."""
        plan = self._plan(wanted)
        await self._check_fits(plan, self._controller.deployment)
        self._apply(plan)
        return plan

    async def flip(self, name: str, *, grace_s: float, for_s: float) -> str:
        """Turn an instance to the other role, and pin that."""
        self._check_open()
        until_s = self._until_s(for_s)
        slot = self._check_flip(name)
        role: Role = "decode" if slot.kind == "prefill" else "prefill"
        counts = self._controller.core.counts()
        self._check_budget({role: counts[role] + 1, other(role): counts[other(role)] - 1}, turns=True)
        self._turn(slot, role, grace_s)
        self._pin(f"{name} turned to {role} by hand", until_s)
        how = "in place" if self.can_flip else "by starting anew, the roles are cut differently"
        text = f"{name} turns from {slot.kind} to {role} {how}, what runs there has {self._grace_s(grace_s):g} s to end"
        await self._done("flip", name, f"by hand: {text}")
        return f"{text}; pinned{_for(for_s) or ' until `biphase scale auto`'}"

    def _pin(self, text: str, until_s: float | None) -> Pin:
        counts = self._controller.core.counts()
        pin = Pin(text=text, prefill=counts["prefill"], decode=counts["decode"], until_s=until_s)
        self._controller.pin = pin
        return pin

    def _check_flip(self, name: str) -> Slot:
        controller = self._controller
        slot = wanted_set.instance(controller.core, name)
        wanted_set.check_is_free(slot)
        if not slot.is_up:
            raise InvalidRequest(f"{name} is {slot.phase}: only an instance that serves can turn")
        if slot.kind == "decode" or self._mode == "strict" or not self.can_flip:
            then: dict[str, Kind] = {name: "decode" if slot.kind == "prefill" else "prefill"}
            wanted_set.check_others_serve(controller.core, self._mode, [name], f"a flip of {name}", then=then)
        # a prefill instance that turns takes nothing away in mode auto: it will prefill and decode
        return slot

    def _turn(self, slot: Slot, role: Role, grace_s: float) -> None:
        controller = self._controller
        grace_s = self._grace_s(grace_s)
        if self.can_flip:
            wanted_set.flip(controller.core, slot.name, role, grace_s, controller.now_s())
        else:
            wanted_set.renew(controller.core, slot.name, grace_s, controller.now_s(), generation=None, role=role)

    # -- drains and cordons -----------------------------------------------------------------------------------------

    async def drain(self, name: str, *, grace_s: float) -> str:
        controller = self._controller
        self._check_open()
        slot = wanted_set.instance(controller.core, name)
        wanted_set.check_is_free(slot)
        wanted_set.check_others_serve(controller.core, self._mode, [name], f"a drain of {name}")
        grace_s = self._grace_s(grace_s)
        wanted_set.hold(controller.core, name, grace_s, controller.now_s())
        text = f"{name} takes no new work, what runs there has {grace_s:g} s to end"
        await self._done("drain", name, f"by hand: {text}")
        return f"{text}; `biphase drain {name} --undo` takes it back"

    async def undo_drain(self, name: str) -> str:
        controller = self._controller
        self._check_open()
        slot = wanted_set.instance(controller.core, name)
        if not slot.held:
            raise InvalidRequest(f"{name} is not drained by hand")
        wanted_set.resume(controller.core, name, controller.now_s())
        await self._done("drain", name, f"by hand: {name} takes work again")
        return f"{name} takes work again"

    async def drain_node(self, node: str, *, grace_s: float) -> str:
        """Bring all instances of a host elsewhere: they drain and stop, others start at once on the hosts that are left."""
        controller = self._controller
        self._check_open()
        self._check_node(node)
        leaving = [slot for slot in wanted_set.instances(controller.core) if slot.node == node]
        names = [slot.name for slot in leaving]
        new = [(slot.role, slot.generation) for slot in leaving]
        wanted_set.check_others_serve(controller.core, self._mode, names, f"a drain of {node}", new=new)
        grace_s = self._grace_s(grace_s)
        now_s = controller.now_s()
        controller.core.node_failures.cordon(node, "drained by hand")
        for slot in leaving:
            role, generation = slot.role, slot.generation
            wanted_set.stop(controller.core, slot.name, grace_s, now_s)
            wanted_set.add(controller.core, "prefill" if role == "prefill" else "decode", generation, now_s)
        who = (
            f"{', '.join(names)} drain within {grace_s:g} s and stop, others start elsewhere"
            if names
            else "nothing runs there"
        )
        await self._done("drain", node, f"by hand: {node} is cordoned, {who}")
        return f"{node} is cordoned, {who}"

    async def cordon(self, node: str) -> str:
        controller = self._controller
        self._check_open()
        self._check_node(node)
        if node in controller.core.node_failures.cordoned:
            raise InvalidRequest(f"{node} is cordoned already: {controller.core.node_failures.cordoned[node]}")
        controller.core.node_failures.cordon(node, "by hand")
        text = f"{node} gets no new instance; those that run there stay"
        await self._done("node", node, f"cordoned by hand: {text}")
        return text

    async def uncordon(self, node: str) -> str:
        """Also ends a drain of it: what has not stopped yet takes work again, and stays where it is wanted."""
        controller = self._controller
        self._check_open()
        if node not in controller.core.node_failures.cordoned:
            self._check_node(node)
            raise InvalidRequest(f"{node} is not cordoned")
        controller.core.node_failures.uncordon(node)
        counts = controller.core.counts()
        back = [
            slot.name
            for slot in controller.core.slots.values()
            if slot.node == node
            and slot.ending == "remove"
            and slot.stop_asked_s is None
            # what an update has left behind goes all the same
            and (slot.generation == controller.generation or controller.update_state)
        ]
        for name in back:
            wanted_set.resume(controller.core, name, controller.now_s())
        if back:  # those that were to take their place, and are not up yet, go first
            self._apply(self._plan({"prefill": counts["prefill"], "decode": counts["decode"]}))
        text = f"{node} gets instances again" + (f", {', '.join(back)} stay" if back else "")
        await self._done("node", node, f"by hand: {text}")
        return text

    # -- what the policy asks for -----------------------------------------------------------------------------------

    async def start_instance(self, role: Role) -> str:
        """One more; returns its name. InvalidRequest where it does not fit."""
        plan = ScalePlan(adds=(role,))
        await self._check_fits(plan, self._controller.deployment)
        return self._apply(plan)[0]

    def rescue(self) -> None:
        """Turn an instance for a role that has lost all of its own and finds no room for them."""
        controller = self._controller
        found = rescue(controller.core, self._mode, controller.now_s()) if self.can_flip else None
        if found is not None:
            slot, lost = controller.core.slots[found.turns], controller.core.slots[found.waits]
            was: Role = "prefill" if slot.kind == "prefill" else "decode"
            self._turn(slot, found.role, RESCUE_GRACE_S)
            lost.next_kind = was
            text = f"{slot.name} turns to {found.role}: none is left, and {lost.name} finds no room; it comes back as {was}"
            controller.events.add("flip", slot.name, text)
            controller.changed()

    def stop_instance(self, name: str) -> None:
        slot = wanted_set.instance(self._controller.core, name)
        wanted_set.check_is_free(slot)
        if slot.serves:
            wanted_set.check_others_serve(self._controller.core, self._mode, [name], f"a stop of {name}")
        wanted_set.stop(self._controller.core, name, self._grace_s(0.0), self._controller.now_s())

    def flip_instance(self, name: str) -> None:
        slot = self._check_flip(name)
        self._turn(slot, "decode" if slot.kind == "prefill" else "prefill", 0.0)

    # -- checks and doing -------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> Mode:
        return self._controller.deployment.mode

    def _check_open(self) -> None:
        if self._controller.stopping:
            raise InvalidRequest("the deployment is stopping")

    def _until_s(self, for_s: float) -> float | None:
        if not 0 <= for_s <= MAX_FOR_S:
            raise InvalidRequest(f"for is {for_s:g} s: 0 (until auto) to {MAX_FOR_S:g}")
        return self._controller.now_s() + for_s if for_s else None

    def _grace_s(self, grace_s: float) -> float:
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest(f"grace is {grace_s:g} s: 0 (the deployment's) to {MAX_GRACE_S:g}")
        return grace_s or self._controller.deployment.flip_grace_s

    def _check_node(self, node: str) -> None:
        failures = self._controller.core.node_failures
        known = sorted(failures.known | {slot.node for slot in self._controller.core.slots.values() if slot.node})
        if node not in known:
            near = difflib.get_close_matches(node, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"nodes: {', '.join(known) or 'none yet'}"
            raise InvalidRequest(f"no node is called {node or '(empty)'}: {hint}")

    def _plan(self, wanted: Mapping[Role, int], *, can_flip: bool | None = None) -> ScalePlan:
        core = self._controller.core
        can_flip = self.can_flip if can_flip is None else can_flip
        plan = wanted_set.plan_scale(core, wanted, mode=self._mode, can_flip=can_flip)
        leaving = [*(name for name, _ in plan.flips), *plan.stops]
        to_decode = any(role == "decode" for _, role in plan.flips)
        if leaving and not (self._mode == "auto" and to_decode and not plan.stops):
            new = [(role, self._controller.generation) for role in plan.adds]
            doing = f"a change in which {plan}"
            wanted_set.check_others_serve(core, self._mode, leaving, doing, then=dict(plan.flips), new=new)
        return plan

    def _check_budget(self, wanted: Mapping[Role, int], *, turns: bool = False) -> None:
        """Raises InvalidRequest for counts that the policy's bounds of now do not allow. ``turns``: by a flip alone, which
        mostly keeps the GPUs of all."""
        controller = self._controller
        policy = controller.autoscaling.policy
        if policy is None or policy.dry_run:
            return
        counts = controller.core.counts()
        now = Ratio(prefill=counts["prefill"], decode=counts["decode"])
        ratio = Ratio(**{role: wanted.get(role, now.of(role)) for role in ROLES})
        setup = setup_of(controller.deployment)
        total = not turns or abs(ratio.gpus(setup) - now.gpus(setup)) > 1e-9
        reason = reason_against(ratio, policy, setup, controller.now_s(), roles=tuple(wanted), total=total)
        if reason is not None:
            raise InvalidRequest(reason)

    async def _check_fits(
        self, plan: ScalePlan, deployment: Deployment, renewed: Mapping[str, Role] | None = None
    ) -> None:
        """Raises InvalidRequest when what would start has no room, where those that go give theirs back. ``renewed``: see
        ``check_counts``."""
        controller, core = self._controller, self._controller.core
        starts: dict[str, Role] = dict(renewed or {})
        emptied: dict[str, Sequence[str]] = {name: (name,) for name in starts}
        kinds = {slot.name: slot.role for slot in wanted_set.instances(core)} | dict(plan.flips)
        for role in plan.adds:
            name = wanted_set.free_name(role, core.slots.keys() | starts.keys())
            starts[name] = kinds[name] = role
            if plan.stops:
                emptied[name] = plan.stops
        if not starts:
            return
        counts = [kind for name, kind in kinds.items() if name not in plan.stops]
        deployment = replace(
            deployment,
            prefill=replace(deployment.prefill, replicas=counts.count("prefill")),
            decode=replace(deployment.decode, replicas=counts.count("decode")),
        )
        avoid = sorted(core.avoided)
        specs = [
            spec_of(controller.spec, name, 1, kind=role, deployment=deployment, avoid=avoid)
            for name, role in starts.items()
        ]
        try:
            await controller.backend.check(specs, emptied or None)
        except SetupError as error:
            raise InvalidRequest(one_line(error)) from error

    def _apply(self, plan: ScalePlan) -> list[str]:
        """Do it; returns the names of those that are new."""
        controller = self._controller
        now_s = controller.now_s()
        for name, role in plan.flips:
            self._turn(controller.core.slots[name], role, 0.0)
        for name in plan.stops:
            wanted_set.stop(controller.core, name, self._grace_s(0.0), now_s)
        return [wanted_set.add(controller.core, role, controller.generation, now_s) for role in plan.adds]

    async def _done(self, kind: str, subject: str, text: str) -> None:
        """Write it down, and keep it before anybody is told that it is so."""
        controller = self._controller
        controller.events.add(kind, subject, text)
        await controller.save()
        controller.changed()


def _for(for_s: float) -> str:
    return f" for {for_s:g} s" if for_s else ""
