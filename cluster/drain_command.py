"""`biphase drain`: no new work for an instance or a node, and the end of that."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from biphase.cluster.controller_call import CALL_S, controller_of
from biphase.cluster.drain_wait import AFTER_GRACE_S, Remaining, meant_by, remaining
from biphase.protos.errors import DeadlinePassed, SetupError

if TYPE_CHECKING:
    from biphase.protos import controller_pb2_grpc

LOOK_S = 1.0
"""An unchanged status is asked for again after this, as the time that is left goes by."""
SAY_EVERY_S = 5.0


def drain(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    if (arguments.instance is None) == (arguments.node is None):
        raise SetupError("give an instance or --node NODE, one of both")
    if arguments.undo and (arguments.wait or arguments.grace_s):
        raise SetupError("--undo takes neither --wait nor --grace")
    request = controller_pb2.DrainRequest(
        instance=arguments.instance or "",
        node=arguments.node or "",
        grace_s=arguments.grace_s or 0.0,
        undo=arguments.undo,
    )
    with controller_of(arguments) as controller:
        print(controller.Drain(request, timeout=CALL_S).text, flush=True)
        if arguments.wait:
            _wait(controller, arguments.instance, arguments.node)
            print(f"nothing runs on {arguments.instance or arguments.node} any more")
    return 0


def _wait(controller: "controller_pb2_grpc.ControllerStub", instance: str | None, node: str | None) -> None:
    """Until nothing is left, with a line on stderr at every change and now and then. Goes on when the controller begins
    another life. Raises DeadlinePassed."""
    import grpc

    from biphase.protos import controller_pb2

    meant: dict[str, int] | None = None
    due_s, began_s, progress = 0.0, time.monotonic(), _Progress()
    while True:
        try:
            for status in controller.WatchStatus(controller_pb2.WatchStatusRequest(), timeout=LOOK_S):
                meant = meant_by(status, instance=instance, node=node) if meant is None else meant
                left = remaining(status, meant, to_stop=node is not None)
                if not left.lines:
                    return
                if left.grace_left_s or not due_s:
                    due_s = time.monotonic() + left.grace_left_s + AFTER_GRACE_S
                progress.show(left)
        except grpc.RpcError as error:
            away = error.code() == grpc.StatusCode.UNAVAILABLE
            if not due_s or not (away or error.code() == grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            if away:
                time.sleep(LOOK_S)
        if time.monotonic() >= due_s:
            waited_s = time.monotonic() - began_s
            raise DeadlinePassed(
                f"{progress.said or 'the controller says nothing'}, {waited_s:.0f} s after the drain began"
            )


class _Progress:
    def __init__(self) -> None:
        self.said = ""
        self._said_s = 0.0

    def show(self, left: Remaining) -> None:
        lines, now_s = ", ".join(left.lines), time.monotonic()
        if lines != self.said or now_s - self._said_s >= SAY_EVERY_S:
            self.said, self._said_s = lines, now_s
            print(left, file=sys.stderr, flush=True)
