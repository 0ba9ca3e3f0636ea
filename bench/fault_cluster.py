"""What the parts of bench/faults.py stand on: a deployment as a user starts it, streams through it, busy cores."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from biphase.client import AsyncClient
from biphase.protos.errors import BiphaseError

BACK_WITHIN_S = 60.0


def spin(until: float) -> None:
    while time.monotonic() < until:
        pass


@contextlib.contextmanager
def busy_loops(count: int, seconds: float) -> Iterator[None]:
    """``count`` processes that do nothing but burn a core."""
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=spin, args=(time.monotonic() + seconds,)) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


@dataclass
class Outcome:
    """How one stream ended: its tokens, and the error if there was one."""

    tokens: list[int]
    error: BiphaseError | None
    ended_at: float
    decision: str = ""


@dataclass
class Stream:
    """One request in flight, and how far it is."""

    task: "asyncio.Task[Outcome]"
    tokens: list[int]


def start_stream(client: AsyncClient, prompt: list[int], max_tokens: int) -> Stream:
    tokens: list[int] = []

    async def read() -> Outcome:
        stream = client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        try:
            async for delta in stream:
                tokens.extend(delta.token_ids)
        except BiphaseError as error:
            return Outcome(tokens, error, time.monotonic())
        decision = stream.result.decision if stream.result else ""
        return Outcome(tokens, None, time.monotonic(), decision)

    return Stream(asyncio.create_task(read()), tokens)


async def until(*, seconds: float, check: Callable[[], Awaitable[bool]]) -> None:
    """Look every few milliseconds until ``check`` (an async function) is true; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if await check():
            return
        await asyncio.sleep(0.004)
    raise AssertionError(f"not seen within {seconds} s")


class Cluster:
    """A deployment started by the `biphase` command, as a user would."""

    def __init__(self, backend: str, mode: str, flags: Sequence[str]) -> None:
        self.name, self.backend, self.mode, self.flags = f"bench-faults-{mode}-{os.getpid()}", backend, mode, flags
        self.address = ""

    def biphase(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "biphase.cluster.cli", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise SystemExit(f"biphase {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = ["--backend", self.backend, "--port", str(port), "--name", self.name, "--detach"]
        self.biphase("serve", *self.flags, "--threads", "1", "--mode", self.mode, *where)
        self.address = f"127.0.0.1:{port}"

    def processes(self) -> dict[str, dict[str, Any]]:
        """What `biphase status` says of each, by name."""
        status = json.loads(self.biphase("status", "--json", "--name", self.name))
        return {process["name"]: process for process in status["processes"]}

    def stop(self) -> None:
        self.biphase("stop", "--name", self.name)


@contextlib.asynccontextmanager
async def cluster(backend: str, mode: str, flags: Sequence[str]) -> AsyncIterator[tuple[Cluster, AsyncClient]]:
    running = Cluster(backend, mode, flags)
    await asyncio.to_thread(running.start)
    try:
        async with AsyncClient(running.address) as client:
            yield running, client
    finally:
        await asyncio.to_thread(running.stop)


async def instance(client: AsyncClient, name: str) -> tuple[int, int, str]:
    """(pid, incarnation, state) of an instance; state "absent" when the router does not know it."""
    for view in (await client.server_info()).instances:
        if view.name == name:
            return view.pid, view.incarnation, view.state
    return 0, 0, "absent"


async def wait_back(client: AsyncClient, name: str, after: int) -> None:
    async def back() -> bool:
        _, incarnation, state = await instance(client, name)
        return state == "ready" and incarnation > after

    await until(seconds=BACK_WITHIN_S, check=back)
