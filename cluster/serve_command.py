"""`biphase serve`: checks what a user can get wrong, starts the supervisor, shows its progress, passes Ctrl-C on."""

import argparse
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from biphase.cluster.backend import WAIT_VARIABLE
from biphase.cluster.deploy_schema import deployment_from, load_deployment
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import may_have_gpus
from biphase.cluster.model_checks import check_model
from biphase.cluster.policy_source import check_counts, check_policy
from biphase.cluster.progress import Progress
from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord
from biphase.cluster.served_already import leave_or_take
from biphase.engine.checkpoint import gguf_config, hf_config
from biphase.protos import model_source
from biphase.protos.errors import SetupError, one_line
from biphase.protos.gguf_file import GgufFile
from biphase.protos.values import Role

POLL_S = 0.05
READY_POLL_S = 0.25
MAX_WAIT_S = 86_400.0
_PARALLEL_FLAGS = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}
"""What follows the role in a flag's name, and the key it gives."""
PATIENCE_S = 15.0
"""After the second Ctrl-C; a supervisor that still lives then is killed."""


def serve(arguments: argparse.Namespace) -> int:
    """Returns 0 after a clean stop (with --detach once ready, with --wait too once the controller is up), 2 when the
    deployment could not start. With --detach the same again changes nothing."""
    began_s = time.monotonic()
    wait_s = _wait_of(arguments)
    asked = deployment_of(arguments)
    joined = asked.backend == "ray" and bool(os.environ.get("RAY_ADDRESS"))
    deployment = checked(asked, on_this_host=not joined)
    run_dir = RunDir.of(deployment.name)
    if not arguments.detach:
        lock = run_dir.lock()  # before the port: who has the name mostly has the port as well
    else:
        file = arguments.deploy_file or "FILE"
        found = leave_or_take(run_dir, deployment, wait_s, named=bool(asked.served_model_name), file=file)
        if isinstance(found, ServeRecord):
            print(up_line(found, already=True), flush=True)
            return 0
        lock = found
    try:
        _check_counts(deployment, may_survive=joined)
        _check_ports(deployment, may_survive=joined)
        run_dir.prepare(deployment, keep_logs=joined and not run_dir.ended_in_order)
    except BaseException:
        os.close(lock)
        raise
    with _passing_signals_on() as stops:
        supervisor = _spawn_supervisor(run_dir, lock, began_s, detach=arguments.detach)
        os.close(lock)
        try:
            return _accompany(run_dir, supervisor, stops, detach=arguments.detach, wait_s=wait_s)
        except BaseException:  # an error of ours leaves nothing running
            supervisor.send_signal(signal.SIGINT)
            supervisor.wait()
            raise


def _wait_of(arguments: argparse.Namespace) -> float | None:
    """The seconds of --wait, which hosts that join later make use of too. Raises SetupError."""
    wait_s: float | None = arguments.wait
    if wait_s is None:
        return None
    if not arguments.detach:
        raise SetupError("--wait goes with --detach: in the foreground `biphase serve` stays anyway")
    if not 0 < wait_s <= MAX_WAIT_S:
        raise SetupError(f"--wait is {wait_s:g}: above 0 and at most {MAX_WAIT_S:g} seconds")
    os.environ[WAIT_VARIABLE] = "1"
    return wait_s


def deployment_of(arguments: argparse.Namespace) -> Deployment:
    """The deployment that file and flags describe. Raises SetupError."""
    flags = _flags(arguments)
    if arguments.deploy_file is not None:
        path = Path(arguments.deploy_file)
        try:
            return load_deployment(path, flags)
        except SetupError as error:
            if path.suffix in (".yaml", ".yml") or (path.is_file() and path.suffix != ".gguf"):
                raise
            raise SetupError(f"{one_line(error)}; did you mean --model {path}?") from error
    if not arguments.model:
        raise SetupError("give a deploy file or --model, as in: biphase serve --model smollm2")
    return deployment_from(flags, named=_flag_of)


def _flag_of(path: tuple[str, ...]) -> str:
    """The flag that gives the key at ``path``."""
    key = path[0] if path[1:] == ("replicas",) else path[-1]
    if path[-1] in _PARALLEL_FLAGS.values():
        key = next(f"{path[0]}_{flag}" for flag, name in _PARALLEL_FLAGS.items() if name == path[-1])
    return f"--{key.replace('_', '-')}"


def _flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given flags as a deploy file would say them."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    top = (
        "model",
        "load_format",
        "device",
        "dtype",
        "kv_dtype",
        "served_model_name",
        "name",
        "backend",
        "mode",
        "host",
        "port",
        "kv_transport",
        "kv_codec",
        "inject_faults",
    )
    values: dict[str, Any] = {
        key: given[key] for key in (*top, "max_model_len", "weights_cache", "drain_s") if key in given
    }
    per_role = ("threads", "cpus", "gpus", "kv_memory", "block_size", "max_num_seqs", "max_num_batched_tokens")
    shared = {key: given[key] for key in per_role if key in given}
    for role in ("prefill", "decode"):
        plan = {**shared, **({"replicas": given[role]} if role in given else {})}
        plan |= {name: given[f"{role}_{flag}"] for flag, name in _PARALLEL_FLAGS.items() if f"{role}_{flag}" in given}
        if plan:
            values[role] = plan
    return values


