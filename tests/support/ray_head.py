"""A Ray cluster of one host that a test holds, and a long stream over a deployment on it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from biphase.client import AsyncClient

GIVES_UP_S = 15
"""What Ray itself takes a minute for: a raylet without its GCS ends, and its workers with it."""
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(GIVES_UP_S),
}
HEAD = """
import sys
from ray.cluster_utils import Cluster
print(Cluster(initialize_head=True, head_node_args={"num_cpus": 4}).address, flush=True)
sys.stdin.read()
"""
PROMPT = list(range(10, 40))
LONG = 7500
"""Tokens: seconds of a stream."""


@contextlib.contextmanager
def head() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A cluster of one host: its address, and the process that holds it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env={**os.environ, **RAY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.strip() for line in lines if ":" in line and line[0].isdigit())
        family = psutil.Process(process.pid).children(recursive=True)
        yield address, process
    finally:
        process.kill()
        process.communicate(timeout=60)
        for one in family:  # Ray's own processes outlive whoever started them
            if one.is_running():
                one.kill()


async def stream(client: AsyncClient, max_tokens: int, got: list[tuple[float, int]]) -> list[int]:
    """``got`` gets each token with the time it came, also those before an error."""
    async for delta in client.generate(token_ids=PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True):
        got += [(time.monotonic(), token) for token in delta.token_ids]
    return [token for _, token in got]
