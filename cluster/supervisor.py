"""The supervisor: one small process per deployment that outlives the terminal with `--detach`.

It opens the backend, starts instances, router and controller at once (the controller adopts what it finds), restarts the
controller, writes serve.json, and ends everything on SIGTERM (drain; the second one, or SIGUSR1: at once) or when the
`biphase serve` it belongs to is gone. On a cluster that outlived an earlier supervisor it goes on with what that one served
(``survivors``). Run as `python -m biphase.cluster.supervisor RUN_DIR --lock-fd N --began SECONDS [--foreground]`.
"""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio

from biphase.cluster.backend import CONTROLLER, Backend, Handle, ProcessSpec
from biphase.cluster.controller_lives import ControllerLives
from biphase.cluster.controller_state import AbandonedLife, ControllerState, first_state
from biphase.cluster.look_back import CONTROLLER_END_S, comes_free, free_port, kill, look_back
from biphase.cluster.make_backend import make_backend
from biphase.cluster.process_main import SUPERVISOR_VARIABLE
from biphase.cluster.run_dir import CUT_SIGNAL, ProcessLine, RunDir, ServeRecord, started_ticks
from biphase.cluster.survivors import SERVED, Plan, Served, with_routers_anew
from biphase.cluster.wanted import spec_of, wanted_of
from biphase.protos import controller_pb2, controller_pb2_grpc
from biphase.protos.errors import SetupError, one_line
from biphase.protos.grpc_setup import channel_options
from biphase.protos.process import set_up_logging

CLOSE_S, CUT_CLOSE_S = 30.0, 5.0
EXIT_OK, EXIT_CRASH, EXIT_SETUP = 0, 1, 2
_PR_SET_CHILD_SUBREAPER = 36
logger = logging.getLogger("biphase.cluster.supervisor")


