"""`biphase status` and `biphase stop`: what runs, and its end."""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Any

from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord, served, started_ticks
from biphase.protos.errors import SetupError

CALL_S = 5.0
STOP_PATIENCE_S = 120.0


def chosen(name: str | None) -> tuple[RunDir, ServeRecord]:
    """The deployment meant: the named one, or the only one that runs. Raises SetupError."""
    running = served()
    if name is not None:
        running = [run_dir for run_dir in running if run_dir.path.name == name]
        if not running:
            raise SetupError(f"no deployment {name} is running; `biphase serve --name {name} ...` starts one")
    if not running:
        raise SetupError("no deployment is running; `biphase serve` starts one")
    if len(running) > 1:
        raise SetupError(f"several deployments are running, give --name: {', '.join(it.path.name for it in running)}")
    record = running[0].record()
    if record is None:
        raise SetupError(f"deployment {running[0].path.name} is just starting; try again")
    return running[0], record


def status(arguments: argparse.Namespace) -> int:
    run_dir, record = chosen(arguments.name)
    seen = _ask_controller(record)
    if arguments.json:
        print(json.dumps(_as_json(run_dir, record, seen), indent=2))
    else:
        _print_table(run_dir, record, seen)
    return 0


def _ask_controller(record: ServeRecord) -> Any | None:
    """The controller's ClusterStatus, None when it does not answer."""
    import grpc

    from biphase.protos import controller_pb2, controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    with grpc.insecure_channel(record.controller_address, options=channel_options()) as channel:
        with contextlib.suppress(grpc.RpcError):
            stub = controller_pb2_grpc.ControllerStub(channel)
            return stub.GetStatus(controller_pb2.WatchStatusRequest(), timeout=CALL_S)
    return None


def _as_json(run_dir: RunDir, record: ServeRecord, seen: Any | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "deployment": record.name,
        "state": seen.state if seen is not None else record.state,
        "detail": seen.detail if seen is not None else "the controller does not answer",
        "backend": record.backend,
        "supervisor_pid": record.pid,
        "controller_address": record.controller_address,
        "router_addresses": list(seen.router_addresses) if seen is not None else [record.router_address],
        "run_dir": str(run_dir.path),
        "stages": dict(record.stages),
        "processes": [],
    }
    if seen is not None:
        document |= {"model": seen.model, "mode": seen.mode, "uptime_s": seen.uptime_s, "version": seen.version}
        fields = [field.name for field in seen.DESCRIPTOR.fields_by_name["processes"].message_type.fields]
        for process in seen.processes:
            values = {name: getattr(process, name) for name in fields}
            maps = {name: dict(values[name]) for name in ("counters", "transports")}
            document["processes"].append({**values, "rank_pids": list(process.rank_pids), **maps})
    return document


def _print_table(run_dir: RunDir, record: ServeRecord, seen: Any | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if seen is None:
        console.print(f"{record.name}: {record.state} (supervisor pid {record.pid}); the controller does not answer")
        return
    routers = ", ".join(seen.router_addresses) or "no router yet"
    console.print(
        f"{seen.deployment}: {seen.state}, {seen.model} at {routers} ({seen.backend}, mode {seen.mode}, "
        f"up {seen.uptime_s:.0f} s, supervisor pid {record.pid})",
        markup=False,
    )
    if seen.detail:
        console.print(seen.detail, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in (
        "process",
        "state",
        "plan",
        "pid",
        "incarnation",
        "device",
        "threads",
        "KV memory",
        "restarts",
        "address",
        "log",
    ):
        table.add_column(column, overflow="fold")
    for process in seen.processes:
        state = process.state
        if state == "loading":
            state = f"loading {process.progress:.0%} {process.detail}"
        table.add_row(
            process.name,
            state,
            process.plan.replace(" x ", ", ") or "-",
            " ".join(map(str, process.rank_pids)) or str(process.pid or "-"),
            str(process.incarnation),
            process.device or "-",
            str(process.threads or "-"),
            f"{process.kv_bytes / 2**20:.0f} MiB" if process.kv_bytes else "-",
            str(process.restarts),
            process.address or "-",
            os.path.relpath(process.log_file, run_dir.path) if process.log_file else "-",
        )
    console.print(table)
    for process in seen.processes:
        for words in transport_lines(process.name, process.transports):
            console.print(words, markup=False)
    console.print(f"logs below {run_dir.path}", markup=False)


def transport_lines(name: str, transports: Mapping[str, str]) -> list[str]:
    """What KV of each instance comes by: one line where all pairs of ranks agree, else one for each that differs."""
    pairs: dict[str, dict[str, list[str]]] = {}
    for pair, transport in transports.items():
        ranks, _, peer = pair.rpartition(" of ")
        pairs.setdefault(peer, {}).setdefault(transport, []).append(ranks)
    lines = []
    for peer, by_transport in sorted(pairs.items()):
        for transport, which_ranks in sorted(by_transport.items()):
            which = f" ({', '.join(sorted(which_ranks))})" if len(by_transport) > 1 else ""
            lines.append(f"{name} takes KV of {peer}{which} by {transport}")
    return lines


def stop(arguments: argparse.Namespace) -> int:
    """Ask the supervisor to end and wait for that; --now, and Ctrl-C here, end it at once."""
    _, record = chosen(arguments.name)
    if started_ticks(record.pid) != record.started_ticks:
        raise SetupError(f"deployment {record.name} is just starting; try again")
    descriptor = os.pidfd_open(record.pid)
    _send(descriptor, CUT_SIGNAL if arguments.now else signal.SIGINT)
    try:
        if not _gone_within(descriptor, STOP_PATIENCE_S):
            raise SetupError(f"supervisor (pid {record.pid}) has not ended within {STOP_PATIENCE_S:g} s; try --now")
    except KeyboardInterrupt:
        _send(descriptor, CUT_SIGNAL)
        _gone_within(descriptor, STOP_PATIENCE_S)
    finally:
        os.close(descriptor)
    print(f"stopped {record.name}")
    return 0


def _send(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


def _gone_within(descriptor: int, within_s: float) -> bool:
    return bool(select.select([descriptor], [], [], within_s)[0])
