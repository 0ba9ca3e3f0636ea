"""A pool on the device is read and written by boxes as one in host memory is."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from biphase.kernels.kv_layout import KvBox, KvLayout, uniform_scales
from biphase.kernels.kv_pack import CpuKvMemory, KvMemory
from biphase.kernels.kv_pack.checksum import sum64
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kernels.kv_pack.gpu_memory import GpuKvMemory

NUM_BLOCKS = 6
LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=16, block_size=16, dtype="bfloat16")
BOX = KvBox(layer_start=0, layer_end=2, head_start=1, head_end=3, token_start=19, token_end=50)
BLOCKS = [9, 4, 0, 5]  # the first is not the box's, so never looked at


def both(layout: KvLayout, device: torch.device, *, fill: bool = True) -> tuple[KvMemory, KvMemory, Any, torch.Tensor]:
    """The same content in host memory and on the device."""
    size = int(np.prod(layout.pool_shape(NUM_BLOCKS))) * layout.itemsize
    content = np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8) if fill else np.zeros(size, np.uint8)
    host = content.view(f"u{layout.itemsize}").reshape(layout.pool_shape(NUM_BLOCKS))
    pool = torch.from_numpy(content.copy()).view(getattr(torch, layout.dtype)).view(layout.pool_shape(NUM_BLOCKS))
    pool = pool.to(device)
    return CpuKvMemory(host, layout), GpuKvMemory(pool, layout), host, pool


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_boxes_are_those_of_host_memory(dtype: str, device: torch.device) -> None:
    scales = uniform_scales(2, 3) if dtype == "float8_e4m3fn" else None
    layout = replace(LAYOUT, dtype=dtype, itemsize=0, kv_scales=scales)
    cpu, gpu, _, _ = both(layout, device)
    expected, packed = (bytearray(BOX.num_bytes(layout)) for _ in range(2))
    assert cpu.pack(BLOCKS, BOX, expected) is None
    assert gpu.pack(BLOCKS, BOX, packed) == sum64(expected)
    assert packed == expected
    cpu, gpu, host, pool = both(layout, device, fill=False)
    cpu.unpack(BLOCKS, BOX, bytes(packed))
    gpu.unpack(BLOCKS, BOX, memoryview(bytes(packed)))
    assert pool.view(torch.uint8).cpu().numpy().tobytes() == host.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("group_size", [16, 32])
def test_codecs_are_those_of_host_memory(codec: str, group_size: int, device: torch.device) -> None:
    """Bits and all; packed by either, unpacked by the other, into blocks of 16 from blocks of 16 or 32."""
    if device.type == "cuda" and codec == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 before capability 8.9")
    layout = replace(LAYOUT, block_size=group_size)
    values = torch.randn(layout.pool_shape(NUM_BLOCKS), generator=torch.Generator().manual_seed(4)).bfloat16()
    cpu = CpuKvMemory(values.view(torch.int16).numpy(), layout)
    gpu = GpuKvMemory(values.to(device), layout)
    expected, packed = (bytearray(packed_bytes(layout, BOX, codec)) for _ in range(2))
    assert cpu.pack([3, 4, 0, 5], BOX, expected, codec) is None
    assert gpu.pack([3, 4, 0, 5], BOX, packed, codec) == sum64(expected)
    assert packed == expected
    cpu, gpu, host, pool = both(LAYOUT, device, fill=False)
    cpu.unpack(BLOCKS, BOX, bytes(packed), codec, group_size)
    gpu.unpack(BLOCKS, BOX, bytes(packed), codec, group_size)
    assert pool.view(torch.uint8).cpu().numpy().tobytes() == host.tobytes()


def test_a_larger_box_after_a_smaller_and_an_empty_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biphase.kernels.kv_pack.gpu_memory._LEAST_STAGING", 64)
    cpu, gpu, _, _ = both(LAYOUT, device)
    for end in (19, 20, 50, 33):
        box = replace(BOX, token_end=end)
        expected, packed = (bytearray(box.num_bytes(LAYOUT)) for _ in range(2))
        cpu.pack(BLOCKS, box, expected)
        assert gpu.pack(BLOCKS, box, packed) == sum64(expected)
        assert packed == expected


def test_threads_take_turns(device: torch.device) -> None:
    """One packs, one writes other blocks: each of both directions, as two pulls of an instance may."""
    cpu, gpu, _, _ = both(LAYOUT, device)
    expected = bytearray(BOX.num_bytes(LAYOUT))
    cpu.pack(BLOCKS, BOX, expected)
    box = replace(BOX, token_start=0, token_end=4)
    data = bytes(range(256)) * (box.num_bytes(LAYOUT) // 256)
    wrong = []

    def pack() -> None:
        packed = bytearray(len(expected))
        if gpu.pack(BLOCKS, BOX, packed) != sum64(expected) or packed != expected:
            wrong.append("packed")

    def write(block: int) -> None:
        gpu.unpack([block], box, data)
        packed = bytearray(len(data))
        gpu.pack([block], box, packed)
        if packed != data:
            wrong.append("written")

    threads = [threading.Thread(target=pack) for _ in range(2)]
    threads += [threading.Thread(target=write, args=(block,)) for block in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_staging_made_under_inference_mode_serves_outside_of_it(device: torch.device) -> None:
    """As the engine's warm-up and the event loop share it; torch refuses to write inference tensors anywhere else."""
    cpu, gpu, host, pool = both(LAYOUT, device)
    expected, packed = (bytearray(BOX.num_bytes(LAYOUT)) for _ in range(2))
    cpu.pack(BLOCKS, BOX, expected)
    with torch.inference_mode():
        gpu.pack(BLOCKS, BOX, packed)
        gpu.unpack(BLOCKS, BOX, packed)
    assert gpu.pack(BLOCKS, BOX, packed) == sum64(expected)
    assert packed == expected
    gpu.unpack(BLOCKS, BOX, packed)
    assert pool.view(torch.uint8).cpu().numpy().tobytes() == host.tobytes()


