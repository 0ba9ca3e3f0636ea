"""A reader over shm in a process of its own, to be stopped in mid-read.

python shm_reader_process.py ADDRESS TICKET NUM_TOKENS

Takes the first half of one piece, prints "half", waits for a line, takes the rest, prints as JSON whether the first half
was still the piece's when the second was read, whether the piece is intact, and what the stream and another pull said.
"""

import asyncio
import json
import sys

import xxhash

from biphase.kvtransfer import frames
from biphase.kvtransfer.frames import FrameError, FrameKind
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import PullOrder, SourceRefused, SourceUnreachable
from biphase.protos.ids import TicketId
from support.kv import LAYOUT
from support.kv_wires import Reader, small_shm


async def main(address: str, ticket: TicketId, num_tokens: int) -> None:
    plane = small_shm()
    source = TcpTransport(plane).open(address)
    order = PullOrder(ticket=ticket, epoch=1, incarnation=1, box=LAYOUT.box(num_tokens))
    stream = source.pull(order)
    async for arrival in stream:
        header = frames.parse_header(arrival.header, arrival.num_bytes)
        if header.kind is FrameKind.PIECE:
            break
    payload = await arrival.payload()
    middle = arrival.num_bytes // 2
    first = bytes(payload[:middle])
    print("half", flush=True)
    sys.stdin.readline()  # the whole process waits, as a stopped one does
    second = bytes(payload[middle:])
    told = {"intact": arrival.intact(), "same": xxhash.xxh3_64_digest(first) == xxhash.xxh3_64_digest(payload[:middle])}
    try:
        frames.check_digest(header, ticket, (first, second))
        told["digest"] = "right"
    except FrameError:
        told["digest"] = "wrong"
    del payload
    reader = Reader()
    for name, rest in (("stream", stream), ("again", source.pull(order))):
        try:
            async for later in rest:
                await reader.take(later, order)
            told[name] = "ended well"
        except (SourceUnreachable, SourceRefused) as error:
            told[name] = f"{type(error).__name__}: {error}"
    told["boxes"] = len(reader.boxes)
    print(json.dumps(told), flush=True)
    await source.close()
    await plane.close()


asyncio.run(main(sys.argv[1], TicketId(bytes.fromhex(sys.argv[2])), int(sys.argv[3])))
