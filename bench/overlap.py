"""How much of a handoff a long prompt hides: its KV leaves while later chunks and layers are computed.

    python bench/overlap.py [--rounds 5] [--transports grpc shm] [--json FILE] [--check]

*Exposed* is the time from token 0, sampled on the prefill instance, to the start of the decode instance's first step, which
is idle otherwise. Per transport two deployments of SmolLM2, one thread each, stand side by side and take turns: one ships
as it computes, one only what is complete (``kv_overlap: false``). The third arm is the same prompt with nothing to ship
(max_tokens 1): what shipping costs the prefill.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import report

from biphase.client import AsyncClient

CHUNK, CHUNKS = 512, 8
ARMS = ("overlap", "no overlap", "nothing shipped")
DEPLOY = """
name: {name}
model: smollm2
backend: process
mode: strict
port: {port}
max_model_len: {max_model_len}
kv_transport: {transport}
kv_overlap: {overlap}
prefill: {{replicas: 1, threads: 1, kv_memory: 512MiB, max_num_batched_tokens: {chunk}, max_queued_tokens: {max_model_len}}}
decode: {{replicas: 1, threads: 1, kv_memory: 512MiB}}
"""


def prompt_of(round_: int, tokens: int) -> list[int]:
    return [1000 + (round_ * 7919 + position * 104729) % 40000 for position in range(tokens)]


def biphase(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "biphase.cluster.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"biphase {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


@contextlib.asynccontextmanager
async def served(transport: str, overlap: bool, folder: Path) -> AsyncIterator[AsyncClient]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = f"bench-overlap-{transport.replace('_', '-')}-{'on' if overlap else 'off'}-{os.getpid()}"
    text = DEPLOY.format(
        name=name,
        port=port,
        transport=transport,
        overlap=str(overlap).lower(),
        max_model_len=(CHUNKS + 1) * CHUNK,
        chunk=CHUNK,
    )
    deploy = folder / f"{name}.yaml"
    deploy.write_text(text)
    await asyncio.to_thread(biphase, "serve", str(deploy), "--detach")
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await asyncio.to_thread(biphase, "stop", "--name", name)


async def ask(client: AsyncClient, prompt: list[int], max_tokens: int) -> tuple[float, float, int]:
    """(exposed ms, prefill ms, bytes) of one request."""
    stream = client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    await stream.text()
    timeline = stream.result.timeline
    return timeline.transfer_exposed_ms, timeline.prefill_ms, timeline.transfer_bytes


async def measure(result: report.Report, transport: str, rounds: int, folder: Path) -> None:
    exposed: dict[str, list[float]] = {arm: [] for arm in ARMS[:2]}
    prefill: dict[str, list[float]] = {arm: [] for arm in ARMS}
    async with served(transport, True, folder) as on, served(transport, False, folder) as off:
        for client in (on, off):
            await ask(client, prompt_of(99, CHUNK), 2)  # connections, page faults
        for round_ in range(rounds):
            prompt = prompt_of(round_, CHUNKS * CHUNK)
            for arm in ARMS if round_ % 2 == 0 else reversed(ARMS):
                client = off if arm == "no overlap" else on
                exposed_ms, prefill_ms, num_bytes = await ask(client, prompt, 1 if arm == "nothing shipped" else 4)
                prefill[arm].append(prefill_ms)
                if arm in exposed:
                    assert num_bytes > 0, "the request was not handed over"
                    exposed[arm].append(exposed_ms)
    for arm in ARMS:
        if arm in exposed:
            values = exposed[arm]
            result.row(f"{transport}: exposed, {arm}, ms", statistics.median(values), min(values), max(values))
        values = prefill[arm]
        result.row(f"{transport}: prefill, {arm}, ms", statistics.median(values), min(values), max(values))
    shares = [on / off for on, off in zip(exposed["overlap"], exposed["no overlap"], strict=True)]
    slower = [on / bare for on, bare in zip(prefill["overlap"], prefill["nothing shipped"], strict=True)]
    result.goal(f"exposed_{transport}_of_no_overlap", statistics.median(shares), 0.35)
    result.goal(f"prefill_{transport}_of_not_shipping", statistics.median(slower), 1.10)
    result.extra[transport] = {"exposed_ms": exposed, "prefill_ms": prefill}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="prompts per arm (default 5)")
    parser.add_argument("--transports", nargs="+", default=["grpc", "shm"])
    report.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("there must be at least 1 round")
    result = report.Report("overlap", ["what", "median", "least", "most"])
    with tempfile.TemporaryDirectory() as folder:
        for transport in arguments.transports:
            asyncio.run(measure(result, transport, arguments.rounds, Path(folder)))
    return result.finish(arguments)


if __name__ == "__main__":
    report.run(main)
