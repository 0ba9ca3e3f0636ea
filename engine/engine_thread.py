"""The one thread that runs torch. The asyncio loop hands it a plan and awaits the result; nothing else is shared.

Where an engine's launch returns before its step is over, a second thread waits for the steps, in order: the engine
thread is free to launch the next one meanwhile. It calls PendingStep.wait and nothing else.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.step import DoneStep, PendingStep, StepPlan, StepResult
from biphase.protos.errors import Internal


class EngineThread:
    """Owned by a worker's shell. An error of a call is raised where it is awaited; the thread lives on."""

    def __init__(self, config: EngineConfig, load: Callable[[EngineConfig, Progress], Engine] = Engine.load) -> None:
        self._config = config
        self._load = load
        self._engine: Engine | None = None
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._pending: SimpleQueue[tuple[PendingStep, Future[StepResult]] | None] = SimpleQueue()
        self._completions: threading.Thread | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    @property
    def pipeline_depth(self) -> int:
        """How many steps may be launched and not over; 1 before the engine is loaded."""
        return 1 if self._engine is None else self._engine.pipeline_depth

    async def load(self, progress: Progress) -> Engine:
        """Load the model in the engine thread; ``progress`` is called in this loop. Raises SetupError."""
        loop = asyncio.get_running_loop()
        done: Future[Engine] = Future()

        def load() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                self._engine = self._load(self._config, lambda detail, share: _call_in(loop, progress, detail, share))
            except BaseException as error:  # noqa: BLE001 - the caller hears of it, and the thread can be closed
                done.set_exception(error)
            else:
                done.set_result(self._engine)

        self._submit(load, done)
        return await asyncio.wrap_future(done)

    def launch(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Begin one step after those launched before. Never raises, the future does.

        To cancel the future does not stop a step that is running.
        """
        return asyncio.wrap_future(self.begin(plan))

    def begin(self, plan: StepPlan) -> Future[StepResult]:
        """As ``launch``, from any thread; the future's callbacks run in one of the threads here."""
        done: Future[StepResult] = Future()
        engine = self._engine
        if engine is None:
            done.set_exception(Internal("a step was asked for before the engine was loaded"))
        else:
            self._submit(lambda: self._launch(engine, plan, done), done)
        return done

    async def run(self, plan: StepPlan) -> StepResult:
        """Execute one step."""
        return await self.launch(plan)

    async def close(self, within_s: float | None = None) -> bool:
        """End the threads after the calls that were made; returns when they have ended, False when the time was up."""
        self._calls.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, within_s)
        return not self._thread.is_alive()

    def _submit(self, call: Callable[[], None], done: Future[Any]) -> None:
        if self._thread.is_alive():
            self._calls.put(call)
        else:
            done.set_exception(Internal("the engine thread has ended"))

    def _launch(self, engine: Engine, plan: StepPlan, done: Future[StepResult]) -> None:
        """In the engine thread."""
        if not done.set_running_or_notify_cancel():
            return
        try:
            pending = engine.launch(plan)
        except BaseException as error:  # noqa: BLE001 - the caller hears of it, and the thread serves the next call
            done.set_exception(error)
            return
        if isinstance(pending, DoneStep):
            done.set_result(pending.result)
            return
        if self._completions is None:
            self._completions = threading.Thread(target=self._complete, name="completions", daemon=True)
            self._completions.start()
        self._pending.put((pending, done))

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
        if self._completions is not None:
            self._pending.put(None)
            self._completions.join()

    def _complete(self) -> None:
        """The completions thread."""
        while (item := self._pending.get()) is not None:
            pending, done = item
            try:
                result = pending.wait()
            except BaseException as error:  # noqa: BLE001 - as in the engine thread
                done.set_exception(error)
            else:
                done.set_result(result)
            del item, pending, done


def _call_in(loop: asyncio.AbstractEventLoop, progress: Progress, detail: str, done: float) -> None:
    try:
        loop.call_soon_threadsafe(progress, detail, done)
    except RuntimeError:
        pass  # the loop has been closed: nobody watches any more
