"""`biphase scale`: pin the counts of instances, or leave them to the policy."""

import argparse
import difflib

from biphase.cluster.controller_call import CALL_S, controller_of
from biphase.protos.errors import SetupError

ROLES = ("prefill", "decode")


def scale(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    if arguments.counts == ["auto"]:
        if arguments.for_s:
            raise SetupError("--for with auto says nothing: the policy decides from now on")
        request = controller_pb2.ScaleRequest(auto=True)
    else:
        counts = counts_of(arguments.counts)
        request = controller_pb2.ScaleRequest(
            for_s=arguments.for_s or 0.0, prefill=counts.get("prefill"), decode=counts.get("decode")
        )
    with controller_of(arguments) as controller:
        print(controller.Scale(request, timeout=CALL_S).text)
    return 0


def counts_of(words: list[str]) -> dict[str, int]:
    """ "prefill=2" and the like. Raises SetupError."""
    counts: dict[str, int] = {}
    for word in words:
        role, equals, text = word.partition("=")
        if not equals:
            raise SetupError(f"{word!r}: give counts as in prefill=2 decode=1, or auto alone")
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1, cutoff=0.4)
            raise SetupError(f"unknown role {role}: {f'did you mean {near[0]}?' if near else 'prefill or decode'}")
        if role in counts:
            raise SetupError(f"{role} is given twice")
        if not text.isdecimal():
            raise SetupError(f"{role} is {text!r}: give a whole number, 0 or more")
        if int(text) > 2**31:
            raise SetupError(f"{role} is {text}: the most is 256")
        counts[role] = int(text)
    return counts
