"""The controller's shell: performs what the pure ``reconcile`` core decides, and serves its view over gRPC.

It holds every process through the backend (its end) and a link to every instance (its silence). It keeps epoch and
incarnations outside itself, so that its next life adopts what runs and reuses no incarnation. Losing it stops no traffic.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.cluster.backend import Backend, Handle, ProcessSpec
from biphase.cluster.broadcast import Broadcast
from biphase.cluster.controller_service import ControllerService, membership_of, status_of
from biphase.cluster.controller_state import ControllerState, SlotState
from biphase.cluster.make_backend import make_backend
from biphase.cluster.reconcile import GiveUp, Kill, Reconciler, Start
from biphase.cluster.wanted import spec_of, wanted_of
from biphase.cluster.worker_link import hold_link
from biphase.protos import controller_pb2, router_pb2, router_pb2_grpc, worker_pb2
from biphase.protos.errors import SetupError
from biphase.protos.grpc_setup import bind, channel_options, server_options, service_handler
from biphase.protos.process import Announcer

STOP_S = 10.0
"""How long an instance may take to end after its legs are gone."""
CONFIRM_POLL_S = 0.03
CONFIRM_CALL_S = 2.0
logger = logging.getLogger("biphase.cluster.controller")


@dataclass(slots=True)
class Life:
    """One running process: its handle and the tasks that watch it."""

    handle: Handle
    watch: asyncio.Task[None]
    link: asyncio.Task[None] | None = None
    welcome: worker_pb2.Welcome | None = None


class Controller:
    """One life of the controller of one deployment. Everything runs in one asyncio loop."""

    def __init__(self, spec: ProcessSpec, backend: Backend, announcer: Announcer) -> None:
        self.spec, self.deployment = spec, spec.deployment
        self.started_s = time.monotonic()
        self.epoch = 0
        self.stopping = False
        self.announcer = announcer
        self.reconciler = Reconciler(wanted_of(self.deployment), self.deployment.start_timeout_s)
        self.membership = Broadcast(lambda: membership_of(self))
        self.status = Broadcast(lambda: status_of(self))
        self.lives: dict[str, Life] = {}
        self._backend = backend
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._confirmed: object = None
        self._published_version = -1
        self._saved: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what others read -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """starting, ready, degraded or stopping, for people."""
        if self.stopping:
            return "stopping"
        if self.reconciler.all_up and self._confirmed == self._view():
            return "ready"
        return "degraded" if self.reconciler.was_ready and self._confirmed is not None else "starting"

    def router_addresses(self) -> list[str]:
        slots = [slot for slot in self.reconciler.slots.values() if slot.wanted.kind == "router" and slot.is_up]
        return [slot.announcement.address for slot in slots if slot.announcement is not None]

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Reconcile until ``stop`` (the processes go on) or a Shutdown (they have ended). SetupError: cannot start."""
        await self._restore()
        self._spawn(self._confirm_routers())
        ended = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._ended.wait())]
        try:
            while not stop.is_set() and not self._ended.is_set():
                self._wake.clear()
                if not self.stopping:
                    await self._step()
                waits = [asyncio.ensure_future(self._wake.wait()), *ended]
                due_s = None if self.stopping else self.reconciler.next_due_s()
                timeout = None if due_s is None else max(0.0, due_s - time.monotonic())
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                waits[0].cancel()
        finally:
            for task in [*ended, *self._tasks, *(life.watch for life in self.lives.values())]:
                task.cancel()
            for life in self.lives.values():
                if life.link is not None:
                    life.link.cancel()

    async def shut_down(self, *, now: bool, drain_s: float) -> None:
        """End routers (they drain, unless ``now``), then instances. A second call with ``now`` cuts the first short."""
        self.stopping = True
        self._changed()
        if now:
            await self._end_all([life.handle for life in self.lives.values()], 0.0)
        else:
            routers = [life.handle for life in self.lives.values() if life.handle.kind == "router"]
            await self._end_all(routers, drain_s + STOP_S)
            await self._end_all([life.handle for life in self.lives.values()], STOP_S)
        self._ended.set()

    async def _end_all(self, handles: list[Handle], within_s: float) -> None:
        if within_s > 0:
            await asyncio.gather(*(self._backend.ask_to_stop(handle) for handle in handles))
            await self._wait_ended(handles, within_s)
        for handle in handles:
            if handle.end is None:
                if within_s > 0:
                    logger.warning("%s#%d did not end by itself, killed", handle.name, handle.incarnation)
                await self._backend.kill(handle)
        await self._wait_ended(handles, STOP_S)

    @staticmethod
    async def _wait_ended(handles: list[Handle], within_s: float) -> None:
        waits = [asyncio.ensure_future(handle.ended()) for handle in handles]
        if waits:
            await asyncio.wait(waits, timeout=within_s)
        for wait in waits:
            wait.cancel()

    async def _restore(self) -> None:
        """Take over what the last life knew and what runs; kill what should not run."""
        text = await self._backend.load_state()
        state = ControllerState.from_json(text) if text else ControllerState()
        self.epoch = state.epoch + 1
        self.reconciler.was_ready = state.was_ready
        if self.reconciler.was_ready:
            self._confirmed = "an earlier life"
        for name, kept in state.slots.items():
            if name in self.reconciler.slots:
                self.reconciler.slots[name].incarnation = kept.incarnation
                self.reconciler.slots[name].restarts = kept.restarts
        newest: dict[str, Handle] = {}
        for handle in sorted(await self._backend.adopt(), key=lambda handle: handle.incarnation):
            slot = self.reconciler.slots.get(handle.name)
            if handle.kind == "controller":
                continue
            if slot is None or handle.incarnation < slot.incarnation:
                await self._kill_and_wait(handle, "a former life")
                continue
            if handle.name in newest:
                await self._kill_and_wait(newest[handle.name], "a newer life runs")
            newest[handle.name] = handle
        for handle in newest.values():
            logger.info("adopted %s#%d (pid %d)", handle.name, handle.incarnation, handle.pid)
            self.reconciler.adopt(handle.name, handle.incarnation, time.monotonic())
            self._hold(handle)
        await self._save()

    async def _kill_and_wait(self, handle: Handle, why: str) -> None:
        logger.warning("killing %s#%d: %s", handle.name, handle.incarnation, why)
        await self._backend.kill(handle)
        await handle.ended()

    async def _save(self) -> None:
        slots = {
            name: SlotState(incarnation=slot.incarnation, restarts=slot.restarts)
            for name, slot in self.reconciler.slots.items()
        }
        text = ControllerState(epoch=self.epoch, was_ready=self.reconciler.was_ready, slots=slots).to_json()
        if text != self._saved:
            await self._backend.save_state(text)
            self._saved = text

    async def _step(self) -> None:
        actions = self.reconciler.decide(time.monotonic())
        self._publish()
        await self._save()  # before a start: an incarnation is never used twice
        for action in actions:
            match action:
                case Start(name=name, incarnation=incarnation):
                    logger.info("starting %s#%d", name, incarnation)
                    self._hold(await self._backend.start(spec_of(self.spec, name, incarnation)))
                case Kill(name=name, incarnation=incarnation, reason=reason):
                    logger.warning("killing %s#%d: %s", name, incarnation, reason)
                    await self._backend.kill(self.lives[name].handle)
                case GiveUp(reason=reason):
                    logger.error("giving up: %s", reason)
                    await self._end_all([life.handle for life in self.lives.values()], 0.0)
                    raise SetupError(reason)
        if actions:
            self._changed()

    def _publish(self) -> None:
        if self.reconciler.version != self._published_version:
            self._published_version = self.reconciler.version
            members = ", ".join(f"{member.name}#{member.incarnation}" for member in self.reconciler.members)
            logger.info("membership %d.%d: %s", self.epoch, self.reconciler.version, members or "nobody")
            self.membership.changed()

    def _changed(self) -> None:
        """Something happened: reconcile, and tell those who watch."""
        self._publish()  # death leaves the membership now, not after the next step's awaits
        self._wake.set()
        self.status.changed()

    # -- holding processes ------------------------------------------------------------------------------------------

    def _hold(self, handle: Handle) -> None:
        self.lives[handle.name] = Life(handle, asyncio.create_task(self._watch(handle)))

    async def _watch(self, handle: Handle) -> None:
        """Follow one life to its end; its last word is heard before its end is."""
        async for announcement in self._backend.watch(handle):
            self.reconciler.announced(announcement, time.monotonic())
            life = self.lives[handle.name]
            if announcement.state == "ready" and handle.kind != "router" and life.link is None:
                life.link = asyncio.create_task(self._hold_link(handle, announcement.address))
            self._changed()
        await handle.ended()
        logger.info("%s#%d is gone: %s", handle.name, handle.incarnation, handle.end)
        self._on_gone(handle)

    def _on_gone(self, handle: Handle) -> None:
        life = self.lives[handle.name]
        if life.handle is handle and life.link is not None:
            life.link.cancel()
        self.reconciler.gone(handle.name, handle.incarnation, handle.end or "ended", time.monotonic())
        self._changed()

    async def _hold_link(self, handle: Handle, address: str) -> None:
        def on_welcome(welcome: worker_pb2.Welcome) -> None:
            self.lives[handle.name].welcome = welcome
            self.reconciler.linked(handle.name, handle.incarnation, time.monotonic())
            self._changed()

        reason = await hold_link(
            name=handle.name,
            address=address,
            incarnation=handle.incarnation,
            epoch=self.epoch,
            on_welcome=on_welcome,
        )
        if not self.stopping:
            logger.warning("%s#%d is lost: %s", handle.name, handle.incarnation, reason)
            self.reconciler.lost(handle.name, handle.incarnation, f"link lost: {reason}", time.monotonic())
            self._changed()

    # -- routers ----------------------------------------------------------------------------------------------------

    def _view(self) -> object:
        """What the routers should see: a value to compare."""
        return self.reconciler.version, tuple(self.router_addresses())

    async def _confirm_routers(self) -> None:
        """`ready` is said only when every router has a link to every instance."""
        while True:
            view = self._view()
            if self.reconciler.all_up and self._confirmed != view:
                seen = await asyncio.gather(*(self._router_sees_all(address) for address in self.router_addresses()))
                if all(seen) and self._view() == view:
                    self._confirmed = view
                    self._changed()
                    continue
                await asyncio.sleep(CONFIRM_POLL_S)
            else:
                await self.status.wait()

    async def _router_sees_all(self, address: str) -> bool:
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            try:
                info = await router_pb2_grpc.RouterStub(channel).GetServerInfo(
                    router_pb2.GetServerInfoRequest(), timeout=CONFIRM_CALL_S
                )
            except grpc.aio.AioRpcError:
                return False
        ready = {(view.name, view.incarnation) for view in info.instances if view.state == "ready"}
        return all((member.name, member.incarnation) in ready for member in self.reconciler.members)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve(spec: ProcessSpec, announcer: Announcer, stop: asyncio.Event) -> None:
    """Run the controller of ``spec.deployment`` at ``spec.controller_address`` until ``stop`` or a Shutdown."""
    backend = make_backend(spec.deployment, spec.run_dir, owner=False)
    await backend.open()
    controller = Controller(spec, backend, announcer)
    server = grpc.aio.server(options=server_options())
    service = ControllerService(controller)
    handler = service_handler(controller_pb2.DESCRIPTOR, "Controller", service, GetMessageClass)
    server.add_generic_rpc_handlers((handler,))
    host, _, port = spec.controller_address.rpartition(":")
    bind(server, host, int(port))
    await server.start()
    announcer.update(state="ready", address=spec.controller_address)
    try:
        await controller.run(stop)
    finally:
        await server.stop(grace=0.2)
        await backend.close()
