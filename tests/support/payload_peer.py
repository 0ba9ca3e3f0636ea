"""A data plane at work without a wire: the serving end in a process of its own, references over a plain connection.

The peer serves seeded payloads: ``payload_bytes(seed, size)`` at both ends. What it does is told by the pull's first line;
it runs until its standard input is closed. Run as a program it is the peer itself.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from biphase.kvtransfer.wire import DataPlane, PayloadReceiver


def payload_bytes(seed: int, num_bytes: int) -> bytes:
    return np.random.Generator(np.random.PCG64(seed)).bytes(num_bytes)


def as_bytes(payload: Any) -> bytes:
    """Of a buffer or a tensor."""
    return bytes(payload.cpu().numpy()) if hasattr(payload, "cpu") else bytes(payload)


def fill(payload: Any, data: bytes) -> None:
    if not hasattr(payload, "cpu"):
        payload[:] = data
        return
    import torch

    payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    torch.cuda.synchronize()


async def write(writer: asyncio.StreamWriter, message: Any) -> None:
    data = msgpack.packb(message)
    writer.write(len(data).to_bytes(4, "little") + data)
    await writer.drain()


async def read(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgpack.unpackb(await reader.readexactly(size))


class Pull:
    """The reading end of one pull."""

    def __init__(self, plane: DataPlane, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.plane = plane
        self._reader = reader
        self._writer = writer
        self._receiver: PayloadReceiver | None = None

    async def begin(self, peer: str, **order: Any) -> None:
        """``order``: seeds and sizes to send; ``close_after`` references the sender closes its pull."""
        receiver = self._receiver = await self.plane.receiver(peer)
        await write(self._writer, {"hello": receiver.hello, **order})
        answer = await read(self._reader)
        if "error" in answer:
            raise ConnectionError(answer["error"])
        await receiver.start(answer["answer"])

    @property
    def receiver(self) -> PayloadReceiver:
        assert self._receiver is not None
        return self._receiver

    async def reference(self) -> tuple[bytes, int, int]:
        """Reference, seed and size of the next payload. Raises ConnectionError with the sender's words."""
        message = await read(self._reader)
        if "error" in message:
            raise ConnectionError(message["error"])
        return message["reference"], message["seed"], message["size"]

    async def done(self, reference: bytes) -> None:
        self.receiver.done(reference)
        await write(self._writer, {"taken": reference})

    def close(self) -> None:
        """Idempotent."""
        if not self._writer.is_closing():
            self._writer.close()
            if self._receiver is not None:
                self._receiver.close()


class Peer:
    """A process that serves, and how to reach it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"
        self._port = port

    async def stop(self) -> None:
        """Returns when no thread of it runs any more."""
        import psutil  # not on every machine that lends a GPU

        self.process.send_signal(signal.SIGSTOP)
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.001)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @asynccontextmanager
    async def pull(self, plane: DataPlane, **order: Any) -> AsyncIterator[Pull]:
        pull = Pull(plane, *await asyncio.open_connection("127.0.0.1", self._port))
        try:
            await pull.begin(self.address, **order)
            yield pull
        finally:
            pull.close()


@contextmanager
def serving_peer(plane: str, *arguments: str) -> Iterator[Peer]:
    """``plane``: as ``module:Class``, made with ``arguments`` (name=value, as numbers where they are)."""
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.payload_peer", plane, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(tests), os.environ.get("PYTHONPATH", ""))),
            "OMP_NUM_THREADS": "1",
        },
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Peer(process, int(process.stdout.readline()))
            process.stdin.close()
            code = process.wait(20)
            assert code in (0, -signal.SIGKILL), f"the peer has ended with code {code}"
        finally:
            process.kill()


async def fetch_all(pull: Pull, count: int) -> None:
    """Take ``count`` payloads, each compared."""
    for _ in range(count):
        reference, seed, size = await pull.reference()
        payload = await pull.receiver.fetch(reference, size)
        assert as_bytes(payload) == payload_bytes(seed, size)
        assert pull.receiver.intact(reference)
        await pull.done(reference)


# The peer itself.


async def _serve_pull(plane: DataPlane, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    order = await read(reader)
    try:
        sender = await plane.sender(order["hello"], "the test")
    except ConnectionError as error:
        await write(writer, {"error": str(error)})
        writer.close()
        return
    await write(writer, {"answer": sender.answer})

    async def hear() -> None:
        try:
            while True:
                sender.taken((await read(reader))["taken"])
        except (asyncio.IncompleteReadError, ConnectionError):
            sender.close()

    hearing = asyncio.ensure_future(hear())
    try:
        for number, (seed, size) in enumerate(order["payloads"], 1):
            room = await sender.room(size)
            if seed is not None:  # else whatever lies there: for measuring
                fill(room.payload, payload_bytes(seed, size))
            reference = await sender.send(room)
            del room
            if number not in order.get("silent", ()):
                await write(writer, {"reference": reference, "seed": seed, "size": size})
            if number == order.get("close_after"):
                sender.close()
                await write(writer, {"error": "LEASE_EXPIRED"})
                break
        else:
            await hearing  # until the reader closes
    except (ConnectionError, OSError) as error:
        with suppress(ConnectionError, OSError):
            await write(writer, {"error": str(error)})
    finally:
        hearing.cancel()
        sender.close()
        writer.close()


async def _main(make: Callable[[], DataPlane]) -> None:
    plane = make()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            await _serve_pull(plane, reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    closed: Awaitable[Any] = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await closed
    server.close()
    await plane.close()


def make_plane(where: str, arguments: list[str]) -> DataPlane:
    import importlib

    def value(text: str) -> Any:
        return (
            float(text) if "." in text and text.replace(".", "", 1).isdigit() else int(text) if text.isdigit() else text
        )

    module, name = where.split(":")
    made: DataPlane = getattr(importlib.import_module(module), name)(
        **{key: value(text) for key, text in (argument.split("=") for argument in arguments)}
    )
    return made


if __name__ == "__main__":
    asyncio.run(_main(lambda: make_plane(sys.argv[1], sys.argv[2:])))
