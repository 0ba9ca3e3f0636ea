"""A handoff between two pools on devices (kernels interpreted where there is none): packed, summed and written by kernels."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.kv import FIRST_TOKEN, LAYOUT, make_signature, prefill_side, tokens_of
from support.kv_tampering import tampering_proxy

from biphase.kernels.kv_layout import KvLayout
from biphase.kvtransfer.frames import FrameKind
from biphase.kvtransfer.puller import KvPuller
from biphase.protos.ids import BlockId

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from biphase.kernels.kv_pack.gpu_memory import GpuKvMemory

BLOCKS = [BlockId(block) for block in (9, 3, 0)]
NUM_TOKENS = 35


def on_device(pool: np.ndarray[Any, Any], layout: KvLayout) -> GpuKvMemory:
    return GpuKvMemory(torch.from_numpy(pool).to("cuda" if torch.cuda.is_available() else "cpu"), layout)


def swap_heads_once(number: int, received: Sequence[bytes]) -> list[bytes]:
    """The two heads of the first piece exchanged, which ``[layer][K,V][head]...`` has next to each other."""
    changed = list(received)
    if number == 0:
        at = next(index for index, frame in enumerate(received) if frame[4] == FrameKind.PIECE)
        header, payload = received[at][:64], np.frombuffer(received[at][64:], np.uint8)
        changed[at] = header + payload.reshape(LAYOUT.num_layers, 2, 2, -1)[:, :, ::-1].tobytes()
    return changed


async def test_kernels_pack_sum_and_write() -> None:
    assert LAYOUT.num_kv_heads == 2
    pool = torch.full(LAYOUT.pool_shape(16), torch.nan)
    memory = on_device(pool.numpy(), LAYOUT)
    puller = KvPuller(memory=memory, signature=make_signature("decode-0", content_digest=memory.content_digest))
    async with prefill_side(memory=on_device, num_blocks=16, max_message_bytes=256 << 10) as prefill:
        assert prefill.signature.digests[0] == "xxh3-sum64"
        async with tampering_proxy(prefill.address, swap_heads_once) as proxy, asyncio.timeout(60):
            ticket = replace(prefill.open(NUM_TOKENS), kv_address=proxy.address)
            result = await puller.pull(ticket, 1, BLOCKS, timeout_s=30)
    await puller.close()
    received = memory._pool.cpu().numpy()
    assert np.array_equal(tokens_of(received, BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
    assert np.isnan(np.delete(received, BLOCKS, axis=1)).all()
    assert (result.first_token, result.bytes) == (FIRST_TOKEN, NUM_TOKENS * LAYOUT.token_bytes)
    assert puller.counters()["bad_pieces"] == 1
