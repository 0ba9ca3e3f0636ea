"""A flip whose grace ends before the streams aboard do: they go on elsewhere, token by token. A part of bench/flip.py.

A deployment of 1 prefill and 2 decode instances, streams of recorded prompts on both of these, and one of them is told to turn
by the controller's own call, as `biphase flip` does.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import grpc.aio
from local_cluster import LocalCluster, local_cluster
from record_tokens import record
from report import Report

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.measured import Measured
from biphase.client.bench.prompts import RecordedPrompts
from biphase.client.bench.runner import Runner
from biphase.client.bench.tokens_file import Recording, read_recording
from biphase.protos import controller_pb2, controller_pb2_grpc
from biphase.protos.grpc_setup import channel_options

VICTIM = "decode-0"
STREAMS, TOKENS, STREAMING_TOKENS = 8, 256, 3
STREAMING_WITHIN_S, TURNED_WITHIN_S, TIMEOUT_S = 60.0, 60.0, 180.0
RECORDED = Path(__file__).resolve().parent.parent / "tests" / "reference" / "smollm2_recorded.jsonl"


async def measure_replay(arguments: argparse.Namespace, report: Report) -> None:
    """Goals, and in the report's ``extra`` what happened."""
    plan = {"threads": 1, "kv_memory": "256MiB", "tp": arguments.tp}
    deploy = {
        "model": arguments.model,
        "backend": "process",
        "mode": "auto",
        "max_model_len": 1024,
        "prefill": {"replicas": 1, **plan},
        "decode": {"replicas": 2, **plan},
        "drain_s": 1.0,
    }
    prompts = RecordedPrompts(_recording(arguments.model).usable, seed=1)
    async with local_cluster(deploy, {}) as cluster, AsyncClient(cluster.address) as client:
        runner = Runner([client], prompts, timeout_s=TIMEOUT_S)
        running = asyncio.create_task(runner.run(_at_once()))
        await _until_streaming(runner)
        aboard = await _legs(client)
        at_s = runner.now_s()
        await _flip(cluster, arguments.grace_s)
        measured = await running
        turned = await _has_turned(client)
    judge(report, measured, at_s=at_s, aboard=aboard, turned=turned)


def judge(report: Report, measured: Sequence[Measured], *, at_s: float, aboard: int, turned: bool) -> None:
    """``at_s``: the order, on the load's clock; ``aboard``: requests on the instance then. Pure."""
    moved = [one for one in measured if one.done and one.replays and one.sent_s < at_s < one.ended_s]
    elsewhere = [one for one in moved if not one.decode_instance.startswith(f"{VICTIM}#")]
    report.extra["cut_short"] = {"aboard": aboard, "replayed": len(moved), "replayed_elsewhere": len(elsewhere)}
    report.goal("cut_short_aboard", aboard, 1, at_least=True)
    report.goal("cut_short_replayed_elsewhere_of_aboard", len(elsewhere) / max(aboard, 1), 1, at_least=True)
    report.goal("cut_short_not_done", sum(not one.done for one in measured), 0)
    report.goal("cut_short_wrong", sum(one.wrong or not one.checked for one in measured), 0)
    report.goal("cut_short_turned", int(turned), 1, at_least=True)


def _recording(model: str) -> Recording:
    if model == "smollm2":
        return read_recording(RECORDED)
    return record(model, num_prompts=STREAMS, input_len="uniform:32:160", output_len=TOKENS)


def _at_once() -> list[Arrival]:
    return [Arrival(index=index, at_s=0.0, phase=0, input_tokens=96, output_tokens=TOKENS) for index in range(STREAMS)]


async def _until_streaming(runner: Runner) -> None:
    until_s = time.monotonic() + STREAMING_WITHIN_S
    while sum(len(live.tokens) >= STREAMING_TOKENS for live in runner.live.values()) < STREAMS:
        if time.monotonic() > until_s:
            raise SystemExit(f"{STREAMS} streams do not run at the same time after {STREAMING_WITHIN_S:g} s")
        await asyncio.sleep(0.01)


async def _legs(client: AsyncClient) -> int:
    return sum(one.legs for one in (await client.server_info()).instances if one.name == VICTIM)


async def _flip(cluster: LocalCluster, grace_s: float) -> None:
    known = cluster.run_dir.record()
    assert known is not None
    async with grpc.aio.insecure_channel(known.controller_address, options=channel_options()) as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        await stub.Flip(controller_pb2.FlipRequest(instance=VICTIM, grace_s=grace_s), timeout=10.0)


async def _has_turned(client: AsyncClient) -> bool:
    until_s = time.monotonic() + TURNED_WITHIN_S
    while time.monotonic() < until_s:
        views = (await client.server_info()).instances
        if any(one.name == VICTIM and (one.role, one.state) == ("prefill", "ready") for one in views):
            return True
        await asyncio.sleep(0.1)
    return False
