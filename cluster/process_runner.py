"""Runs one process's part: picks the service for its kind, keeps its announcements, turns errors into them.

The same code runs under every backend; what differs is who hands in ``publish`` and ``stop``.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from biphase.cluster.backend import ProcessSpec
from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announce, Announcement, Announcer

if TYPE_CHECKING:
    from biphase.engine.worker_config import WorkerConfig
    from biphase.router.config import RouterConfig

FindLeader = Callable[[], Awaitable[str]]
EXIT_OK, EXIT_CRASH, EXIT_SETUP = 0, 1, 2
logger = logging.getLogger("biphase.cluster.process")


async def run_process(
    spec: ProcessSpec, publish: Announce, stop: asyncio.Event, find_leader: FindLeader | None = None
) -> int:
    """Serve until ``stop`` is set; returns the exit code. A SetupError is announced as ``failed`` with its line.

    ``find_leader``: how a rank finds its rank 0 where ``spec`` does not say; asked by ranks above 0 only.
    """
    first = Announcement(
        name=spec.name,
        kind=spec.kind,
        incarnation=spec.incarnation,
        pid=os.getpid(),
        log_file=str(spec.log_file),
        rank=spec.rank,
        node=_node_of(spec.host),
    )
    announcer = Announcer(first, publish)
    try:
        await _serve(spec, announcer, stop, find_leader)
    except SetupError as error:
        logger.error("%s: %s", spec.name, one_line(error))
        announcer.update(state="failed", detail=one_line(error))
        return EXIT_SETUP
    except Exception:
        logger.exception("%s has crashed", spec.name)
        return EXIT_CRASH
    announcer.update(state="stopped", detail="")
    return EXIT_OK


def _node_of(host: str) -> str:
    return socket.gethostname() if host in ("", "localhost", "::1") or host.startswith("127.") else host


async def _serve(spec: ProcessSpec, announcer: Announcer, stop: asyncio.Event, find_leader: FindLeader | None) -> None:
    # imported here: a router needs no torch, a worker no controller
    match spec.kind:
        case "prefill":
            from biphase.prefill_worker.serve import serve as serve_prefill

            await serve_prefill(_worker_config(spec), announcer, stop, find_leader)
        case "decode":
            from biphase.decode_worker.serve import serve as serve_decode

            await serve_decode(_worker_config(spec), announcer, stop, find_leader)
        case "router":
            from biphase.router.serve import serve as serve_router

            await serve_router(_router_config(spec), announcer, stop)
        case "controller":
            from biphase.cluster.controller_service import serve as serve_controller

            await serve_controller(spec, announcer, stop)


def _worker_config(spec: ProcessSpec) -> "WorkerConfig":
    from biphase.engine.config import EngineConfig
    from biphase.engine.worker_config import RoleLimits, WorkerConfig

    deployment = spec.deployment
    assert spec.kind == "prefill" or spec.kind == "decode"
    plan = deployment.plan(spec.kind)
    other = deployment.plan("decode" if spec.kind == "prefill" else "prefill")
    return WorkerConfig(
        name=spec.name,
        role=spec.kind,
        incarnation=spec.incarnation,
        host=spec.host,
        engine=EngineConfig(
            model=deployment.model,
            load_format=deployment.load_format,
            device=deployment.device_of(spec.kind),
            dtype=deployment.dtype,
            kv_dtype=deployment.kv_dtype,
            gpu_share=spec.gpus or 1.0,
            served_name=deployment.served_model_name,
            block_size=plan.block_size,
            max_model_len=deployment.max_model_len,
            kv_memory_bytes=plan.kv_memory_bytes,
            threads=plan.threads,
            instances_on_host=deployment.num_ranks,
            weights_cache=deployment.weights_cache,
        ),
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_queued_tokens=plan.max_queued_tokens,
        other=RoleLimits(
            max_num_seqs=other.max_num_seqs,
            max_num_batched_tokens=other.max_num_batched_tokens,
            max_queued_tokens=other.max_queued_tokens,
        ),
        log_file=str(spec.log_file),
        plan=spec.plan,
        rank=spec.rank,
        rank_key=spec.rank_key,
        leader=spec.leader,
        load_timeout_s=deployment.start_timeout_s,
        kv_transport=deployment.kv_transport,
        kv_codec=deployment.kv_codec,
        kv_overlap=deployment.kv_overlap,
        inject_faults=deployment.inject_faults,
    )


def _router_config(spec: ProcessSpec) -> "RouterConfig":
    from biphase.router.config import RouterConfig, Waits

    deployment, place = spec.deployment, spec.deployment.router_place(spec.name)
    return RouterConfig(
        name=spec.name,
        incarnation=spec.incarnation,
        host=place.host,
        advertise_host=spec.host if place.host in ("0.0.0.0", "::") else "",
        port=place.port,
        model=deployment.model,
        served_model_name=deployment.served_model_name,
        mode=deployment.mode,
        controller=spec.controller_address,
        colocated=deployment.prefill.replicas == 0,
        max_replays=deployment.max_replays,
        limits=deployment.limits,
        waits=Waits(drain_s=max(deployment.drain_s, 0.001)),
        log_file=str(spec.log_file),
    )
