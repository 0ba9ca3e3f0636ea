"""Lives that end while the controller writes down what it is about to do with them."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_backend import FakeBackend, FakeHandle, controller_over

from biphase.cluster.backend import STATE
from biphase.cluster.controller_state import ControllerState, SlotState
from biphase.cluster.deployment import Deployment

NAMES = ("prefill-0", "decode-0", "decode-1")
WITHIN_S = 10.0


class SlowBackend(FakeBackend):
    """Takes its time over a state of which ``slow`` is true. Kills reach nobody in time."""

    kill_patience_s = 0.0

    def __init__(self, slow: Callable[[ControllerState], bool]) -> None:
        super().__init__()
        self._slow = slow
        self.writes, self.go_on = asyncio.Event(), asyncio.Event()
        self.handles = {name: FakeHandle(name, name.partition("-")[0], 1, obeys=False) for name in NAMES}  # type: ignore[arg-type]
        self.living = list(self.handles.values())
        slots = {name: SlotState(kind=handle.kind, incarnation=1, life=1) for name, handle in self.handles.items()}
        self.kept[STATE] = ControllerState(was_ready=True, slots=slots).to_json()

    async def save_state(self, text: str, key: str = STATE) -> None:
        if key == STATE and self._slow(ControllerState.from_json(text)):
            self.writes.set()
            await self.go_on.wait()
        await super().save_state(text, key)


@pytest.mark.parametrize(
    ("slow", "kills"),
    [
        pytest.param(lambda state: "decode-0" in state.slots and state.slots["decode-0"].ending, 0, id="to be killed"),
        pytest.param(lambda state: "decode-0" not in state.slots, 1, id="to be given away"),
    ],
)
async def test_there_is_nothing_to_do_with_a_life_that_has_ended_meanwhile(
    tmp_path: Path, slow: Callable[[ControllerState], bool], kills: int
) -> None:
    backend = SlowBackend(slow)
    controller = controller_over(backend, tmp_path, Deployment(model="/models/a", name="x"))
    stop = asyncio.Event()
    run = asyncio.create_task(controller.run(stop))
    async with asyncio.timeout(WITHIN_S):
        while set(controller.lives) != set(NAMES):
            await asyncio.sleep(0)
        controller.core.slots["decode-0"].ending = "remove"
        controller.core.lost("decode-0", 1, "did not answer", controller.now_s())
        controller.changed()
        await backend.writes.wait()
        backend.handles["decode-0"].die("killed")
        while "decode-0" in controller.lives:
            await controller.status.wait()
        backend.go_on.set()
        controller.core.lost("decode-1", 1, "did not answer", controller.now_s())
        controller.changed()
        while not backend.handles["decode-1"].kills and not run.done():
            await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(run, WITHIN_S)
    assert backend.handles["decode-0"].kills == kills
    assert backend.handles["decode-1"].kills, "it goes on"
