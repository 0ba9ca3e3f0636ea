"""From a target ratio to actions, within max_step, cooldowns and the budget, with a reason for each. Pure.

A flip before a start on idle GPUs before a new node. What may not happen yet is said, and tried again at the next tick.
"""

from collections.abc import Mapping
from dataclasses import replace

from biphase.planner.autoscaler_state import (
    Action,
    AskNode,
    AutoscalerState,
    Decision,
    FlipInstance,
    Recommendation,
    StartInstance,
    StopInstance,
    WithdrawNode,
)
from biphase.planner.fleet import Fleet
from biphase.planner.policy import ROLES, Direction, Policy, other
from biphase.planner.ratio import Outlook, Ratio
from biphase.planner.signals import ClusterSignals
from biphase.protos.values import Role

MAX_BACKOFFS = 6
"""A failed start doubles the wait for the next one, at most so often."""

NO_NODES = "no nodes"
"""The key of the reason that no node can be asked for."""


class Moves:
    """One decision in the making; the owner of its state, actions and reasons."""

    def __init__(
        self,
        policy: Policy,
        signals: ClusterSignals,
        fleet: Fleet,
        state: AutoscalerState,
        now_s: float,
        *,
        outlook: Outlook,
        pinned: bool,
    ) -> None:
        self.state = state
        self._policy, self._signals, self._fleet, self._now_s = policy, signals, fleet, now_s
        self._outlook, self._pinned = outlook, pinned
        self._actions: list[Action] = []
        self._reasons: list[str] = []
        self._keys: list[str] = []
        self._standing = {NO_NODES} & set(state.said)
        """Keys of what was said and holds until it is seen to have ended, also over ticks that do not look at it."""
        self._changes: dict[Role, int] = {"prefill": 0, "decode": 0}
        self._dropped: dict[Role, int] = {"prefill": 0, "decode": 0}
        self._idle: dict[Role, int] = {role: signals.room.idle(role) for role in ROLES}
        self._flipped = False
        self._urgent = pinned or fleet.missing(policy) is not None

    # What is said.

    def say(self, key: str, text: str) -> None:
        """A reason; the same ``key`` at the next tick is no news."""
        self._keys.append(key)
        self._reasons.append(text)

    def _say_once(self, key: str, text: str) -> None:
        """A reason that lasts: other news at a later tick does not repeat it."""
        if key not in self.state.said:
            self._reasons.append(text)
        self._standing.add(key)

    def decision(self, before: AutoscalerState, target: Ratio, extra: tuple[Action, ...] = ()) -> Decision:
        dry = self._policy.dry_run
        actions = (*self._actions, *extra)
        state = self.state
        for role in ROLES:
            change = 0 if dry else self._changes[role]
            state = state.having(role, expected=self._fleet.wanted(role) + change - self._dropped[role])
            if change:
                state = state.having(role, changed_s=self._now_s)
        if self._flipped and not dry:
            state = replace(state, flipped_s=self._now_s)
        keys = tuple(sorted({*self._keys, *self._standing, *(repr(action) for action in self._actions)}))
        return Decision(
            actions=actions,
            reasons=tuple(self._reasons),
            state=replace(state, said=keys),
            current=self._fleet.ratio,
            target=target,
            is_news=keys != before.said or (bool(self._actions) and not dry),
            dry_run=dry,
        )

    # Starts that failed.

    def give_up_late_starts(self) -> None:
        """Stop what has not come to serve in time; the role's next start backs off. In a dry run both are only said."""
        timeout_s = self._policy.start_timeout_s
        failures: dict[Role, int] = {role: self.state.of(role).failed_starts for role in ROLES}
        for member in self._fleet.newly_late:
            failed = failures[member.role] = failures[member.role] + 1
            wait_s = timeout_s * 2 ** min(failed - 1, MAX_BACKOFFS)
            if not self._policy.dry_run:
                self.state = self.state.having(member.role, failed_starts=failed, start_after_s=self._now_s + wait_s)
                self.state = replace(self.state, given_up=(*self.state.given_up, member.name))
                self._dropped[member.role] += 1
            self._actions.append(StopInstance(name=member.name))
            where = f" on {member.node}" if member.node else ""
            self.say(
                f"late {member.name}",
                f"{member.name} is given up: not serving {member.age_s:.0f} s after its start{where}, "
                f"start_timeout_s is {timeout_s:g}; the next {member.role} start waits {wait_s:.0f} s",
            )

    # Stabilization.

    def recommend(self, found: Recommendation) -> None:
        """Keep it with those before it, unless there is a gap between them."""
        policy = self._policy
        kept = self.state.recommendations
        if kept and not 0 <= found.at_s - kept[-1].at_s <= 3 * policy.interval_s:
            kept = ()
        span_s = max(policy.scale_up.stabilization_s, policy.scale_down.stabilization_s) + policy.interval_s
        kept = tuple(item for item in kept if found.at_s - span_s <= item.at_s < found.at_s)
        self.state = replace(self.state, recommendations=(*kept, found))

    @property
    def _has_recommended(self) -> bool:
        """Now, not at an earlier tick alone."""
        kept = self.state.recommendations
        return bool(kept) and kept[-1].at_s >= self._now_s

    def agreeing(self, direction: Direction) -> list[Recommendation]:
        """Those of a direction's stabilization time; none while it is not covered, up to now: what was last recommended
        before a pause says nothing of what came since."""
        span_s = self._policy.rule(direction).stabilization_s
        kept = self.state.recommendations
        if not self._has_recommended or kept[0].at_s > self._now_s - span_s + 1e-6:
            return []
        begin_s = max(item.at_s for item in kept if item.at_s <= self._now_s - span_s + 1e-6)
        return [item for item in kept if item.at_s >= begin_s]

    # Actions.

    def towards(self, target: Ratio, ideal: Ratio) -> None:
        """All that may be done now to come closer to ``target``, and nodes for ``ideal``."""
        current = self._fleet.ratio
        gap = {role: target.of(role) - current.of(role) for role in ROLES}
        self._stop_lost(gap)
        for role in ROLES:
            if gap[role] > 0 > gap[other(role)]:
                self._flip(role, gap)
        for role in ROLES:
            if gap[role] < 0:
                self._stop(role, -gap[role])
        for role in sorted(ROLES, key=lambda role: -self._pressure(role)):
            if gap[role] > 0:
                self._start(role, gap[role])
        self._nodes(ideal)

    def _pressure(self, role: Role) -> float:
        return self._outlook.forecast(role, self._fleet.ratio.of(role)).utilisation

    def _stop_lost(self, gap: Mapping[Role, int]) -> None:
        """What is lost and has no place is wanted no more once the others do its work."""
        for role in ROLES:
            for member in self._fleet.lost(role)[: None if gap[role] <= 0 else 0]:
                self._actions.append(StopInstance(name=member.name))
                self._dropped[role] += 0 if self._policy.dry_run else 1
                self.say(f"lost {member.name}", f"{member.name} is lost and no longer needed: {self._words(role)}")

    def _flip(self, role: Role, gap: dict[Role, int]) -> None:
        source = other(role)
        rule, setup = self._policy.role_flip, self._signals.setup
        grows = setup.shape(role).gpus - setup.shape(source).gpus
        if not rule.enabled or grows > max(0.0, self._budget_left()) + 1e-9:
            return
        count = min(gap[role], -gap[source], self._step(role, "up"), self._step(source, "down"))
        victims = self._fleet.victims(source, ready=True)[:count]
        if not victims:
            return
        waits = [self._cooldown(role, "up"), self._cooldown(source, "down")]
        if self.state.flipped_s is not None:
            waits.append(self.state.flipped_s + rule.cooldown_s - self._now_s)
        gain = self._gain(role, len(victims))
        gap[source] += min(gap[role], -gap[source])  # a flip instead, or later: not a stop and a start
        words = f"{self._words(role)}; {self._words(source)}"
        if max(waits) > 0 and not self._urgent:
            self.say(f"flip {role} waits", f"a flip to {role} waits for {max(waits):.0f} s of cooldown: {words}")
            return
        if gain < rule.min_gain and not self._urgent and not self._outside():
            self.say(
                f"flip {role} gains little",
                f"no flip to {role}: it would raise attainment by {gain:.2f}, less than min_gain {rule.min_gain:g}",
            )
            return
        gap[role] -= len(victims)
        for victim in victims:
            self._actions.append(FlipInstance(name=victim.name, role=role))
            self._changes[role] += 1
            self._changes[source] -= 1
            self._flipped = True
        names = ", ".join(victim.name for victim in victims)
        self.say(f"flip {names}", f"flip {names} to {role}, attainment {gain:+.2f}: {words}")

    def _stop(self, role: Role, count: int) -> None:
        wait_s = self._cooldown(role, "down")
        if wait_s > 0 and not self._pinned:
            self.say(f"down {role} waits", f"{role} could shrink by {count}, in {wait_s:.0f} s: cooldown")
            return
        count = min(count, self._step(role, "down") - abs(self._changes[role]))
        for victim in self._fleet.victims(role)[: max(0, count)]:
            if self._is_taken(victim.name):
                continue
            self._actions.append(StopInstance(name=victim.name))
            self._changes[role] -= 1
            self.say(f"stop {victim.name}", f"stop {victim.name}: {self._words(role)}")

    def _start(self, role: Role, count: int) -> None:
        seen = self.state.of(role)
        wait_s = max(self._cooldown(role, "up"), 0.0)
        if wait_s > 0 and not self._urgent:
            self.say(f"up {role} waits", f"{role} needs {count} more, in {wait_s:.0f} s: cooldown")
            return
        if seen.start_after_s > self._now_s:
            self.say(
                f"up {role} backs off",
                f"{role} needs {count} more; {seen.failed_starts} starts failed, the next is tried in "
                f"{seen.start_after_s - self._now_s:.0f} s",
            )
            return
        gpus = self._signals.setup.shape(role).gpus
        started = 0
        for _ in range(min(count, self._step(role, "up") - max(0, self._changes[role]))):
            reserved = gpus if self.state.of(role).asked_s is not None else 0.0
            if self._budget_left() + reserved < gpus - 1e-9:
                self.say(f"up {role} budget", f"{role} needs {count - started} more: {self._held()}")
                break
            if self._idle[role] < 1:
                self.say(f"up {role} no room", f"{role} needs {count - started} more: no GPU is idle")
                break
            # room that was there before is taken first: then the new node is needed for another, or no more
            on_new_node = role in self._signals.room.came and self._idle[role] == 1
            self._actions.append(StartInstance(role=role, on_new_node=on_new_node))
            self._changes[role] += 1
            self._take(role, on_new_node=on_new_node)
            if on_new_node and not self._policy.dry_run:
                self.state = self.state.having(role, asked_s=None)
            started += 1
        if started:
            self.say(f"start {started} {role}", f"start {started} {role}: {self._words(role)}")

    def _nodes(self, ideal: Ratio) -> None:
        """Ask for a node for what finds no GPU, one per role at a time; withdraw what is wanted no more or never came."""
        policy, fleet, setup = self._policy, self._fleet, self._signals.setup
        more_gpus = ideal.gpus(setup) > fleet.gpus + fleet.idle_gpus + 1e-9
        # a request that is made now could take the room that a start of now was meant for
        starts = any(isinstance(item, StartInstance) for item in self._actions)
        if self._signals.room.can_grow or not more_gpus:
            self._standing.discard(NO_NODES)
        for role in ROLES:
            seen = self.state.of(role)
            lacking = ideal.of(role) - self._fleet.ratio.of(role) - self._changes[role]
            if seen.asked_s is not None:
                waited_s = self._now_s - seen.asked_s
                if not self._still_wanted(role, ideal):
                    self._withdraw(role, "it is needed no more", 0.0)
                elif self._budget_left() < -1e-9:
                    self._withdraw(role, self._held(), 0.0)
                elif waited_s >= policy.node_wait_s and self._idle[role] < 1:
                    self._withdraw(role, f"none came in {waited_s:.0f} s, node_wait_s is {policy.node_wait_s:g}", 1.0)
                continue
            if lacking <= 0 or not more_gpus or starts or self._idle[role] > 0 or seen.start_after_s > self._now_s:
                continue
            if self._budget_left() < setup.shape(role).gpus - 1e-9:
                continue
            if not self._signals.room.can_grow:
                self._say_once(NO_NODES, f"{role} lacks {lacking}: no GPU is idle, and the cluster has no autoscaler")
            elif seen.ask_after_s <= self._now_s:
                self._actions.append(AskNode(role=role))
                if not policy.dry_run:
                    self.state = self.state.having(role, asked_s=self._now_s)
                self.say(f"ask {role}", f"ask for a node: {self._words(role)}, {lacking} more would fit the budget")

    def _still_wanted(self, role: Role, ideal: Ratio) -> bool:
        if not (self._pinned or self._has_recommended):
            return True  # nothing says otherwise yet
        recent = [] if self._pinned else [item.ideal.of(role) for item in self.agreeing("down")]
        return max([ideal.of(role), *recent]) > self._fleet.ratio.of(role) + self._changes[role]

    def _withdraw(self, role: Role, why: str, waits: float) -> None:
        self._actions.append(WithdrawNode(role=role))
        if not self._policy.dry_run:
            ask_after_s = self._now_s + waits * self._policy.node_wait_s
            self.state = self.state.having(role, asked_s=None, ask_after_s=ask_after_s)
        self.say(f"withdraw {role}", f"no node is asked for {role} any more: {why}")

    # Limits.

    def _cooldown(self, role: Role, direction: Direction) -> float:
        """Seconds until a role may change this way."""
        changed_s = self.state.of(role).changed_s
        return 0.0 if changed_s is None else changed_s + self._policy.rule(direction).cooldown_s - self._now_s

    def _step(self, role: Role, direction: Direction) -> int:
        """Instances of a role per decision: one while nobody knows what they can do, nor has said so."""
        if self._pinned:
            return 1_000_000
        is_known = self.state.of(role).step is not None or self._signals.setup.shape(role).step_time.is_known
        return self._policy.rule(direction).max_step if is_known else 1

    def _budget_left(self) -> float:
        """GPUs that nothing holds, nor will by this decision or a node that was asked for."""
        setup = self._signals.setup
        asked = sum(setup.shape(role).gpus for role in ROLES if self.state.of(role).asked_s is not None)
        starts = sum(setup.shape(item.role).gpus for item in self._actions if isinstance(item, StartInstance))
        turned = sum(
            setup.shape(item.role).gpus - setup.shape(other(item.role)).gpus
            for item in self._actions
            if isinstance(item, FlipInstance)
        )
        return self._policy.gpu_budget.max - self._fleet.gpus - asked - starts - turned

    def _take(self, role: Role, *, on_new_node: bool) -> None:
        """One start fewer fits; of the other role as many fewer as its GPUs would have held, were they not kept from it."""
        setup = self._signals.setup
        self._idle[role] -= 1
        if on_new_node:
            return
        fewer = -(-setup.shape(role).gpus // max(setup.shape(other(role)).gpus, 1e-9))
        self._idle[other(role)] = max(0, self._idle[other(role)] - int(min(fewer, 1e6)))

    def _is_taken(self, name: str) -> bool:
        return any(getattr(action, "name", None) == name for action in self._actions)

    def _outside(self) -> bool:
        """Whether the present ratio breaks the bounds, which need no forecast to be kept."""
        ratio = self._fleet.ratio
        bounds = {role: self._policy.bounds(role) for role in ROLES}
        return any(not bounds[role].min_replicas <= ratio.of(role) <= bounds[role].max_replicas for role in ROLES)

    def _gain(self, role: Role, count: int) -> float:
        """Predicted rise of attainment by flipping ``count`` to ``role``; what they cannot serve meanwhile is taken off."""
        sign = 1 if role == "prefill" else -1
        current = self._fleet.ratio
        after = Ratio(prefill=current.prefill + sign * count, decode=current.decode - sign * count)
        without = Ratio(prefill=min(current.prefill, after.prefill), decode=min(current.decode, after.decode))
        now, then, between = (self._outlook.attainment(ratio) for ratio in (current, after, without))
        kept_s = max(self._policy.role_flip.cooldown_s, self._policy.scale_down.stabilization_s, 1.0)
        return then - now - max(0.0, now - between) * min(1.0, self._signals.setup.turn_s / kept_s)

    # Words.

    def _words(self, role: Role) -> str:
        load, count = self._outlook.load, self._fleet.ratio.of(role)
        forecast = self._outlook.forecast(role, count)
        if role == "prefill":
            offered = f"{load.requests_per_s:.3g} prompts/s of {load.prompt_mean:.0f} tokens"
        else:
            offered = f"{load.output_tokens_per_s:.3g} output tokens/s"
            if self._outlook.decode.kv_bound:
                offered += f", at most {self._outlook.decode.most:.0f} requests at once for want of KV blocks,"
        busy = "are too many for none" if not count else f"keep {count} {role} busy to {forecast.utilisation:.0%}"
        return f"{offered} {busy}, {forecast.attainment:.0%} in time"

    def _held(self) -> str:
        draining = sum(member.phase == "draining" for member in self._fleet.members)
        more = f", {draining} of them draining" if draining else ""
        return f"{self._fleet.gpus:g} of {self._policy.gpu_budget.max:g} GPUs of the budget are held{more}"