class StopRequests:
    """What asks for the end: SIGTERM, SIGINT, the end of the owner's pipe. The first drains, the second cuts.

    SIGUSR1 cuts by itself: two equal signals sent in a row may arrive as one.
    """

    def __init__(self, *, foreground: bool) -> None:
        self.drain = asyncio.Event()
        self.cut = asyncio.Event()
        self.listen()
        if foreground:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._owner_gone)

    def listen(self) -> None:
        """Take the signals; again after Ray has put a handler of its own before ours."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.ask)
        asyncio.get_running_loop().add_signal_handler(CUT_SIGNAL, self.ask_now)

    def ask(self) -> None:
        signal.alarm(0)  # Ray's SIGTERM handler sets one that aborts
        (self.cut if self.drain.is_set() else self.drain).set()

    def ask_now(self) -> None:
        signal.alarm(0)
        self.drain.set()
        self.cut.set()

    def _owner_gone(self) -> None:
        if not os.read(sys.stdin.fileno(), 1024):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            if not self.drain.is_set():
                self.ask()


class Supervisor:
    """Owns the backend and the record of one deployment."""

    def __init__(self, run_dir: RunDir, began_s: float, stops: StopRequests) -> None:
        self._run_dir, self._began_s, self._stops = run_dir, began_s, stops
        self._deployment = run_dir.deployment()
        self._backend: Backend = make_backend(self._deployment, str(run_dir.path), owner=True)
        pid = os.getpid()
        self._record = ServeRecord(
            name=self._deployment.name,
            pid=pid,
            started_ticks=started_ticks(pid) or 0,
            backend=self._deployment.backend,
            controller_address=f"127.0.0.1:{self._deployment.controller_port or free_port()}",
        )
        env = _biphase_variables()
        if self._deployment.backend == "process":
            env = (*env, (SUPERVISOR_VARIABLE, str(pid)))
        self._base = ProcessSpec(
            name=CONTROLLER,
            kind=CONTROLLER,
            incarnation=1,
            deployment=self._deployment,
            run_dir=str(run_dir.path),
            controller_address=self._record.controller_address,
            env=env,
        )
        self._failure = ""
        self._mute = False

    async def run(self) -> int:
        """Serve until asked to stop. Returns the exit code; the record says why when it is not 0."""
        self._stage("supervisor")
        code = EXIT_OK
        work = asyncio.create_task(self._serve())
        asked = asyncio.create_task(self._stops.drain.wait())
        try:
            await asyncio.wait([work, asked], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            self._say(state="stopping")
            await self._shut_down(work)
        except SetupError as error:
            self._failure, code = one_line(error), EXIT_SETUP
            logger.error("%s", self._failure)
        except Exception as error:
            self._failure, code = f"the supervisor has crashed: {one_line(error)}", EXIT_CRASH
            logger.exception("crashed")
        finally:
            asked.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self._close()
            self._say(state="failed" if self._failure else "stopped", detail=self._failure)
        return code

    async def _close(self) -> None:
        """Let go of the backend. One that hangs (a cluster that does not answer) is left behind by ending at once."""
        close, cut = asyncio.create_task(self._backend.close()), asyncio.create_task(self._stops.cut.wait())
        await asyncio.wait([close, cut], timeout=CLOSE_S, return_when=asyncio.FIRST_COMPLETED)
        if cut.done() and not close.done():
            await asyncio.wait([close], timeout=CUT_CLOSE_S)
        cut.cancel()
        if not close.done():
            logger.error("the backend does not close, ending at once")
            self._say(state="failed" if self._failure else "stopped", detail=self._failure)
            os._exit(EXIT_SETUP if self._failure else EXIT_OK)  # what it started is bound to this process
        close.result()

    async def _serve(self) -> None:
        """Bring everything up and keep the controller alive; returns when it ends in a shutdown."""
        await self._backend.open()
        self._stops.listen()
        host = await self._backend.own_address()
        self._stage("ray up" if self._deployment.backend == "ray" else "backend up")
        former = await look_back(self._backend, self._deployment)
        left = await kill(self._backend, former.to_kill, self._backend.kill_patience_s)
        await self._reach(host, former.controller_address)
        if former.goes_on:
            await self._go_on(former)
        else:
            abandoned = (*former.state.abandoned, *(_abandoned(handle) for handle in left))
            await self._begin(replace(former.state, abandoned=abandoned))
        self._stage("processes started")
        await self._keep_controller(ControllerLives(former.controller_incarnation, may_fail=not former.goes_on))

    async def _go_on(self, former: Plan) -> None:
        """The controller adopts what lives, by its state. Routers look for it at an address, which may be another now."""
        if former.controller_address != self._base.controller_address:
            logger.warning("the controller was at %s: routers start anew", former.controller_address or "?")
            await self._backend.save_state(with_routers_anew(former.state, self._deployment.drain_s).to_json())

    async def _begin(self, used: ControllerState) -> None:
        """Start all that the deployment wants, or leave that to the controller."""
        specs = [spec_of(self._base, wanted.name, 1) for wanted in wanted_of(self._deployment)]
        await self._backend.check(specs)
        # the largest shares of GPUs first: Ray places each as it comes, and small ones would take the large ones' room
        specs.sort(key=lambda spec: -(spec.gpus or 0.0))
        at_once = not self._backend.hosts_may_join
        await self._backend.save_state(first_state(specs, started=at_once, used=used))
        for spec in specs if at_once else ():
            await self._backend.start(spec)

    async def _keep_controller(self, lives: ControllerLives) -> None:
        """One controller after the other, until one ends in a shutdown."""
        while True:
            began_s = time.monotonic()
            try:
                end, was_up, failed = await self._follow_controller(lives.incarnation)
            except (SetupError, OSError) as error:  # it could not even be started
                end, was_up, failed = "could not be started", False, one_line(error)
            if self._stops.drain.is_set():
                return
            name = f"controller#{lives.incarnation}"
            delay_s = lives.ended(lived_s=time.monotonic() - began_s, was_up=was_up, failed=failed)
            said = f"{name} {end}{f': {failed}' if failed else ''}, starting it again in {delay_s:.1f} s"
            logger.warning("%s", said)
            self._say(state="degraded" if self._record.state == "ready" else self._record.state, detail=said)
            await asyncio.sleep(delay_s)

    async def _follow_controller(self, incarnation: int) -> tuple[str, bool, str]:
        """One life of it: why it ended, whether it was up, and why its set-up failed where it did."""
        if self._backend.hosts_may_join:
            served = Served(
                deployment=self._deployment.to_json(),
                controller_address=self._base.controller_address,
                controller_incarnation=incarnation,
            )
            await self._backend.save_state(served.to_json(), SERVED)
        controller = await self._backend.start(spec_of(self._base, CONTROLLER, incarnation))
        follow = asyncio.create_task(self._follow_status())
        was_up, failed = False, ""
        try:
            async for announcement in self._backend.watch(controller):
                if announcement.state == "failed":
                    failed = announcement.detail
                if announcement.state == "ready":
                    was_up = True
                    self._stage("controller")
                    self._say(controller_address=announcement.address)
        finally:
            follow.cancel()
        return await controller.ended(), was_up, failed

    async def _reach(self, host: str, former: str) -> None:
        """From here on the controller is where other hosts of the cluster reach it, if there are any; where it was
        (``former``), if it can be: routers that outlived it look for it there."""
        if self._backend.hosts_may_join:
            given = self._deployment.controller_port
            if not given and former.rpartition(":")[0] == host and await comes_free(former):
                address = former
            else:
                address = f"{host}:{given or free_port(host)}"
            self._base = replace(self._base, controller_address=address, env=_biphase_variables())
            self._say(controller_address=address)

    async def _follow_status(self) -> None:
        """Copy the controller's view to the record, and note when each process became ready for the first time."""
        while True:
            async with grpc.aio.insecure_channel(self._record.controller_address, options=channel_options()) as channel:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    call = controller_pb2_grpc.ControllerStub(channel).WatchStatus(
                        controller_pb2.WatchStatusRequest(), wait_for_ready=True
                    )
                    async for status in call:
                        for process in status.processes:
                            if process.kind != CONTROLLER and process.state in ("loading", "ready"):
                                self._stage(f"{process.name} {process.state}")
                        if status.state == "ready":
                            self._stage("ready")
                        address = status.router_addresses[0] if status.router_addresses else self._record.router_address
                        if not self._stops.drain.is_set():
                            self._say(
                                state=status.state,
                                detail=status.detail,
                                router_address=address,
                                processes=tuple(_line(process) for process in status.processes),
                            )
            await asyncio.sleep(0.1)

    async def _shut_down(self, work: "asyncio.Task[None]") -> None:
        """Drain through the controller; without one, or when asked twice, end what runs at once."""
        drain = asyncio.create_task(self._call_shutdown(now=False))
        cut = asyncio.create_task(self._stops.cut.wait())
        await asyncio.wait([drain, cut], return_when=asyncio.FIRST_COMPLETED)
        drained = drain.done() and drain.result()
        if not drained and not cut.done():
            logger.warning("the controller does not answer, ending everything")
        if drained:
            await asyncio.wait([work, cut], timeout=CONTROLLER_END_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, cut):
            task.cancel()
        # what is left, all of it or nothing, ends with the backend

    async def _call_shutdown(self, *, now: bool) -> bool:
        if not any(name == "controller" for name, _ in self._record.stages):
            return False
        drain_s = self._deployment.drain_s
        async with grpc.aio.insecure_channel(self._record.controller_address, options=channel_options()) as channel:
            try:
                request = controller_pb2.ShutdownRequest(now=now, drain_s=drain_s)
                await controller_pb2_grpc.ControllerStub(channel).Shutdown(request, timeout=drain_s + 60.0)
                return True
            except grpc.aio.AioRpcError as error:
                logger.warning("shutdown: %s", one_line(Exception(error.details())))
                return False

    def _stage(self, name: str) -> None:
        """Note when ``name`` was first reached."""
        if all(name != known for known, _ in self._record.stages):
            at_s = time.monotonic() - self._began_s
            logger.info("stage %s at %.2f s", name, at_s)
            self._say(stages=(*self._record.stages, (name, round(at_s, 3))))

    def _say(self, **changes: object) -> None:
        record = replace(self._record, **changes)  # type: ignore[arg-type]
        if record != self._record or not self._record.stages:
            self._record = record
            try:
                self._run_dir.write_record(record)
                self._mute = False
            except OSError as error:  # a full disk ends nothing
                if not self._mute:
                    logger.error("serve.json cannot be written: %s", error.strerror)
                self._mute = True


