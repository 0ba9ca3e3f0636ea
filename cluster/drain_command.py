"""`biphase drain`: no new work for an instance or a node, and the end of that."""

import argparse
from typing import Any

from biphase.cluster.controller_call import CALL_S, controller_of
from biphase.protos.errors import SetupError


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
            for status in controller.WatchStatus(controller_pb2.WatchStatusRequest(), timeout=None):
                if not _busy(status, arguments.instance, arguments.node):
                    print(f"nothing runs on {arguments.instance or arguments.node} any more")
                    break
    return 0


def _busy(status: Any, instance: str | None, node: str | None) -> bool:
    """Whether something runs there still; of a node, whether any of its instances is still there."""
    instances = [process for process in status.processes if process.kind in ("prefill", "decode")]
    if node is not None:
        return any(process.node == node and process.state not in ("waiting", "stopped") for process in instances)
    meant = next((process for process in instances if process.name == instance), None)
    return meant is not None and (meant.state == "ready" or bool(meant.running or meant.queued_tokens))
