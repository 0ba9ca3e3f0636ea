"""A handshake over gRPC with a source that is slow to greet, and with one that is not there."""

import asyncio
import socket
from contextlib import suppress

import pytest
from support.kv import make_signature, prefill_side

from biphase.kvtransfer.grpc_transport import GrpcSource
from biphase.kvtransfer.wire import SourceUnreachable

SLOW_S = 0.4


async def test_a_source_that_is_slow_to_greet_is_waited_for() -> None:
    slow = [True]
    served: set[asyncio.Task[None] | None] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
            writer.write_eof()

    async with prefill_side() as prefill:
        host, _, port = prefill.address.rpartition(":")

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.add(asyncio.current_task())
            if slow:
                slow.clear()
                await asyncio.sleep(SLOW_S)  # what an instance hard at work may take
            to_reader, to_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))
            for each in (writer, to_writer):
                each.close()
                with suppress(OSError):
                    await each.wait_closed()

        server = await asyncio.start_server(between, "127.0.0.1", 0)
        source = GrpcSource(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        theirs = await source.handshake(make_signature("decode-0"), timeout_s=10.0)
        assert theirs.instance == "prefill-0" and not slow
        await source.close()
        server.close()
        await asyncio.gather(*(task for task in served if task is not None))


async def test_a_source_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        source = GrpcSource(f"127.0.0.1:{held.getsockname()[1]}")
        async with asyncio.timeout(30):
            with pytest.raises(SourceUnreachable, match="refused"):
                await source.handshake(make_signature("decode-0"), timeout_s=600.0)
        await source.close()
