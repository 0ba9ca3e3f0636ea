"""How long this machine takes to pack and unpack KV, measured on an instance's own pool before it serves."""

import time
from collections.abc import Sequence

from biphase.kernels.kv_pack import KvMemory
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kvtransfer.codec_choice import RAW, CodecTimes

_MOST_BYTES = 1 << 20
_ROUNDS = 3


def speakable(dtype: str) -> tuple[str, ...]:
    """The codecs that a pool of this dtype can be packed by, raw first: what a signature offers."""
    return (RAW,) if dtype == "float8_e4m3fn" else (RAW, *CODECS)


def measure(memory: KvMemory, codecs: Sequence[str] | None = None) -> dict[str, CodecTimes]:
    """The best of a few rounds over about 1 MiB of raw KV in the pool's first blocks.

    Writes them: to be called while every block is free. On a GPU it also compiles what a transfer will need.
    """
    layout = memory.layout
    num_blocks = max(1, min(memory.num_blocks, _MOST_BYTES // layout.block_bytes))
    box, blocks = layout.box(num_blocks * layout.block_size), range(num_blocks)
    raw_bytes = box.num_bytes(layout)
    found = {}
    for codec in speakable(layout.dtype) if codecs is None else codecs:
        buffer = bytearray(packed_bytes(layout, box, codec))
        pack_s = min(_seconds(lambda: memory.pack(blocks, box, buffer, codec)) for _ in range(_ROUNDS))  # noqa: B023
        unpack_s = min(_seconds(lambda: memory.unpack(blocks, box, buffer, codec)) for _ in range(_ROUNDS))  # noqa: B023
        found[codec] = CodecTimes(pack=pack_s / raw_bytes, unpack=unpack_s / raw_bytes)
    return found


def _seconds(call: object) -> float:
    assert callable(call)
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s
