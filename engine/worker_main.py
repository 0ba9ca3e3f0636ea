"""The command line of a worker process: flags to a WorkerConfig, signals to its end, errors to one line.

SIGTERM drains: nothing new is taken, what runs may end by itself within --drain-s. A second one, or SIGINT, ends it now.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from biphase.engine.config import EngineConfig
from biphase.engine.worker_config import RoleLimits, WorkerConfig
from biphase.protos.errors import SetupError, one_line
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.process import Announcement, Announcer, announce_to_file, set_up_logging
from biphase.protos.values import Role

Serve = Callable[..., Awaitable[None]]
"""Serves with a WorkerConfig and an Announcer until an asyncio.Event is set, or the one called ``now``."""

DRAIN_S = 30.0
"""Of a process that nobody else drains."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_log = logging.getLogger("biphase.worker")


def num_bytes(text: str) -> int:
    """``268435456``, ``256M`` or ``1.5GiB`` in bytes."""
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = digits[-1:] if digits[-1:] in _UNITS else ""
    try:
        value = int(float(digits.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes (examples: 268435456, 256M, 1.5G)") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def make_parser(role: Role) -> argparse.ArgumentParser:
    """All flags of a worker. Those left out take the defaults of WorkerConfig and EngineConfig."""
    parser = argparse.ArgumentParser(
        prog=f"python -m biphase.{role}_worker",
        description=f"One {role} instance of biphase.",
        argument_default=argparse.SUPPRESS,
    )
    process = parser.add_argument_group("process")
    process.add_argument("--name", help=f"the instance's name (default {role}-0)")
    process.add_argument("--incarnation", type=int, help="which life of the instance (default: from the clock)")
    process.add_argument("--host", help="address to listen on")
    process.add_argument("--advertise-host", help="address that others connect to (default: --host)")
    process.add_argument("--port", type=int, help="port of links (0: any free one)")
    process.add_argument("--kv-port", type=int, help="port that KV is pulled from (0: any free one)")
    process.add_argument(
        "--drain-s",
        type=float,
        help=f"seconds that what runs may take to end after SIGTERM (default {DRAIN_S:g}, 0: none)",
    )
    process.add_argument("--rank", type=int, help="which rank of the instance this process is (default 0)")
    process.add_argument("--rank-key", help="32 hex digits that its ranks share (default: $BIPHASE_RANK_KEY)")
    process.add_argument("--rank-port", type=int, help="port on which rank 0 waits for the others (0: any free one)")
    process.add_argument("--leader", metavar="ADDRESS", help="of rank 0: HOST:PORT, or the FILE of its --announce")
    process.add_argument("--join-timeout-s", type=float, help="seconds that ranks wait for each other to start")
    process.add_argument("--load-timeout-s", type=float, help="seconds that ranks wait for each other to load")
    process.add_argument("--announce", metavar="FILE", help="keep this process's state in FILE, as JSON")
    process.add_argument("--log-file", help="log here instead of to stderr")
    process.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])

    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", required=True, help="GGUF file, Hugging Face directory, or hub name")
    engine.add_argument("--load-format", help="auto (default); dummy: random weights, --model gives the configuration")
    engine.add_argument("--served-name", help="what requests call the model")
    engine.add_argument("--device", help="auto (default), cpu, cuda, cuda:N")
    engine.add_argument("--dtype", help="auto (default), float32, bfloat16, float16")
    engine.add_argument("--kv-dtype", help="auto (default), that of --dtype, float8_e4m3fn")
    engine.add_argument("--tp", type=int, help="ranks that each layer is cut over (default 1)")
    engine.add_argument("--pp", type=int, help="ranks that the layers are dealt out to (default 1)")
    engine.add_argument("--threads", type=int, help="compute threads (default: cores / instances on the host)")
    engine.add_argument("--kv-memory", type=num_bytes, dest="kv_memory_bytes", metavar="BYTES", help="e.g. 256M")
    engine.add_argument("--gpu-share", type=float, help="part of the GPU's memory that is this process's (default 1)")
    engine.add_argument("--num-kv-blocks", type=int, help="instead of --kv-memory")
    engine.add_argument("--block-size", type=int, help="tokens per KV block")
    engine.add_argument("--max-model-len", type=int, help="tokens, prompt and output together")
    engine.add_argument("--instances-on-host", type=int, help="how many share this host's cores and memory")
    engine.add_argument("--weights-cache", metavar="DIR", help="where converted weights are kept")

    scheduling = parser.add_argument_group("scheduling")
    scheduling.add_argument("--step-timeout-s", type=float, help="seconds that a step may take on several ranks")
    scheduling.add_argument("--max-num-seqs", type=int, help="sequences in one step")
    scheduling.add_argument("--max-num-batched-tokens", type=int, help="tokens in one step")
    scheduling.add_argument(
        "--max-queued-tokens", type=int, help="prefill: prompt tokens that may wait (default: two steps)"
    )
    scheduling.add_argument("--lease-s", type=float, help="prefill: seconds that an abandoned ticket lives")
    scheduling.add_argument(
        "--local-prefill-tokens", type=int, help="decode: prompt tokens per step while others decode"
    )
    scheduling.add_argument("--pull-timeout-s", type=float, help="decode: seconds that a pull may go without progress")
    scheduling.add_argument(
        "--other-max-num-seqs", type=int, help="once it has turned to the other role (default: the same)"
    )
    scheduling.add_argument("--other-max-num-batched-tokens", type=int, help="likewise")
    scheduling.add_argument("--other-max-queued-tokens", type=int, help="likewise")

    transfer = parser.add_argument_group("transfer")
    transfer.add_argument(
        "--kv-transport", help="what KV moves by: auto (default), cuda_ipc, shm, nixl, dist, tcp, grpc"
    )
    transfer.add_argument("--kv-codec", help="how KV is packed on its way: raw (default), auto, fp8, int8, int4")
    transfer.add_argument(
        "--no-kv-overlap",
        dest="kv_overlap",
        action="store_false",
        help="prefill: ship a prompt's KV when all of it is computed, not as it is: for measuring",
    )
    transfer.add_argument("--inject-faults", metavar="SPEC", help="what goes wrong with KV on its way, for drills")
    return parser


