"""Updates of a running deployment: the shell around ``rolling``. One at a time; it goes on in the controller's next life."""

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from biphase.cluster import rolling, wanted_set
from biphase.cluster.deployment import Deployment
from biphase.cluster.generation import generation_of
from biphase.cluster.wanted_set import ROLES
from biphase.protos.errors import InvalidRequest, one_line
from biphase.protos.values import Role

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

FIXED = (
    *("name", "backend", "host", "port", "routers", "controller_port", "mode", "served_model_name", "limits"),
    "max_replays",
)
"""Keys that routers and controller were started with: a change of them needs another `biphase serve`."""
logger = logging.getLogger("biphase.cluster.updating")


class Updating:
    """Drives one rolling update of one controller; people follow it by its events."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller

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
        counts = {} if others else file_counts
        self._check(wanted, generation, counts, allow_downtime=allow_downtime)
        then = await self._after(counts, wanted, generation)
        lines = self._check(
            wanted, generation, counts, allow_downtime=allow_downtime
        )  # another may have begun meanwhile
        lines += then
        if others and any(
            wanted.plan(role).replicas != controller.deployment.plan(role).replicas for role in file_counts
        ):
            lines.append(f"{_words(file_counts)} is not taken over: {others}")
        if dry_run or lines[-1].startswith("nothing"):
            for line in lines:
                yield line, True
            return
        after = max((event.number for event in controller.events.after(0)), default=0)
        update = rolling.RollingUpdate(
            generation=generation,
            previous=controller.generation,
            grace_s=grace_s or controller.deployment.drain_s,
            allow_downtime=allow_downtime,
            counts=counts,
        )
        controller.deployments[generation] = wanted
        controller.deployment, controller.generation = wanted, generation
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

    def _check(
        self, wanted: Deployment, generation: str, counts: Mapping[Role, int], *, allow_downtime: bool
    ) -> list[str]:
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
                said = f"{key} is {now}, it was {was}" if isinstance(now, str | int) else f"{key} are other ones"
                raise InvalidRequest(f"{said}: an update cannot change it, serve anew for that")
        names = rolling.plan_of(controller.core, generation)
        if not names and not counts and wanted == controller.deployment:
            return ["nothing changes"]
        reason = rolling.reason_against_update(controller.core, wanted.mode, can_flip=controller.admin.can_flip)
        if names and reason is not None and not allow_downtime:
            raise InvalidRequest(f"{reason}; --allow-downtime does it all the same")
        lines = [f"{name} drains and starts anew in generation {generation}" for name in names]
        return lines or ["no instance starts anew, the other settings are taken over"]

    def _counts(self, wanted: Deployment) -> dict[Role, int]:
        """How many there shall be of each role that has another count now."""
        now = self._controller.core.counts()
        return {role: wanted.plan(role).replicas for role in ROLES if wanted.plan(role).replicas != now[role]}

    async def _after(self, counts: Mapping[Role, int], wanted: Deployment, generation: str) -> list[str]:
        """What follows the last instance's new start, in words. Raises InvalidRequest where it cannot be."""
        if not counts:
            return []
        try:
            return [f"then {await self._controller.admin.check_counts(counts, wanted)}"]
        except InvalidRequest as error:
            if not rolling.plan_of(self._controller.core, generation):
                raise
            return [f"then {_words(counts)}, for which there is no room as things are: {one_line(error)}"]

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
        """Go on with the update that is under way, to its end or pause."""
        controller = self._controller
        while (update := self.state) is not None and not update.paused:
            can_flip = controller.admin.can_flip
            step = rolling.next_step(controller.core, update, controller.deployment.mode, can_flip=can_flip)
            now_s = controller.now_s()
            match step:
                case rolling.Wait():
                    await controller.status.wait()
                    continue
                case rolling.Renew(name=name, role=role):
                    controller.update_state = asdict(replace(update, current=name))
                    generation = update.generation
                    wanted_set.renew(controller.core, name, update.grace_s, now_s, generation=generation, role=role)
                    self._say(f"{name} drains, to start anew" + (f" as {role}" if role else ""), name)
                case rolling.TurnFirst(name=name):
                    wanted_set.flip(controller.core, name, "decode", update.grace_s, now_s)
                    self._say(f"{name} turns to decode, to serve alone meanwhile", name)
                case rolling.Renewed(name=name):
                    controller.update_state = asdict(replace(update, current=""))
                    self._say(f"{name} serves in generation {update.generation}", name)
                case rolling.Failed(name=name, reason=reason):
                    slot = controller.core.slots[name]
                    slot.generation, slot.failures, slot.not_before_s = update.previous, 0, now_s
                    why = f"{name} does not come up in generation {update.generation}: {reason}"
                    controller.update_state = asdict(replace(update, current="", paused=why))
                    if not any(each.generation == update.generation for each in wanted_set.instances(controller.core)):
                        controller.generation = update.previous
                        controller.deployment = controller.deployments[update.previous]
                    self._say(f"update is paused: {why}; it goes back to generation {update.previous}", name)
                case rolling.Finished():
                    done = f"update is done: all serve generation {update.generation}"
                    if update.counts:
                        done += await self._recount(update.counts)
                    controller.update_state = {}  # not before: the next life would not know of the counts
                    self._say(done, "")
            await controller.save()
            controller.changed()

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
