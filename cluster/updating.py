"""Updates of a running deployment: the shell around ``rolling``. One at a time; it goes on in the controller's next life."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from biphase.cluster import rolling, wanted_set
from biphase.cluster.deployment import Deployment
from biphase.cluster.generation import generation_of
from biphase.cluster.wanted_set import ROLES
from biphase.protos.errors import InvalidRequest, SetupError, one_line
from biphase.protos.values import Role

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

FIXED = (
    *("name", "backend", "host", "port", "routers", "controller_port", "mode", "served_model_name", "limits"),
    *("max_replays", "drain_s"),
)
"""Keys that supervisor, routers and controller were started with: a change of them needs another `biphase serve`."""
TAKEN_OVER = ("start_timeout_s", "flip_grace_s", "replace_after_s", "placement", "autoscale")
"""Keys that hold as soon as an update begins, ``placement`` for whatever starts from then on. All others are part of the
generation, but for ``replicas``, which are taken over once all instances serve it."""
NOTHING = ["nothing changes"]
logger = logging.getLogger("biphase.cluster.updating")


class Updating:
    """Drives one rolling update of one controller; people follow it by its events."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._drives = False

    async def run(
        self, text: str, *, dry_run: bool, allow_downtime: bool, grace_s: float
    ) -> AsyncIterator[tuple[str, bool]]:
        """Begin one and tell how it goes: (line, whether all is done). InvalidRequest before anything changes."""
        controller = self._controller
        try:
            wanted = Deployment.from_json(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"the deployment cannot be read: {one_line(error)}") from error
        generation = generation_of(wanted)
        others = self._who_counts(wanted)
        file_counts = self._counts(wanted)
        update = rolling.RollingUpdate(
            generation=generation,
            previous=controller.generation,
            grace_s=grace_s or controller.deployment.drain_s,
            allow_downtime=allow_downtime,
            counts={} if others else file_counts,
        )
        lines = self._check(wanted, update)
        if lines != NOTHING:
            then = await self._check_room(wanted, update)
            lines = self._check(wanted, update) + then  # another may have begun meanwhile
        if others and any(
            wanted.plan(role).replicas != controller.deployment.plan(role).replicas for role in file_counts
        ):
            lines.append(f"{_words(file_counts)} is not taken over: {others}")
        if dry_run or lines == NOTHING:
            for line in lines:
                yield line, True
            return
        after = max((event.number for event in controller.events.after(0)), default=0)
        controller.take(generation, wanted)
        controller.update_state = asdict(update)
        controller.events.add("update", "", f"update to generation {generation} begins: {'; '.join(lines)}")
        await controller.save()
        controller.spawn(self.drive())
        async for event in controller.events.follow(after):
            if event.kind == "update":
                ended = event.text.startswith(("update is done", "update is paused"))
                yield event.text, event.text.startswith("update is done")
                if ended:
                    return

    def _check(self, wanted: Deployment, update: rolling.RollingUpdate) -> list[str]:
        """What will be done, in words. Raises InvalidRequest."""
        controller = self._controller
        if controller.stopping:
            raise InvalidRequest("the deployment is stopping")
        running = self.state
        if running is not None and not running.paused:
            raise InvalidRequest(f"an update to generation {running.generation} is under way already")
        for key in FIXED:
            was, now = getattr(controller.deployment, key), getattr(wanted, key)
            if was != now:
                one = isinstance(now, str | int | float)
                said = f"{key} is {now}, it was {was}" if one else f"{key} are other ones"
                raise InvalidRequest(f"{said}: an update cannot change it, serve anew for that")
        steps = self._steps(wanted, update)
        if not steps and not update.counts and wanted == controller.deployment:
            return list(NOTHING)
        reason = rolling.reason_against_update(controller.core, wanted.mode, can_flip=wanted.turns_in_place)
        if steps and reason is not None and not update.allow_downtime:
            raise InvalidRequest(f"{reason}; --allow-downtime does it all the same")
        lines = []
        for step in steps:
            if isinstance(step, rolling.TurnFirst):
                lines.append(f"{step.name} turns to decode, to serve alone meanwhile")
            else:
                role = f" as {step.role}" if step.role != controller.core.slots[step.name].role else ""
                lines.append(f"{step.name} drains and starts anew in generation {update.generation}{role}")
        return lines or ["no instance starts anew, the other settings are taken over"]

    def _steps(self, wanted: Deployment, update: rolling.RollingUpdate) -> list[rolling.Renew | rolling.TurnFirst]:
        return rolling.plan_of(self._controller.core, update, wanted.mode, can_flip=wanted.turns_in_place)

    def _counts(self, wanted: Deployment) -> dict[Role, int]:
        """How many there shall be of each role that has another count now."""
        now = self._controller.core.counts()
        return {role: wanted.plan(role).replicas for role in ROLES if wanted.plan(role).replicas != now[role]}

    async def _check_room(self, wanted: Deployment, update: rolling.RollingUpdate) -> list[str]:
        """Who gets no new instance and what follows the last one's start, in words. Raises InvalidRequest where there are
        not enough hosts that have the weights and room for every new instance in its turn."""
        controller = self._controller
        renewals = [step for step in self._steps(wanted, update) if isinstance(step, rolling.Renew)]
        unfit: list[str] = []
        if renewals:
            try:
                unfit = await controller.backend.check_nodes(wanted)
            except SetupError as error:
                raise InvalidRequest(one_line(error)) from error
        renewed = {step.name: step.role for step in renewals if step.role is not None}
        plan = await controller.admin.check_counts(update.counts, wanted, renewed)
        lines = [f"{reason}: it gets no new instance" for reason in unfit]
        return [*lines, f"then {plan}"] if update.counts else lines

    def _who_counts(self, deployment: Deployment) -> str | None:
        """Whoever decides on counts in place of the file; None where the file does."""
        if self._controller.pin is not None:
            return f"counts are pinned, {self._controller.pin.text}; `biphase scale auto` ends that"
        return "the policy decides on counts" if deployment.autoscale else None

    @property
    def state(self) -> rolling.RollingUpdate | None:
        values = self._controller.update_state
        return rolling.RollingUpdate(**values) if values else None

    @property
    def is_under_way(self) -> bool:
        update = self.state
        return update is not None and not update.paused

    async def drive(self) -> None:
        """Go on with the update that is under way, to its end or pause. Once at a time: one that begins while the last one
        is being written down is gone on with there."""
        if self._drives:
            return
        self._drives = True
        try:
            await self._drive()
        finally:
            self._drives = False

    async def _drive(self) -> None:
        controller, said = self._controller, ""
        await controller.settled.wait()  # who is not heard yet would be taken for one that is down
        while (update := self.state) is not None and not update.paused:
            can_flip, now_s = controller.admin.can_flip, controller.now_s()
            step = rolling.next_step(
                controller.core, update, controller.deployment.mode, can_flip=can_flip, now_s=now_s
            )
            match step:
                case rolling.Wait(reason=reason, until_s=until_s, is_stuck=is_stuck):
                    if is_stuck and reason != said:
                        said = reason
                        self._say(f"update waits: {reason}", "")
                    with contextlib.suppress(TimeoutError):
                        left_s = None if until_s is None else max(0.0, until_s - now_s)
                        await asyncio.wait_for(controller.status.wait(), left_s)
                    continue
                case rolling.Renew(name=name, role=role):
                    said = ""
                    previous, generation = controller.core.slots[name].generation, update.generation
                    turned = "" if role is not None else update.turned  # they have swapped
                    controller.update_state = asdict(replace(update, current=name, previous=previous, turned=turned))
                    wanted_set.renew(controller.core, name, update.grace_s, now_s, generation=generation, role=role)
                    self._say(f"{name} drains, to start anew" + (f" as {role}" if role else ""), name)
                case rolling.TurnFirst(name=name):
                    controller.update_state = asdict(replace(update, turned=name))
                    wanted_set.flip(controller.core, name, "decode", update.grace_s, now_s)
                    self._say(f"{name} turns to decode, to serve alone meanwhile", name)
                case rolling.Renewed(name=name):
                    controller.update_state = asdict(replace(update, current=""))
                    self._say(f"{name} serves in generation {update.generation}", name)
                case rolling.Failed(name=name, reason=reason):
                    self._pause(update, name, reason, now_s)
                case rolling.Finished():
                    done = f"update is done: all serve generation {update.generation}"
                    if update.counts:
                        done += await self._recount(update.counts)
                    controller.update_state = {}  # not before: the next life would not know of the counts
                    self._say(done, "")
            await controller.save()
            controller.changed()

    def _pause(self, update: rolling.RollingUpdate, name: str, reason: str, now_s: float) -> None:
        """Bring the failed one back to the generation before, and let go on who was to follow."""
        controller, core = self._controller, self._controller.core
        taken_back = update.current != name and wanted_set.take_back(core, update.current, now_s)
        wanted_set.renew(core, name, update.grace_s, now_s, generation=update.previous, role=None)
        why = f"{name} does not come up in generation {update.generation}: {reason}"
        controller.update_state = asdict(replace(update, current="", turned="", paused=why))
        said = f"update is paused: {why}; it goes back to generation {update.previous}"
        said += f", {update.current} takes work again" if taken_back else ""
        if all((each.next_generation or each.generation) != update.generation for each in wanted_set.instances(core)):
            controller.take(update.previous, controller.deployments[update.previous])
        self._say(said, name)

    async def _recount(self, counts: Mapping[Role, int]) -> str:
        """What came of the file's counts, as the end of a sentence."""
        others = self._who_counts(self._controller.deployment)
        if others is not None:  # since the update began
            return f"; {_words(counts)} is not taken over: {others}"
        try:
            return f"; {await self._controller.admin.take_counts(counts)}"
        except Exception as error:  # whatever the backend raises: the update itself is done
            if not isinstance(error, InvalidRequest):
                logger.exception("counts of the new file")
            return f"; {_words(counts)} is not taken over: {one_line(error)}"

    def _say(self, text: str, subject: str) -> None:
        self._controller.events.add("update", subject, text)


def _words(counts: Mapping[Role, int]) -> str:
    return " ".join(f"{role}={count}" for role, count in counts.items())
