"""A prefill side in a process of its own, to be killed: prints its ticket as one JSON line, then waits.

python kv_prefill_process.py NUM_TOKENS COMPUTED
"""

import asyncio
import json
import sys

from support.kv import prefill_side


async def main(num_tokens: int, computed: int) -> None:
    async with prefill_side() as prefill:
        ticket = prefill.open(num_tokens, computed=computed)
        print(json.dumps({"id": ticket.id.hex(), "address": ticket.kv_address}), flush=True)
        await asyncio.Event().wait()


asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
