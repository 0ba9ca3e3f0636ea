"""`biphase events`: what has happened to a deployment, over all lives of its controller."""

import argparse
import json
import time
from typing import Any

from biphase.cluster.controller_call import CALL_S, controller_of


def events(arguments: argparse.Namespace) -> int:
    from biphase.protos import controller_pb2

    request = controller_pb2.WatchEventsRequest(after=max(0, arguments.after), follow=arguments.follow)
    with controller_of(arguments) as controller:
        for event in controller.WatchEvents(request, timeout=None if arguments.follow else CALL_S):
            print(as_json(event) if arguments.json else line_of(event), flush=arguments.follow)
    return 0


def line_of(event: Any) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.unix_s))
    return f"{event.number:5}  {when}  {event.kind:<8}  {event.text}"


def as_json(event: Any) -> str:
    return json.dumps({key: getattr(event, key) for key in ("number", "unix_s", "kind", "subject", "text")})
