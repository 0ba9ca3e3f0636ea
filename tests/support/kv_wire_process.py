"""A prefill side behind the tcp wire in a process of its own, to be killed: prints its ticket, then waits."""

import asyncio
import json

from support.kv_wires import wired_prefill


async def main() -> None:
    async with wired_prefill() as prefill:
        ticket = prefill.side.open(100, computed=10)
        print(json.dumps({"id": ticket.id.hex(), "tcp": prefill.address}), flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
