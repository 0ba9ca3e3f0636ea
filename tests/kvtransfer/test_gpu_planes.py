"""Data planes between two processes on GPUs: CUDA IPC on one, nccl between two. For scripts/gpu_check.sh, so no plugins."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch
from support.payload_peer import fetch_all, serving_peer

from biphase.kvtransfer.cuda_ipc.plane import CudaIpcPlane
from biphase.kvtransfer.pair_groups.plane import DistPlane
from biphase.kvtransfer.wire import DataPlane

pytestmark = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl wants a GPU for each end")

CUDA_IPC = ("biphase.kvtransfer.cuda_ipc.plane:CudaIpcPlane", "device=cuda")
NCCL = ("biphase.kvtransfer.pair_groups.plane:DistPlane", "host=127.0.0.1", "device=cuda:1")
SIZES = (1, 4096, 100_001, 4 << 20) * 4


def nccl() -> DistPlane:
    return DistPlane("127.0.0.1", device="cuda:0", patience_s=60.0)


def run(make: Callable[[], DataPlane], body: Callable[[DataPlane], Awaitable[None]]) -> None:
    async def whole() -> None:
        plane = make()
        try:
            await body(plane)
        finally:
            await plane.close()

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        pytest.param(lambda: CudaIpcPlane("cuda"), CUDA_IPC, id="cuda_ipc", marks=on_gpu),
        pytest.param(nccl, NCCL, id="nccl", marks=on_two),
    ],
)
def test_pulls_side_by_side(make: Callable[[], DataPlane], theirs: tuple[str, ...]) -> None:
    with serving_peer(*theirs) as peer:

        async def one(plane: DataPlane, number: int) -> None:
            payloads = [(100 * number + at, size) for at, size in enumerate(SIZES)]
            async with peer.pull(plane, payloads=payloads) as pull:
                await fetch_all(pull, len(payloads))

        async def body(plane: DataPlane) -> None:
            await asyncio.gather(*(one(plane, number) for number in range(4)))

        run(make, body)


@on_gpu
def test_a_slot_that_was_void_before_it_was_read() -> None:
    with serving_peer(*CUDA_IPC) as peer:

        async def body(plane: DataPlane) -> None:
            async with peer.pull(plane, payloads=[(1, 4096)] * 3, close_after=3) as pull:
                references = [await pull.reference() for _ in range(3)]
                with pytest.raises(ConnectionError, match="LEASE_EXPIRED"):
                    await pull.reference()
                for reference, _, size in references:
                    await pull.receiver.fetch(reference, size)
                    assert not pull.receiver.intact(reference)

        run(lambda: CudaIpcPlane("cuda"), body)


@on_two
def test_a_peer_that_dies_costs_its_pair_within_the_deadline() -> None:
    with serving_peer(*NCCL) as peer:

        async def body(plane: DataPlane) -> None:
            async with peer.pull(plane, payloads=[(1, 4 << 20)] * 2) as pull:
                await fetch_all(pull, 1)
                reference, _, size = await pull.reference()
                peer.process.kill()
                peer.process.wait()
                with pytest.raises(ConnectionError):
                    async with asyncio.timeout(10):
                        while True:  # what was in nccl's own buffers may still come
                            await pull.receiver.fetch(reference, size)
                            reference, _, size = await pull.reference()

        run(lambda: DistPlane("127.0.0.1", device="cuda:0", patience_s=60.0, deadline_s=2.0), body)
