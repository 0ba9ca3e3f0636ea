"""A reader of staging slots in a process of its own, to be stopped in mid-read. Run as a program it is that reader.

It reads answers and references from its standard input (msgpack, hex, a line each) and says ``reading``, and then what
came of it: ``right``, ``wrong`` or ``void``.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil

from biphase.kvtransfer.wire import DataPlane

COUNT = 48 << 20
"""Bytes of a payload: reading that takes long beside stopping a process."""

_OLD, _NEW = 0x11, 0xEE


class SlotReader:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def overtaken(self, plane: DataPlane) -> str:
        """Show it a payload, stop it while it reads, end the pull, write the slot anew, let it go on."""
        sender = await plane.sender(await self._hello(), "the reader")
        room = await sender.room(COUNT)
        np.frombuffer(room.payload, np.uint8)[:] = _OLD
        reference = await sender.send(room)
        del room
        await self._say({"answer": sender.answer, "reference": reference})
        assert await self._line() == "reading"
        os.kill(self._process.pid, signal.SIGSTOP)
        while psutil.Process(self._process.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0)
        sender.close()
        other = await plane.sender(b"" if plane.name == "nixl" else await self._hello(), "another")
        room = await other.room(COUNT)
        np.frombuffer(room.payload, np.uint8)[:] = _NEW
        await other.send(room)
        os.kill(self._process.pid, signal.SIGCONT)
        outcome = await self._line()
        del room
        other.close()
        return outcome

    async def _hello(self) -> bytes:
        await self._say({})
        return bytes.fromhex(await self._line())

    async def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgpack.packb(message).hex().encode() + b"\n")
        await self._process.stdin.drain()

    async def _line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def slot_reader(plane: str, *arguments: str) -> AsyncIterator[SlotReader]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.slot_reader",
        plane,
        "host=127.0.0.1",
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))),
        },
    )
    try:
        yield SlotReader(process)
    finally:
        process.kill()
        await process.wait()


async def _read(plane: DataPlane) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        message = msgpack.unpackb(bytes.fromhex(line))
        receiver = await plane.receiver("the source")
        if "answer" not in message:
            print(receiver.hello.hex(), flush=True)
            receiver.close()
            continue
        await receiver.start(message["answer"])
        print("reading", flush=True)
        payload = np.frombuffer(await receiver.fetch(message["reference"], COUNT), np.uint8).copy()
        intact = receiver.intact(message["reference"])
        print("void" if not intact else "right" if bool((payload == _OLD).all()) else "wrong", flush=True)
        receiver.done(message["reference"])
        receiver.close()


async def _main() -> None:
    from support.payload_peer import make_plane

    plane = make_plane(sys.argv[1], sys.argv[2:])
    await _read(plane)
    await plane.close()


if __name__ == "__main__":
    asyncio.run(_main())
