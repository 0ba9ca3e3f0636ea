"""Whole pulls whose payloads go over pair groups or NIXL: what tcp and shm hold themselves to, and faults on top."""

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.kv_wires import Reader, check_pull, order_of, wired_prefill

from biphase.kvtransfer.faults import KINDS, FaultInjector, FaultPlan
from biphase.kvtransfer.frames import FrameError
from biphase.kvtransfer.nixl.library import why_not
from biphase.kvtransfer.nixl.plane import NixlPlane
from biphase.kvtransfer.pair_groups.plane import DistPlane
from biphase.kvtransfer.wire import Arrival, DataPlane, PullOrder, SourceUnreachable

NUM_TOKENS = 500
NewPlane = Callable[[], DataPlane]


def dist() -> DataPlane:
    torch.set_num_threads(1)
    return DistPlane("127.0.0.1", patience_s=10.0)


def nixl() -> DataPlane:
    return NixlPlane("127.0.0.1", num_slots=8, slot_bytes=1 << 20)


PLANES = [
    pytest.param(dist, id="dist"),
    pytest.param(nixl, id="nixl", marks=pytest.mark.skipif(why_not() is not None, reason=why_not() or "")),
]


@pytest.mark.parametrize("plane", PLANES)
async def test_all_of_a_request_arrives(plane: NewPlane) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        await asyncio.gather(*(check_pull(prefill, source, NUM_TOKENS) for _ in range(12)))
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_what_a_reader_leaves_is_skipped(plane: NewPlane) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        for _ in range(3):
            reader = Reader(leave=frozenset({0, 3, 4}))
            await reader.read(source, order_of(prefill.side.open(NUM_TOKENS)))
            assert reader.num_left == 3
        await check_pull(prefill, source, NUM_TOKENS)
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_a_pull_that_was_broken_off_leaves_others_alone(plane: NewPlane) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        for after in (0, 1, 5):
            stream = source.pull(order_of(prefill.side.open(NUM_TOKENS)))
            for _ in range(after):
                await anext(stream)
            stream.break_off("enough")
        await check_pull(prefill, source, NUM_TOKENS)
        await source.close()


class _Patient(Reader):
    """Counts a frame that is not what it should be, and goes on."""

    num_bad = 0

    async def take(self, arrival: Arrival, order: PullOrder) -> None:
        try:
            await super().take(arrival, order)
        except FrameError:
            self.num_bad += 1


@pytest.mark.parametrize("plane", PLANES)
async def test_pulls_under_faults(plane: NewPlane) -> None:
    """Seeded, 16 at a time: none brings a wrong byte, all end, and nothing stands in the way of the last."""
    injector = FaultInjector(FaultPlan.parse("all=0.03,delay=0.03:5ms,stall=0.01:100ms,seed=11"))
    ends: Counter[str] = Counter()
    async with wired_prefill(plane) as prefill:
        prefill.side.service._wrap_sink = injector.wrap
        source = prefill.source()
        slots = asyncio.Semaphore(16)

        async def one() -> None:
            async with slots:
                ticket, reader = prefill.side.open(128), _Patient()
                try:
                    async with asyncio.timeout(30):
                        await reader.read(source, order_of(ticket))
                    ends["whole" if not np.isnan(reader.content(128)).any() else "part"] += 1
                except SourceUnreachable:
                    ends["unreachable"] += 1
                content, expected = reader.content(128), prefill.side.content(128)
                assert np.array_equal(content[~np.isnan(content)], expected[~np.isnan(content)])

        await asyncio.gather(*(one() for _ in range(150)))
        injector.plan = FaultPlan.parse("seed=1")
        await check_pull(prefill, source, NUM_TOKENS)
        await source.close()
    assert all(injector.counts[kind] >= 5 for kind in KINDS), injector.counts
    assert all(ends[end] >= 5 for end in ("whole", "part", "unreachable")), ends