def parse(role: Role, arguments: Sequence[str]) -> tuple[WorkerConfig, argparse.Namespace]:
    """Flags as a config. Raises SetupError for values out of range; argparse exits for what it does not know."""
    flags = make_parser(role).parse_args(arguments)
    given = vars(flags)
    engine = {name: given[name] for name in EngineConfig.__dataclass_fields__ if name in given}
    names = WorkerConfig.__dataclass_fields__.keys() - {"role", "engine", "plan", "other"}
    values: dict[str, Any] = {"name": f"{role}-0", "incarnation": time.time_ns() // 1_000_000, "drain_s": DRAIN_S}
    values["rank_key"] = os.environ.get("BIPHASE_RANK_KEY", "")
    values |= {name: given[name] for name in names if name in given}
    try:
        engine_config = EngineConfig(**engine)
        plan = ParallelPlan(tp=given.get("tp", 1), pp=given.get("pp", 1))
    except ValueError as error:
        raise SetupError(one_line(error)) from None
    config = WorkerConfig(role=role, engine=engine_config, plan=plan, **values)
    other = {name: given[f"other_{name}"] for name in RoleLimits.__dataclass_fields__ if f"other_{name}" in given}
    return replace(config, other=replace(config.own_limits, **other)) if other else config, flags


def run_worker(role: Role, serve: Serve, arguments: Sequence[str] | None = None) -> int:
    """A worker process from flags to exit code: 0 stopped, 1 broken, 2 a set-up that cannot work (one line told)."""
    try:
        config, flags = parse(role, sys.argv[1:] if arguments is None else arguments)
        log_file = Path(config.log_file) if config.log_file else None
        set_up_logging(log_file, getattr(flags, "log_level", "INFO"))
        first = Announcement(
            name=config.name,
            kind=role,
            incarnation=config.incarnation,
            pid=os.getpid(),
            log_file=config.log_file,
            rank=config.rank,
        )
        file = getattr(flags, "announce", None)
        announcer = Announcer(first, announce_to_file(Path(file)) if file else lambda announcement: None)
    except (SetupError, OSError) as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve_until_signal(config, announcer, serve))
    except SetupError as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        _log.error("%s", one_line(error))
        announcer.update(state="failed", detail=one_line(error))
        return 2
    except Exception as error:  # noqa: BLE001 -- the process ends either way, told in one line
        _log.exception("%s broke", config.name)
        announcer.update(state="failed", detail=one_line(error))
        return 1
    return 0


async def _serve_until_signal(config: WorkerConfig, announcer: Announcer, serve: Serve) -> None:
    stop, now = asyncio.Event(), asyncio.Event()

    def end(*, at_once: bool) -> None:
        if at_once or stop.is_set():
            now.set()
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: end(at_once=False))
    loop.add_signal_handler(signal.SIGINT, lambda: end(at_once=True))
    await serve(config, announcer, stop, now=now)
