"""The controller's shell: performs what the pure ``reconcile`` core decides, and tells its view to those who watch.

It holds every process through the backend (its end) and a link to every instance (its silence). What it wants and knows
is kept outside it, so that its next life adopts what runs, reverts nothing and uses no incarnation twice. Losing it stops
no traffic. What people and the policy ask for comes in by ``admin`` and ``autoscaling``.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Container, Coroutine
from pathlib import Path
from typing import Any

from biphase.cluster.actions import Abandon, Action, AskToStop, GiveUp, Kill, Start, TellDrain, TellFlip, TellResume
from biphase.cluster.admin import Admin
from biphase.cluster.autoscaling import Autoscaling
from biphase.cluster.backend import STATE, Backend, Handle, ProcessSpec
from biphase.cluster.broadcast import Broadcast
from biphase.cluster.controller_messages import membership_of, ratio_of, status_of
from biphase.cluster.controller_state import AbandonedLife, ControllerState, Pin, restore, slots_of
from biphase.cluster.deployment import Deployment
from biphase.cluster.events import BEGIN, EventLog
from biphase.cluster.generation import generation_of
from biphase.cluster.keeping import RETRY_S, Keeping
from biphase.cluster.life import Life
from biphase.cluster.node_watch import NodeWatch
from biphase.cluster.reach_watch import ReachWatch
from biphase.cluster.reconcile import STOP_S, Reconciler
from biphase.cluster.retiring import Retiring
from biphase.cluster.router_reports import RouterReports
from biphase.cluster.router_watch import RouterWatch
from biphase.cluster.routers_confirmed import RoutersConfirmed
from biphase.cluster.run_dir import RunDir
from biphase.cluster.settling import until_settled
from biphase.cluster.slot import Slot
from biphase.cluster.straggler_watch import StragglerWatch
from biphase.cluster.survivors import sort_out
from biphase.cluster.updating import Updating
from biphase.cluster.wanted import spec_of, wanted_of
from biphase.protos import convert, worker_pb2
from biphase.protos.errors import InvalidRequest, SetupError, one_line
from biphase.protos.process import Announcer

PIN_RETRY_S = 5.0
"""Between two tries to end a pin whose time is over."""
logger = logging.getLogger("biphase.cluster.controller")


class Controller:
    """One life of the controller of one deployment. Everything runs in one asyncio loop."""

    def __init__(self, spec: ProcessSpec, backend: Backend, announcer: Announcer) -> None:
        self.spec, self.deployment = spec, spec.deployment
        self._clock_offset_s = time.time() - time.monotonic()
        self.started_s = self.now_s()
        self.epoch = 0
        self.stopping = False
        self.announcer = announcer
        self.backend = backend
        self.core = Reconciler(wanted_of(self.deployment), self.deployment.start_timeout_s, backend.kill_patience_s)
        self.events = EventLog(backend, self.now_s)
        self.reports = RouterReports(self.now_s)
        self.pin: Pin | None = None
        self.generation = generation_of(self.deployment)
        self.deployments: dict[str, Deployment] = {self.generation: self.deployment}
        self.policy_text = ""
        self.autoscaler_state: dict[str, Any] = {}
        self.update_state: dict[str, Any] = {}
        self.policy_line = ""
        """The policy and what it said last, for people."""
        self.warnings: list[str] = []
        self.admin = Admin(self)
        self.autoscaling = Autoscaling(self)
        self._stragglers = StragglerWatch(self)
        self.reach_watch = ReachWatch(self)
        self.updating = Updating(self)
        self.membership = Broadcast(lambda: membership_of(self))
        self.status = Broadcast(lambda: status_of(self))
        self.lives: dict[str, Life] = {}
        self.retiring = Retiring(self)
        self._keeping = Keeping(self)
        self._routers = RoutersConfirmed(self)
        self.settled = asyncio.Event()
        """Routers may be told who the members are."""
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._published_version = -1
        self._saved: str | None = None
        self._noted: Deployment | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # -- what others read -------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        """The Unix time when this life began, and on from there without ever going back."""
        return time.monotonic() + self._clock_offset_s

    @property
    def has_policy(self) -> bool:
        return self.autoscaling.policy is not None

    @property
    def state(self) -> str:
        """starting, ready, degraded or stopping, for people."""
        if self.stopping:
            return "stopping"
        if self.core.all_up and self._routers.confirmed:
            return "ready"
        return "degraded" if self.core.was_ready and self._routers.ever_confirmed else "starting"

    def router_addresses(self) -> list[str]:
        slots = [slot for slot in self.core.slots.values() if slot.kind == "router" and slot.is_up]
        return [slot.announcement.address for slot in slots if slot.announcement is not None]

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Reconcile until ``stop`` (the processes go on) or a Shutdown (they have ended). SetupError: cannot start.

        RuntimeError: a part of it has failed; the processes go on, and the next life begins where this one ended.
        """
        await self._restore()
        self.spawn(self._settle())
        self.spawn(self._routers.run())
        self.spawn(RouterWatch(self).run())
        self.spawn(self.updating.drive())
        self.spawn(self._keep_pin())
        self.spawn(NodeWatch(self).run())
        self.spawn(self.autoscaling.run())
        self.spawn(self._stragglers.run())
        self.spawn(self.reach_watch.run())
        ended = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._ended.wait())]
        try:
            while not stop.is_set() and not self._ended.is_set():
                self._wake.clear()
                if self._failure is not None and not self.stopping:
                    raise RuntimeError("a part of the controller has failed") from self._failure
                if not self.stopping:
                    await self._step()
                waits = [asyncio.ensure_future(self._wake.wait()), *ended]
                due_s = None if self.stopping else self.core.next_due_s()
                timeout = None if due_s is None else max(0.0, due_s - self.now_s())
                if self._keeping.troubles:
                    timeout = RETRY_S if timeout is None else min(timeout, RETRY_S)
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                waits[0].cancel()
        finally:
            for task in [*ended, *self._tasks]:
                task.cancel()
            for life in self.lives.values():
                life.let_go()

    async def shut_down(self, *, now: bool, drain_s: float) -> None:
        """End routers (they drain, unless ``now``), then instances. A second call with ``now`` cuts the first short."""
        self.stopping = True
        self.changed()
        if now:
            await self._end_all([life.handle for life in self.lives.values()], 0.0)
        else:
            routers = [life.handle for life in self.lives.values() if life.handle.kind == "router"]
            await self._end_all(routers, drain_s + STOP_S)
            await self._end_all([life.handle for life in self.lives.values()], STOP_S)
        self._ended.set()

    async def _end_all(self, handles: list[Handle], within_s: float) -> None:
        if within_s > 0:
            await asyncio.gather(*(self.backend.ask_to_stop(handle) for handle in handles))
            await _wait_ended(handles, within_s)
        for handle in handles:
            if handle.end is None:
                if within_s > 0:
                    logger.warning("%s#%d did not end by itself, killed", handle.name, handle.incarnation)
                await self.backend.kill(handle)
        await _wait_ended(handles, STOP_S)

    async def _restore(self) -> None:
        """Take over what the last life knew and what runs; kill what should not run."""
        await self.events.open()
        text = await self.backend.load_state()
        state = ControllerState.from_json(text) if text else ControllerState()
        self.epoch = state.epoch + 1
        restore(self.core, state)
        if state.was_ready:
            self._routers.was_confirmed_before()
        if state.generation:
            self.generation = state.generation
            self.deployments = {key: Deployment.from_json(value) for key, value in state.deployments.items()}
            self.deployment = self.deployments[self.generation]
        self._took()
        for slot in self.core.slots.values():
            slot.generation = slot.generation or self.generation
        self.pin, self.policy_text = state.pin, state.policy
        self.autoscaler_state, self.update_state = dict(state.autoscaler), dict(state.update)
        self.autoscaling.restore()
        found = {(handle.name, handle.incarnation): handle for handle in await self.backend.adopt()}
        given_away = {(life.name, life.life) for life in state.abandoned}
        wanted = {slot.name: slot.life for slot in self.core.slots.values()}
        newest, former = sort_out(wanted, found.values(), given_away)
        for handle, why in former:
            await self._kill_former(handle, why)
        for handle in newest.values():
            logger.info("adopted %s#%d (pid %d)", handle.name, handle.incarnation, handle.pid)
            self.core.adopt(handle.name, handle.incarnation, self.now_s())
            self._hold(handle)
        self._end_missing(newest.keys())
        self.retiring.restore(state.abandoned, found)
        if self.epoch > 1:
            self.events.add("start", "controller", f"the controller began its life {self.epoch}, {len(newest)} adopted")
        else:
            what = f"{ratio_of(self.core.slots.values())} of {self.deployment.model}, backend {self.deployment.backend}"
            self.events.add(*BEGIN, f"{self.deployment.name} begins: {what}")
        if not await self.save():  # its epoch is what makes this life the one that is obeyed
            raise RuntimeError(self._keeping.troubles[STATE])

    def _end_missing(self, found: Container[str]) -> None:
        """What was under way with a life that ended while no controller was there is over."""
        for slot in list(self.core.slots.values()):
            if slot.name not in found and slot.life and (slot.ending or slot.flip is not None):
                self.core.adopt(slot.name, slot.life, self.now_s())
                self.core.gone(slot.name, slot.life, "ended while no controller was there", self.now_s())

    async def _settle(self) -> None:
        if self.epoch > 1:
            await until_settled(self.core, self.status)
        self.settled.set()
        self._publish()

    async def _kill_former(self, handle: Handle, why: str) -> None:
        """A life that was replaced: gone before anything starts, where its host can be reached."""
        logger.warning("killing %s#%d: %s", handle.name, handle.incarnation, why)
        await self.backend.kill(handle)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(handle.ended(), self.backend.kill_patience_s)

    async def save(self) -> bool:
        """Keep what is wanted, where it has changed. False: it could not be written, and is tried again."""
        instances = [slot for slot in self.core.slots.values() if slot.is_instance]  # a router has the wanted one's
        in_use = {slot.generation for slot in instances} | {self.generation}
        in_use |= {slot.next_generation for slot in instances if slot.next_generation}
        if self.updating.is_under_way:
            in_use.add(self.update_state["previous"])  # a failed instance goes back to it, whoever else has left it
        if unused := self.deployments.keys() - in_use:
            for generation in unused:
                del self.deployments[generation]
            self._took()
        text = ControllerState(
            epoch=self.epoch,
            was_ready=self.core.was_ready,
            slots=slots_of(self.core),
            former=self.core.former,
            cordoned=self.core.node_failures.cordoned,
            pin=self.pin,
            generation=self.generation,
            deployments={key: value.to_json() for key, value in self.deployments.items()},
            policy=self.policy_text,
            autoscaler=self.autoscaler_state,
            update=self.update_state,
            abandoned=tuple(self.retiring.lives.values()),
        ).to_json()

        async def keep_state() -> None:
            if text != self._saved:
                await self.backend.save_state(text)
                self._saved = text

        kept = await self._keeping.attempt(STATE, keep_state)
        await self._keeping.attempt("deployment.json", self._note_deployment)
        await self.keep_events()
        return kept

    async def _note_deployment(self) -> None:
        """For `biphase serve` and `biphase update`, which compare theirs with what is served."""
        if self.deployment != self._noted:
            RunDir(Path(self.spec.run_dir)).note_deployment(self.deployment)
            self._noted = self.deployment

    async def keep_events(self) -> None:
        """Write down what has happened since."""
        await self._keeping.attempt("events", self.events.keep)

    def take(self, generation: str, deployment: Deployment) -> None:
        """Have this deployment served from now on; what runs of another is the update's to renew."""
        self.deployments[generation] = deployment
        self.deployment, self.generation = deployment, generation
        self._took()

    def _took(self) -> None:
        self.core.start_timeout_s = self.deployment.start_timeout_s
        self.backend.check_for([self.deployment, *self.deployments.values()])

    # -- doing ------------------------------------------------------------------------------------------------------

    async def _step(self) -> None:
        self.core.awake(self.now_s())
        actions = self.core.decide(self.now_s())
        self._publish()
        self._tell_notes()
        kept = await self.save()  # before a start: an incarnation is never used twice
        for action in actions:
            life = self._life_of(action)  # it may have ended while this was saved: then there is nothing to do
            match action:
                case Start() if not kept:
                    slot = self.core.slots[action.name]
                    self.core.put_off(
                        slot.name, slot.life, f"is not started: {self._keeping.troubles[STATE]}", self.now_s()
                    )
                case Start():
                    await self._start(self.core.slots[action.name])
                case Kill(name=name, incarnation=incarnation, reason=reason) if life is not None:
                    logger.warning("killing %s#%d: %s", name, incarnation, reason)
                    await self.backend.kill(life.handle)
                case Abandon(name=name, incarnation=incarnation, node=node) if life is not None:
                    del self.lives[name]
                    self._abandon(life, incarnation, node)
                    self.events.add("end", name, f"{name}#{incarnation} cannot be reached, its place is given away")
                case AskToStop() if life is not None:
                    await self.backend.ask_to_stop(life.handle)
                case TellDrain(grace_s=grace_s):
                    _tell(life, worker_pb2.LinkDown(drain=worker_pb2.Drain(grace_s=grace_s)))
                case TellResume():
                    _tell(life, worker_pb2.LinkDown(resume=worker_pb2.Resume()))
                case TellFlip(to=to, grace_s=grace_s):
                    role = convert.role_to_proto("prefill" if to.kind == "prefill" else "decode")
                    flip = worker_pb2.Flip(role=role, incarnation=to.incarnation, grace_s=grace_s)
                    _tell(life, worker_pb2.LinkDown(flip=flip))
                case GiveUp(reason=reason):
                    logger.error("giving up: %s", reason)
                    await self._end_all([life.handle for life in self.lives.values()], 0.0)
                    raise SetupError(reason)
        if actions:
            self.changed()

    async def _start(self, slot: Slot) -> None:
        avoid = sorted(slot.avoids or ())
        deployment = self.deployments.get(slot.generation, self.deployment)
        spec = spec_of(self.spec, slot.name, slot.incarnation, kind=slot.kind, deployment=deployment, avoid=avoid)
        logger.info("starting %s#%d", slot.name, slot.incarnation)
        try:
            self._hold(await self.backend.start(spec))
        except (SetupError, OSError) as error:
            if isinstance(error, SetupError) and not (self.core.was_ready or slot.ever_ready):
                raise
            ended = self.core.no_room if isinstance(error, SetupError) else self.core.gone
            ended(slot.name, slot.life, f"cannot be started: {one_line(error)}", self.now_s())

    def _life_of(self, action: Action) -> Life | None:
        """The life that an action is about, where it is held still."""
        if isinstance(action, GiveUp):
            return None
        life = self.lives.get(action.name)
        return life if life is not None and life.handle.incarnation <= action.incarnation else None

    async def _keep_pin(self) -> None:
        """End a pin when its time is over. Where that is refused, which is said once, it stays and is tried again; an
        update goes first."""
        said: Pin | None = None
        while True:
            pin = self.pin
            if pin is None or pin.until_s is None:
                await self.status.wait()
            elif (left_s := pin.until_s - self.now_s()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.status.wait(), left_s)
            elif self.updating.is_under_way:
                await asyncio.sleep(PIN_RETRY_S)
            else:
                try:
                    await self.admin.unpin("the time of the pin is over")
                except Exception as error:  # whatever the backend raises: it must not end the next lives one by one
                    if said is not pin:
                        if not isinstance(error, InvalidRequest):
                            logger.exception("the end of the pin")
                        self.events.add("refused", "", f"end of the pin, tried again: {one_line(error)}")
                        said = pin
                    await asyncio.sleep(PIN_RETRY_S)

    def _tell_notes(self) -> None:
        for kind, subject, text in self.core.notes:
            self.events.add(kind, subject, text)
        self.core.notes.clear()

    def _abandon(self, life: Life, incarnation: int, node: str) -> None:
        """A life whose place was given away is told to end, and killed, as soon as it can be reached again."""
        handle = life.handle
        life.let_go()
        away = AbandonedLife(
            name=handle.name,
            kind=handle.kind,
            life=handle.incarnation,
            incarnation=incarnation,
            address=life.address,
            node=node,
            since_s=self.now_s(),
        )
        self.retiring.begin(away, handle)

    def _publish(self) -> None:
        if self.settled.is_set() and self.core.version != self._published_version:
            self._published_version = self.core.version
            members = ", ".join(f"{member.name}#{member.incarnation}" for member in self.core.members)
            logger.info("membership %d.%d: %s", self.epoch, self.core.version, members or "nobody")
            self.membership.changed()

    def changed(self) -> None:
        """Something happened: reconcile, and tell those who watch."""
        self._publish()  # death leaves the membership now, not after the next step's awaits
        self._wake.set()
        self.status.changed()

    def superseded(self) -> None:
        """A later life of the controller is obeyed: this one touches nothing any more."""
        logger.error("a later life of the controller is there, this one ends")
        self.stopping = True
        self._ended.set()

    # -- holding processes ------------------------------------------------------------------------------------------

    def _hold(self, handle: Handle) -> None:
        life = self.lives[handle.name] = Life(self, handle)
        life.watch = self.spawn(life.follow())

    def on_gone(self, life: Life) -> None:
        handle = life.handle
        self.core.gone(handle.name, handle.incarnation, handle.end or "ended", self.now_s())
        if handle.name not in self.core.slots and self.lives.get(handle.name) is life:
            del self.lives[handle.name]
        self.changed()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a part of the controller. An exception in it ends this life: the next one does better than half of this."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._part_ended)
        return task

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if self.stopping:
                logger.error("while stopping", exc_info=error)
            self._failure = self._failure or error
            self._wake.set()


def _tell(life: Life | None, command: worker_pb2.LinkDown) -> None:
    if life is not None and life.link is not None:
        logger.info("telling %s: %s", life.handle.name, command.WhichOneof("command"))
        life.link.send(command)


async def _wait_ended(handles: list[Handle], within_s: float) -> None:
    waits = [asyncio.ensure_future(handle.ended()) for handle in handles]
    if waits:
        await asyncio.wait(waits, timeout=within_s)
    for wait in waits:
        wait.cancel()
