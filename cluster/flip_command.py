"""`biphase flip`: turn an instance to the other role."""

import argparse

from biphase.cluster.controller_call import CALL_S, controller_of


def flip(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    request = controller_pb2.FlipRequest(
        instance=arguments.instance, grace_s=arguments.grace_s or 0.0, for_s=arguments.for_s or 0.0
    )
    with controller_of(arguments) as controller:
        print(controller.Flip(request, timeout=CALL_S).text)
    return 0
