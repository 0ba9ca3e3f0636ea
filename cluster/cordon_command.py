"""`biphase cordon`: no new instance on a node, and the end of that."""

import argparse

from biphase.cluster.controller_call import CALL_S, controller_of


def cordon(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    with controller_of(arguments) as controller:
        request = controller_pb2.CordonRequest(node=arguments.node, undo=arguments.undo)
        print(controller.Cordon(request, timeout=CALL_S).text)
    return 0
