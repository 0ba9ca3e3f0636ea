"""`biphase logs`: what a process of the deployment writes down."""

import argparse
import sys

from biphase.cluster.controller_call import controller_of
from biphase.protos.errors import SetupError

WHOLE_S = 600.0
"""A long log of another host may take its time."""


def logs(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    if not 0 <= arguments.tail < 2**32:
        raise SetupError(f"tail is {arguments.tail}: 0 (all) or more lines")
    request = controller_pb2.GetLogsRequest(
        process=arguments.process, tail_lines=arguments.tail, follow=arguments.follow
    )
    with controller_of(arguments) as controller:
        for chunk in controller.GetLogs(request, timeout=None if arguments.follow else WHOLE_S):
            sys.stdout.buffer.write(chunk.data)
            sys.stdout.buffer.flush()
    return 0