def checked(deployment: Deployment, *, on_this_host: bool) -> Deployment:
    """Refuse early what would fail late: the model's files, plans and KV memory that do not fit it. Paths become
    absolute. ``on_this_host``: whether all of it runs here."""
    if deployment.load_format == "dummy" and Path(deployment.model).suffix == ".json":
        raise SetupError(f"{deployment.model}: a lone configuration has no tokenizer; give a directory that has both")
    source = model_source.resolve(deployment.model, weights=False)
    config = gguf_config.config_of(GgufFile(source.path)) if source.kind == "gguf" else hf_config.config_of(source.path)
    check_model(deployment, config, may_have_gpus=not on_this_host or may_have_gpus())
    check_policy(deployment)
    deployment = replace(deployment, served_model_name=deployment.served_model_name or source.name)
    with contextlib.suppress(OSError):
        if Path(deployment.model).exists():
            deployment = replace(deployment, model=str(Path(deployment.model).absolute()))
    if deployment.weights_cache is not None:
        deployment = replace(deployment, weights_cache=str(Path(deployment.weights_cache).expanduser().absolute()))
    return deployment


def _check_counts(deployment: Deployment, *, may_survive: bool) -> None:
    """Of what begins. ``may_survive``: it may go on from an earlier supervisor, and its policy have changed since."""
    try:
        check_counts(deployment)
    except SetupError as error:
        if not may_survive:
            raise
        print(f"biphase: {one_line(error)}", file=sys.stderr)


def _check_ports(deployment: Deployment, *, may_survive: bool) -> None:
    """Raises SetupError where a router that runs on this host could not listen. ``may_survive``: one of an earlier supervisor
    may hold the port and go on; otherwise it will say itself that it cannot listen."""
    for place in deployment.router_places:
        if place.node:  # mostly another host
            continue
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((place.host, place.port))
            except OSError as error:
                if may_survive and error.errno == errno.EADDRINUSE:
                    continue
                where = f"{place.host}:{place.port}"
                wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
                key = "host" if wrong_host else "port"
                hint = f"give {place.name} another {key}" if deployment.routers else f"give another --{key}"
                raise SetupError(f"cannot listen on {where}: {error.strerror or error}; {hint}") from error


def _spawn_supervisor(run_dir: RunDir, lock: int, began_s: float, *, detach: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "biphase.cluster.supervisor", str(run_dir.path)]
    command += ["--lock-fd", str(lock), "--began", str(began_s), *([] if detach else ["--foreground"])]
    with open(run_dir.supervisor_log, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if detach else subprocess.PIPE,  # our end closes however we die
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # the terminal's Ctrl-C reaches us alone
        )


class _Stops:
    """How often the user asked for the end."""

    def __init__(self) -> None:
        self.asked = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[_Stops]:
    stops = _Stops()
    before = {number: signal.signal(number, stops.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _accompany(
    run_dir: RunDir, supervisor: "subprocess.Popen[bytes]", stops: _Stops, *, detach: bool, wait_s: float | None
) -> int:
    """Show the supervisor's word until it ends, or, with ``detach``, until it is ready, with ``wait_s`` until it is up."""
    passed, ready, patience_s = 0, False, float("inf")
    up_by_s = time.monotonic() + wait_s if wait_s is not None else float("inf")
    with Progress() as progress:
        while supervisor.poll() is None:
            record = run_dir.record()
            if record is not None:
                progress.show(record)
                if wait_s is not None and any(name == "controller" for name, _ in record.stages):
                    progress.end_loading()
                    print(up_line(record), flush=True)
                    return 0
                if not ready and record.state == "ready":
                    ready = True
                    progress.end_loading()
                    print(ready_line(run_dir.deployment(), record), flush=True)
                    if detach:
                        return 0
            if time.monotonic() > up_by_s:
                raise SetupError(f"the controller is not up within {wait_s:g} s; see {run_dir.supervisor_log}")
            if passed < stops.asked:
                passed += 1
                supervisor.send_signal(CUT_SIGNAL if passed > 1 else signal.SIGINT)
                progress.say("stopping at once" if passed > 1 else _stop_line(run_dir, ready))
                patience_s = time.monotonic() + PATIENCE_S if passed > 1 else patience_s
            if time.monotonic() > patience_s:
                supervisor.kill()
            time.sleep(READY_POLL_S if ready and not passed else POLL_S)
        record = run_dir.record()
        progress.end_loading()
    if supervisor.returncode == 0 and record is not None and record.state == "stopped":
        print("stopped", flush=True)
        return 0
    if record is not None and record.state == "failed" and record.detail:
        raise SetupError(record.detail)
    raise SetupError(f"the supervisor has ended ({supervisor.returncode}); see {run_dir.supervisor_log}")


def _stop_line(run_dir: RunDir, ready: bool) -> str:
    if not ready:
        return "stopping"
    return f"draining for at most {run_dir.deployment().drain_s:g} s; Ctrl-C again stops at once"


def _count(deployment: Deployment, role: Role) -> str:
    plan = deployment.plan(role)
    ranks = f" of {plan.parallel}" if plan.replicas and plan.parallel.num_ranks > 1 else ""
    return f"{plan.replicas} {role}{ranks}"


def up_line(record: ServeRecord, *, already: bool = False) -> str:
    """What --wait ends with: the rest comes up without anybody watching."""
    waits = [f"{line.name} {line.detail}" for line in record.processes if line.state == "starting" and line.detail]
    text = (
        f"{'already ' if already else ''}up: {record.name}, {record.state}, controller at {record.controller_address}"
    )
    return "; ".join([text, *waits, "`biphase status` tells the rest"])


def ready_line(deployment: Deployment, record: ServeRecord) -> str:
    """The one line that scripts wait for."""
    counts = f"{_count(deployment, 'prefill')}, {_count(deployment, 'decode')}"
    took_s = dict(record.stages).get("ready", 0.0)
    return f"ready: {deployment.served_model_name} at {record.router_address} ({counts}, {deployment.backend}, {took_s:.1f} s)"