def _line(process: controller_pb2.ProcessStatus) -> ProcessLine:
    return ProcessLine(
        name=process.name,
        kind=process.kind,
        incarnation=process.incarnation,
        state=process.state,
        detail=process.detail,
        progress=process.progress,
        pid=process.pid,
    )


def _biphase_variables() -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in os.environ.items() if name.startswith("BIPHASE_"))


def _abandoned(handle: Handle) -> AbandonedLife:
    return AbandonedLife(
        name=handle.name,
        kind=handle.kind,
        life=handle.incarnation,
        incarnation=handle.incarnation,
        since_s=time.time(),
    )


def _adopt_orphans() -> None:
    """Become the parent of what a dying controller leaves behind, and collect those when they end."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        logger.warning("cannot become a subreaper; ended orphans stay as zombies until this process ends")


def reap_orphans() -> None:
    """Collect every ended child. Only at the very end, when nobody waits for one in particular."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


async def _main(arguments: argparse.Namespace) -> int:
    stops = StopRequests(foreground=arguments.foreground)
    supervisor = Supervisor(RunDir(arguments.run_dir), arguments.began, stops)
    return await supervisor.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="biphase-supervisor", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--lock-fd", type=int, required=True, help="the descriptor that holds the deployment's lock")
    parser.add_argument("--began", type=float, required=True, help="time.monotonic() when `biphase serve` began")
    parser.add_argument("--foreground", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args()
    os.set_inheritable(arguments.lock_fd, False)
    set_up_logging(RunDir(arguments.run_dir).supervisor_log)
    _adopt_orphans()
    code = asyncio.run(_main(arguments))
    reap_orphans()
    return code


if __name__ == "__main__":
    sys.exit(main())
