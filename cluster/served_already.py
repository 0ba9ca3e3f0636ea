"""`biphase serve --detach --wait` where the name is served already: the same is left to run, a dead one is replaced.

After a cluster's head was started anew (`ray up` again), a supervisor of its former life may still hold on: nobody answers
at its controller's address any more.
"""

import contextlib
import os
import signal
import time

from biphase.cluster.deployment import Deployment
from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord, started_ticks
from biphase.protos.errors import SetupError

ANSWER_S = 20.0
"""How long a controller may be away (it is started again) before its supervisor counts as dead."""
POLL_S = 0.25
CUT_S = 10.0


def leave_or_take(run_dir: RunDir, deployment: Deployment, wait_s: float) -> ServeRecord | int:
    """The record of the same deployment, which runs, or the lock of a name whose supervisor has ended by now.

    Raises SetupError where something else is served under the name.
    """
    deadline_s = time.monotonic() + min(wait_s, ANSWER_S)
    while True:
        with contextlib.suppress(SetupError):
            return run_dir.lock()
        record = run_dir.record()
        if record is not None and any(stage == "controller" for stage, _ in record.stages) and _answers(record):
            if run_dir.deployment() == deployment:
                return record
            raise SetupError(
                f"deployment {deployment.name} is served already, as another deploy file describes it: "
                f"`biphase update` changes it, `biphase stop --name {deployment.name}` ends it"
            )
        if time.monotonic() >= deadline_s:
            return _take(run_dir, record)
        time.sleep(POLL_S)


def _answers(record: ServeRecord) -> bool:
    import grpc

    from biphase.protos import controller_pb2, controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    with grpc.insecure_channel(record.controller_address, options=channel_options()) as channel:
        with contextlib.suppress(grpc.RpcError):
            controller_pb2_grpc.ControllerStub(channel).GetStatus(controller_pb2.WatchStatusRequest(), timeout=5.0)
            return True
    return False


def _take(run_dir: RunDir, record: ServeRecord | None) -> int:
    """End a supervisor whose controller does not answer, and take its lock."""
    for number in (CUT_SIGNAL, signal.SIGKILL):
        if record is not None and started_ticks(record.pid) == record.started_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, number)
        deadline_s = time.monotonic() + CUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(SetupError):
                return run_dir.lock()
            time.sleep(POLL_S)
    return run_dir.lock()
