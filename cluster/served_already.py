"""`biphase serve --detach` where the name is served already: the same is left to run, another deploy file is refused.

With --wait a dead one is replaced: after a cluster's head was started anew (`ray up` again), a supervisor of its former life
may still hold on, and nobody answers at its controller's address any more.
"""

import contextlib
import os
import signal
import time
from dataclasses import replace

from biphase.cluster.deployment import Deployment
from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord, started_ticks
from biphase.protos.errors import SetupError

ANSWER_S = 20.0
"""How long a controller may be away (it is started again) before its supervisor counts as dead."""
POLL_S = 0.25
CUT_S = 10.0


def leave_or_take(
    run_dir: RunDir, deployment: Deployment, wait_s: float | None, *, named: bool = True, file: str = "FILE"
) -> ServeRecord | int:
    """The record of the same deployment, which runs, or the lock of a name that nobody serves. With ``wait_s`` its controller
    answers, or its supervisor has ended by now.

    ``named``: whether the user says the served name; an update keeps it otherwise. Raises SetupError where something else is
    served under the name.
    """
    deadline_s = time.monotonic() + min(wait_s or 0.0, ANSWER_S)
    while True:
        try:
            return run_dir.lock()
        except SetupError as error:
            refusal = error
        record = run_dir.record()
        if wait_s is None:
            if record is None or record.state == "stopping" or run_dir.ended_in_order:
                raise refusal
            return _same(run_dir, deployment, record, named=named, file=file)
        if record is not None and any(stage == "controller" for stage, _ in record.stages) and _answers(record):
            return _same(run_dir, deployment, record, named=named, file=file)
        if time.monotonic() >= deadline_s:
            return _take(run_dir, record)
        time.sleep(POLL_S)


def _same(run_dir: RunDir, deployment: Deployment, record: ServeRecord, *, named: bool, file: str) -> ServeRecord:
    """``record``, if ``deployment`` is what is served now, by the last serve or update."""
    served = run_dir.deployment()
    if not named:
        deployment = replace(deployment, served_model_name=served.served_model_name)
    if deployment != served:
        raise SetupError(
            f"deployment {deployment.name} is served already, as another deploy file describes it: "
            f"`biphase update {file}` changes it, `biphase stop --name {deployment.name}` ends it"
        )
    return record


def _answers(record: ServeRecord) -> bool:
    import grpc

    from biphase.protos import controller_pb2, controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    with grpc.insecure_channel(record.controller_address, options=channel_options(of_client=True)) as channel:
        with contextlib.suppress(grpc.RpcError):
            controller_pb2_grpc.ControllerStub(channel).GetStatus(controller_pb2.WatchStatusRequest(), timeout=5.0)
            return True
    return False


def _take(run_dir: RunDir, record: ServeRecord | None) -> int:
    """End a supervisor whose controller does not answer, and take its lock. On a cluster that outlives it, it must not end
    what the next one goes on with."""
    outlived = record is not None and record.backend == "ray" and os.environ.get("RAY_ADDRESS")
    for number in (signal.SIGKILL,) if outlived else (CUT_SIGNAL, signal.SIGKILL):
        if record is not None and started_ticks(record.pid) == record.started_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, number)
        deadline_s = time.monotonic() + CUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(SetupError):
                return run_dir.lock()
            time.sleep(POLL_S)
    return run_dir.lock()
