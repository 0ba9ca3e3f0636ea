"""Things that end together: nobody leaves before the last has ended, whatever happens meanwhile."""

import asyncio
import gc

import pytest

from biphase.kvtransfer.together import together


class Part:
    """Waits to be told; when cancelled it ends only once it may."""

    def __init__(self) -> None:
        self.begun, self.go, self.may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.cancelled = self.ended = False

    async def run(self, result: int) -> int:
        self.begun.set()
        try:
            await self.go.wait()
            if result < 0:
                raise ValueError(f"part {result}")
            return result
        except asyncio.CancelledError:
            self.cancelled = True
            while not self.may_end.is_set():
                await self.may_end.wait()
            raise
        finally:
            self.ended = True


async def begun(*parts: Part) -> None:
    for part in parts:
        await part.begun.wait()


async def test_results_are_in_order() -> None:
    first, second = Part(), Part()
    running = asyncio.create_task(together([first.run(1), second.run(2)]))
    await begun(first, second)
    second.go.set()
    first.go.set()
    assert await running == [1, 2]


async def test_the_first_failure_cancels_the_others_and_waits_for_them() -> None:
    first, second = Part(), Part()
    running = asyncio.create_task(together([first.run(-1), second.run(2)]))
    await begun(first, second)
    first.go.set()
    while not second.cancelled:
        await asyncio.sleep(0)
    await asyncio.wait({running}, timeout=0.02)
    assert not running.done()
    second.may_end.set()
    with pytest.raises(ValueError, match="part -1"):
        await running
    assert second.ended


async def test_a_second_failure_is_not_told_as_an_error_of_ours() -> None:
    """Where a ticket is revoked every rank of a pull fails: asyncio would log each of them with its stack."""
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    parts = [Part() for _ in range(3)]
    running = asyncio.create_task(together([part.run(-1) for part in parts]))
    await begun(*parts)
    for part in parts:
        part.go.set()
    with pytest.raises(ValueError, match="part -1"):
        await running
    del running
    await asyncio.sleep(0)  # the loop has it until then
    gc.collect()
    assert not told


async def test_cancelled_over_and_over_it_still_waits_for_all() -> None:
    first, second = Part(), Part()
    running = asyncio.create_task(together([first.run(1), second.run(2)]))
    await begun(first, second)
    for _ in range(3):
        running.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    assert first.cancelled and second.cancelled and not running.done()
    first.may_end.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert first.ended and not running.done()
    second.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert second.ended


async def test_one_part_needs_no_task() -> None:
    only = Part()
    only.go.set()
    assert await together([only.run(3)]) == [3]
