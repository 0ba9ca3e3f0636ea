"""Staging slots in a GPU's memory: the plane's own part, in host memory. On a GPU: test_gpu_planes.py."""

import asyncio
import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.kv import FIRST_TOKEN, LAYOUT, make_signature, prefill_side, tokens_of

from biphase.kvtransfer.cuda_ipc.plane import CudaIpcPlane
from biphase.kvtransfer.tcp.server import TcpKvServer
from biphase.kvtransfer.tcp.source import TcpTransport


class HostDriver:
    """Host memory in place of a GPU's, for both ends in one process. ``held`` copies are over when they are let go."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.memories: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.opened: list[int] = []
        self.held = False

    def allocate(self, num_bytes: int) -> int:
        memory = ctypes.create_string_buffer(num_bytes)
        self.memories[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def handle(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def open(self, handle: bytes) -> int:
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def close(self, address: int) -> None:
        self.opened.remove(address)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address)))

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], bool]:
        def is_over() -> bool:
            if self.held:
                return False
            target.copy_(source)
            return True

        return is_over


def plane_of(driver: HostDriver, **arguments: float) -> CudaIpcPlane:
    sizes = {"num_slots": 2, "slot_bytes": 64, **arguments}
    return CudaIpcPlane("cpu", driver=driver, **sizes)  # type: ignore[arg-type]


async def test_a_slot_that_is_written_again_before_its_copy_is_over() -> None:
    driver = HostDriver()
    plane = plane_of(driver, num_slots=1)
    receiver = await plane.receiver("here")
    sender = await plane.sender(receiver.hello, "here")
    await receiver.start(sender.answer)
    room = await sender.room(64)
    room.payload.fill_(1)
    reference = await sender.send(room)
    del room
    assert bytes(await receiver.fetch(reference, 64)) == b"\1" * 64
    assert receiver.intact(reference)
    receiver.done(reference)
    driver.held = True
    fetching = asyncio.ensure_future(receiver.fetch(reference, 64))
    await asyncio.sleep(0)
    sender.close()
    other = await plane.sender(receiver.hello, "here")
    (await other.room(64)).payload.fill_(2)
    driver.held = False
    await fetching
    assert not receiver.intact(reference)
    receiver.close()
    assert len(driver.opened) == 1
    await plane.close()
    assert not driver.opened


async def test_a_copy_that_never_ends() -> None:
    driver = HostDriver()
    plane = plane_of(driver, wait_s=0.05)
    receiver = await plane.receiver("here")
    sender = await plane.sender(receiver.hello, "here")
    await receiver.start(sender.answer)
    reference = await sender.send(await sender.room(64))
    driver.held = True
    with pytest.raises(ConnectionError, match="a copy of 64 bytes took more than 0.05 s"):
        await receiver.fetch(reference, 64)
    fetching = asyncio.ensure_future(receiver.fetch(reference, 64))
    await asyncio.sleep(0)
    receiver.close()
    with pytest.raises(ConnectionError, match="the pull is closed"):
        await fetching
    await plane.close()


async def test_what_is_no_message_of_cuda_ipc_is_refused() -> None:
    plane = plane_of(HostDriver())
    with pytest.raises(ConnectionError, match="that cuda_ipc cannot read"):
        await plane.sender(b"\x80", "somebody")
    with pytest.raises(ConnectionError, match="is on host elsewhere"):
        await plane.sender(b"\x81\xa4host\xa9elsewhere", "somebody")
    receiver = await plane.receiver("somebody")
    with pytest.raises(ConnectionError, match="no description"):
        await receiver.start(b"\x80")
    await plane.close()


async def test_kernels_pack_into_slots_and_unpack_from_copies() -> None:
    """A whole handoff whose payloads are tensors: no piece comes to the host, sums are taken by the kernels."""
    pytest.importorskip("triton")
    from biphase.kernels.kv_layout import KvLayout
    from biphase.kernels.kv_pack.gpu_memory import GpuKvMemory
    from biphase.kvtransfer.pull_job import PullJob, PullPart, Route
    from biphase.kvtransfer.rank_pull import RankPuller
    from biphase.protos.ids import BlockId

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def on_device(pool: np.ndarray, layout: KvLayout) -> GpuKvMemory:
        return GpuKvMemory(torch.from_numpy(pool).to(device), layout)

    if device == "cuda":
        pytest.skip("a process cannot open its own memory by CUDA IPC")
    plane = plane_of(HostDriver(), num_slots=4, slot_bytes=1 << 20)
    blocks = [BlockId(block) for block in (9, 3, 0)]
    pool = torch.full(LAYOUT.pool_shape(16), torch.nan)
    memory = GpuKvMemory(pool, LAYOUT)
    signature = make_signature("decode-0", content_digest="sum64")
    async with prefill_side(memory=on_device, num_blocks=16, max_message_bytes=256 << 10) as prefill:
        server = TcpKvServer(prefill.service, [plane])
        address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        puller = RankPuller(memory, [TcpTransport(plane)])
        ticket = prefill.open(35)
        job = PullJob(
            ticket=ticket.id,
            epoch=1,
            instance="prefill-0",
            incarnation=1,
            blocks=tuple(blocks),
            codec="raw",
            digest=signature.digests[0],
            group_size=LAYOUT.block_size,
            timeout_s=60.0,
            beside_decode=False,
            parts=(
                PullPart(
                    source_rank=0,
                    box=LAYOUT.box(35),
                    with_trailer=True,
                    routes=(Route(transport="cuda_ipc", address=address),),
                ),
            ),
        )
        pulled = await puller.pull(job)
        assert pulled.trailer is not None and pulled.trailer.first_token == FIRST_TOKEN
        assert pulled.bytes_by_transport == {"cuda_ipc": 35 * LAYOUT.token_bytes}
        assert np.array_equal(tokens_of(pool.numpy(), blocks, 35), prefill.content(35))
        await puller.close()
        await server.stop()
    await plane.close()
