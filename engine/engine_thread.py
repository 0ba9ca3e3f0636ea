"""The one thread that runs torch. The asyncio loop hands it a plan and awaits the result; nothing else is shared."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.step import StepPlan, StepResult
from biphase.protos.errors import Internal


class EngineThread:
    """Owned by a worker's shell. An error of a call is raised where it is awaited; the thread lives on."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    async def load(self, progress: Progress) -> Engine:
        """Load the model in the engine thread; ``progress`` is called in this loop. Raises SetupError."""
        loop = asyncio.get_running_loop()

        def load() -> Engine:
            self._engine = Engine.load(self._config, lambda detail, done: _call_in(loop, progress, detail, done))
            return self._engine

        engine: Engine = await self._submit(load)
        return engine

    async def run(self, plan: StepPlan) -> StepResult:
        """Execute one step. A cancelled await does not stop a step that is running."""
        engine = self._engine
        if engine is None:
            raise Internal("a step was asked for before the engine was loaded")
        result: StepResult = await self._submit(lambda: engine.execute(plan))
        return result

    async def close(self) -> None:
        """End the thread after the calls that were made; returns when it has ended."""
        self._calls.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def _submit(self, call: Callable[[], Any]) -> Any:
        if not self._thread.is_alive():
            raise Internal("the engine thread has ended")
        done: Future[Any] = Future()
        self._calls.put((call, done))
        return await asyncio.wrap_future(done)

    def _main(self) -> None:
        while (item := self._calls.get()) is not None:
            call, done = item
            if not done.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - the caller hears of it, and the thread serves the next call
                done.set_exception(error)
            else:
                done.set_result(result)
            del item, call, done


def _call_in(loop: asyncio.AbstractEventLoop, progress: Progress, detail: str, done: float) -> None:
    try:
        loop.call_soon_threadsafe(progress, detail, done)
    except RuntimeError:
        pass  # the loop has been closed: nobody watches any more