def test_what_is_pending_is_asked_for_at_each_pack(device: torch.device) -> None:
    pool = torch.zeros(LAYOUT.pool_shape(NUM_BLOCKS), dtype=torch.bfloat16, device=device)
    asked = []

    class Pending:
        @property
        def of_device(self) -> Any:
            if device.type != "cuda":
                return None
            event = torch.cuda.Event()
            event.record()
            return event

    memory = GpuKvMemory(pool, LAYOUT, after=lambda: asked.append(1) or Pending())
    box = replace(BOX, token_start=0, token_end=1)
    for number in (1, 2):
        pool.fill_(number)
        packed = bytearray(box.num_bytes(LAYOUT))
        memory.pack([0], box, packed)
        assert torch.frombuffer(packed, dtype=torch.bfloat16).eq(number).all()
        assert len(asked) == number


@pytest.mark.gpu
def test_packing_waits_for_the_engines_stream(device: torch.device) -> None:
    """The pool is written behind a long wait on the engine's stream; pack returns what that has written."""
    if device.type != "cuda":
        pytest.skip("no GPU: its streams are what this is about")
    pool = torch.zeros(LAYOUT.pool_shape(NUM_BLOCKS), dtype=torch.bfloat16, device=device)
    engine, event = torch.cuda.Stream(), torch.cuda.Event()
    memory = GpuKvMemory(pool, LAYOUT, after=lambda: event)
    with torch.cuda.stream(engine):
        torch.cuda._sleep(200_000_000)
        pool.fill_(7)
        event.record()
    packed = bytearray(BOX.num_bytes(LAYOUT))
    memory.pack(BLOCKS, BOX, packed)
    assert torch.frombuffer(packed, dtype=torch.bfloat16).eq(7).all()


@pytest.mark.parametrize(
    ("blocks", "size", "message"),
    [
        ([0], 0, "lies outside 1 blocks"),
        ([0, 1, 2, 3], -2, "a buffer of"),
        ([0, 1, 6, 3], 0, "block 6 is none of the pool's 6"),
        ([0, 1, -1, 3], 0, "block -1 is none of the pool's 6"),
    ],
)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_what_does_not_fit_is_refused(
    direction: str, blocks: list[int], size: int, message: str, device: torch.device
) -> None:
    _, gpu, _, _ = both(LAYOUT, device)
    with pytest.raises(ValueError, match=message):
        getattr(gpu, direction)(blocks, BOX, bytearray(BOX.num_bytes(LAYOUT) + size))


def test_a_pool_that_is_not_the_layouts_is_refused(device: torch.device) -> None:
    pool = torch.zeros(LAYOUT.pool_shape(NUM_BLOCKS), dtype=torch.bfloat16, device=device)
    for wrong, message in (
        (pool[:1], "does not fit"),
        (pool.half(), "the pool's dtype is float16, the layout's bfloat16"),
        (pool.transpose(3, 5), "does not fit|not contiguous"),
        (pool.repeat(1, 2, 1, 1, 1, 1)[:, ::2], "not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            GpuKvMemory(wrong, LAYOUT)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_buffer_on_the_device_never_comes_to_the_host(codec: str, device: torch.device) -> None:
    _, gpu, _, _ = both(LAYOUT, device)
    size = packed_bytes(LAYOUT, BOX, codec)
    expected, packed = bytearray(size), torch.zeros(size + 16, dtype=torch.uint8, device=device)[16:]
    total = gpu.pack(BLOCKS, BOX, expected, codec)
    assert gpu.pack(BLOCKS, BOX, packed, codec) == total
    assert packed.cpu().numpy().tobytes() == expected
    _, through_host, _, expected_pool = both(LAYOUT, device, fill=False)
    _, on_device, _, pool = both(LAYOUT, device, fill=False)
    assert through_host.unpack(BLOCKS, BOX, bytes(expected), codec) is None
    assert on_device.unpack(BLOCKS, BOX, packed, codec) == total
    assert torch.equal(pool.view(torch.uint8), expected_pool.view(torch.uint8))
    with pytest.raises(ValueError, match=f"a buffer of {size - 1} torch.uint8 for a box of {size} bytes"):
        on_device.unpack(BLOCKS, BOX, packed[1:], codec)
