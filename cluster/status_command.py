"""`biphase status` and `biphase stop`: what runs, and its end."""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from biphase.cluster.controller_call import CONTROLLER_VARIABLE, controller_address
from biphase.cluster.events_command import as_json
from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord, served, started_ticks
from biphase.cluster.status_table import print_status
from biphase.protos.errors import SetupError, Unavailable

CALL_S = 5.0
WATCH_S, MIN_WATCH_S = 5.0, 0.5
"""How long an unchanged status stands, and how long any does at least."""
STOP_PATIENCE_S = 90.0
"""How long a supervisor may take to end, beside the time that running requests have."""


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
    given = arguments.controller or (os.environ.get(CONTROLLER_VARIABLE) if arguments.name is None else None)
    given = controller_address(given) if given else None
    run_dir, record = (None, None) if given else chosen(arguments.name)
    address = given or (record.controller_address if record is not None else "")
    if arguments.watch:
        return _watch(address, run_dir, record, as_json=arguments.json)
    seen = _ask_controller(address)
    if seen is None and record is None:
        raise Unavailable(f"the controller at {address} does not answer")
    _show(seen, run_dir, record, as_json=arguments.json)
    return 0


def _show(seen: Any | None, run_dir: RunDir | None, record: ServeRecord | None, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_json(run_dir, record, seen), indent=2), flush=True)
        return
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if seen is None:
        assert record is not None
        why = f"; {record.detail}" if record.detail else ""
        console.print(
            f"{record.name}: {record.state} (supervisor pid {record.pid}); the controller does not answer{why}"
        )
        return
    print_status(console, seen, record.pid if record is not None else None, run_dir.path if run_dir else None)


def _watch(address: str, run_dir: RunDir | None, record: ServeRecord | None, *, as_json: bool) -> int:
    """At every change, and while nothing changes every few seconds, until Ctrl-C or the deployment's end."""
    while True:
        seen = _ask_controller(address)
        if seen is None and (record is None or started_ticks(record.pid) != record.started_ticks):
            raise Unavailable(f"the controller at {address} does not answer")
        if sys.stdout.isatty() and not as_json:
            print("\x1b[H\x1b[2J", end="")
        _show(seen, run_dir, record, as_json=as_json)
        _wait_for_change(address)


def _wait_for_change(address: str) -> None:
    import grpc

    from biphase.protos import controller_pb2, controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    began_s = time.monotonic()
    with (
        grpc.insecure_channel(address, options=channel_options(of_client=True)) as channel,
        contextlib.suppress(grpc.RpcError),
    ):
        watch = controller_pb2_grpc.ControllerStub(channel).WatchStatus(
            controller_pb2.WatchStatusRequest(), timeout=WATCH_S
        )
        next(watch)
        next(watch)
    time.sleep(max(0.0, MIN_WATCH_S - (time.monotonic() - began_s)))


def _ask_controller(address: str) -> Any | None:
    """The controller's ClusterStatus, None when it does not answer."""
    import grpc

    from biphase.protos import controller_pb2, controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    with grpc.insecure_channel(address, options=channel_options(of_client=True)) as channel:
        with contextlib.suppress(grpc.RpcError):
            stub = controller_pb2_grpc.ControllerStub(channel)
            return stub.GetStatus(controller_pb2.WatchStatusRequest(), timeout=CALL_S)
    return None


def _as_json(run_dir: RunDir | None, record: ServeRecord | None, seen: Any | None) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if record is not None and run_dir is not None:
        document = {
            "deployment": record.name,
            "state": record.state,
            "detail": "; ".join(["the controller does not answer", *([record.detail] if record.detail else [])]),
            "backend": record.backend,
            "supervisor_pid": record.pid,
            "controller_address": record.controller_address,
            "router_addresses": [record.router_address],
            "run_dir": str(run_dir.path),
            "stages": dict(record.stages),
            "processes": [],
        }
    if seen is None:
        return document
    plain = ("deployment", "state", "detail", "backend", "model", "mode", "uptime_s", "version")
    document |= {key: getattr(seen, key) for key in (*plain, "epoch", "ratio", "pinned", "policy")}
    document |= {key: list(getattr(seen, key)) for key in ("router_addresses", "warnings", "cordoned_nodes")}
    document["decisions"] = [json.loads(as_json(event)) for event in seen.decisions]
    document["processes"] = [_process_json(process) for process in seen.processes]
    return document


def _process_json(process: Any) -> dict[str, Any]:
    values = {name: getattr(process, name) for name in process.DESCRIPTOR.fields_by_name}
    maps = {name: dict(values[name]) for name in ("counters", "transports")}
    role = process.kind if process.role else ""
    return {**values, "rank_pids": list(process.rank_pids), "role": role, **maps}


def stop(arguments: argparse.Namespace) -> int:
    """Ask the supervisor to end and wait for that; --now, and Ctrl-C here, end it at once."""
    run_dir, record = chosen(arguments.name)
    patience_s = STOP_PATIENCE_S if arguments.now else stop_patience_s(run_dir)
    if started_ticks(record.pid) != record.started_ticks:
        raise SetupError(f"deployment {record.name} is just starting; try again")
    descriptor = os.pidfd_open(record.pid)
    _send(descriptor, CUT_SIGNAL if arguments.now else signal.SIGINT)
    try:
        if not _gone_within(descriptor, patience_s):
            raise SetupError(f"supervisor (pid {record.pid}) has not ended within {patience_s:g} s; try --now")
    except KeyboardInterrupt:
        _send(descriptor, CUT_SIGNAL)
        _gone_within(descriptor, STOP_PATIENCE_S)
    finally:
        os.close(descriptor)
    print(f"stopped {record.name}")
    return 0


def stop_patience_s(run_dir: RunDir) -> float:
    """As long as running requests may take, and some more."""
    try:
        return run_dir.deployment().drain_s + STOP_PATIENCE_S
    except (OSError, ValueError, KeyError, TypeError):
        return STOP_PATIENCE_S


def _send(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


def _gone_within(descriptor: int, within_s: float) -> bool:
    return bool(select.select([descriptor], [], [], within_s)[0])
