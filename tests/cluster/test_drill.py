"""`biphase serve --inject-faults` in front of real instances: clients get the right tokens, operators are told."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from support.dummy_directory import write_dummy_directory
from support.served import Served, run_biphase

from biphase.client import AsyncClient

Serve = Callable[..., Served]
NUM_PROMPTS = 24
FAULTS = "drop=0.1,corrupt=0.1,duplicate=0.1,truncate=0.1,disconnect=0.05,seed=3"


async def tokens_of(address: str) -> list[tuple[int, ...]]:
    """Of prompts of several lengths, all at once."""
    async with AsyncClient(address) as client:

        async def ask(number: int) -> tuple[int, ...]:
            prompt = [3 + (number * 31 + at * 7) % 200 for at in range(20 + 9 * number)]
            stream = client.generate(token_ids=prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
            async for _ in stream:
                pass
            return stream.result.token_ids

        return list(await asyncio.gather(*map(ask, range(NUM_PROMPTS))))


async def test_a_drill_harms_no_token_and_status_names_it(
    serve: Serve, environment: dict[str, str], tmp_path: Path
) -> None:
    model = write_dummy_directory(tmp_path / "model")
    common = ("--model", str(model), "--load-format", "dummy", "--threads", "1", "--kv-memory", "16MiB")
    drilled = serve(*common, "--mode", "strict", "--inject-faults", FAULTS, PYTHONPATH="")
    drilled.wait_ready()
    under_faults = await tokens_of(drilled.record.router_address)
    status = await asyncio.to_thread(run_biphase, environment, "status")
    document = await asyncio.to_thread(run_biphase, environment, "status", "--json")
    assert f"faults are injected into the KV transfer: {FAULTS}" in status.stdout.replace("\n", " ")
    struck: Counter[str] = Counter()
    for process in json.loads(document.stdout)["processes"]:
        struck.update({name: num for name, num in process["counters"].items() if name.startswith("faults_")})
    assert sum(struck.values()) >= 5, struck
    drilled.process.terminate()
    assert await asyncio.to_thread(drilled.process.wait, 30) == 0, drilled.logs()

    calm = serve(*common, "--prefill", "0", PYTHONPATH="")
    calm.wait_ready()
    alone = await tokens_of(calm.record.router_address)
    assert len(set(alone)) == NUM_PROMPTS
    assert under_faults == alone
