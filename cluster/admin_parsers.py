"""The arguments of the commands that change or look into a running deployment; each does its work in its own module."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, cast

from biphase.cluster.controller_call import add_whom, seconds

COMMANDS = {
    "scale": "biphase.cluster.scale_command",
    "flip": "biphase.cluster.flip_command",
    "drain": "biphase.cluster.drain_command",
    "cordon": "biphase.cluster.cordon_command",
    "update": "biphase.cluster.update_command",
    "events": "biphase.cluster.events_command",
    "logs": "biphase.cluster.logs_command",
}
"""Where each is; the function has the command's name."""


def run_command(name: str, arguments: argparse.Namespace) -> int:
    function = cast("Callable[[argparse.Namespace], int]", getattr(importlib.import_module(COMMANDS[name]), name))
    return function(arguments)


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    for add in (_add_scale, _add_flip, _add_drain, _add_cordon, _add_update, _add_events, _add_logs):
        add(commands)


def _add(commands: "argparse._SubParsersAction[Any]", name: str, **words: Any) -> argparse.ArgumentParser:
    parser = cast("argparse.ArgumentParser", commands.add_parser(name, **words))
    parser.set_defaults(run=name, parser=parser)
    add_whom(parser)
    return parser


def _add_scale(commands: "argparse._SubParsersAction[Any]") -> None:
    scale = _add(
        commands,
        "scale",
        help="set how many instances of each role there are, or leave it to the policy again",
        description="Pin the counts of instances: roles turn in place where that is enough, others drain and stop, new "
        "ones start. The policy decides nothing until `biphase scale auto`, or until the time given is over.",
        epilog="example: biphase scale prefill=2 decode=1 --for 10m",
    )
    scale.add_argument("counts", nargs="+", metavar="ROLE=N|auto", help="a role that is not named keeps its count")
    scale.add_argument("--for", dest="for_s", type=seconds, metavar="TIME", help="as in 10m (default: until auto)")


def _add_flip(commands: "argparse._SubParsersAction[Any]") -> None:
    flip = _add(
        commands,
        "flip",
        help="turn an instance to the other role",
        description="Drain an instance and turn it to the other role, its weights stay loaded. Pins as scale does.",
    )
    flip.add_argument("instance", metavar="ID")
    flip.add_argument(
        "--grace", dest="grace_s", type=seconds, metavar="TIME", help="what runs there has so long to end"
    )
    flip.add_argument("--for", dest="for_s", type=seconds, metavar="TIME", help="pinned so long (default: until auto)")


def _add_drain(commands: "argparse._SubParsersAction[Any]") -> None:
    drain = _add(
        commands,
        "drain",
        help="give an instance, or a whole node, no new work",
        description="An instance that is drained stays, idle, until --undo. A node that is drained is cordoned; its "
        "instances stop once they are idle and others start elsewhere.",
    )
    drain.add_argument("instance", nargs="?", metavar="ID")
    drain.add_argument("--node", metavar="NODE", help="all instances of this node")
    drain.add_argument("--undo", action="store_true", help="take it back")
    drain.add_argument(
        "--grace", dest="grace_s", type=seconds, metavar="TIME", help="what runs there has so long to end"
    )
    drain.add_argument("--wait", action="store_true", help="return when nothing runs there any more")


def _add_cordon(commands: "argparse._SubParsersAction[Any]") -> None:
    cordon = _add(commands, "cordon", help="start no new instance on a node")
    cordon.add_argument("node", metavar="NODE")
    cordon.add_argument("--undo", action="store_true", help="take it back")


def _add_update(commands: "argparse._SubParsersAction[Any]") -> None:
    update = _add(
        commands,
        "update",
        help="bring a running deployment to another deploy file: weights, plan, settings",
        description="Instance by instance: each drains, stops and starts anew. Paused when the first new one fails.",
    )
    update.add_argument("deploy_file", metavar="deploy.yaml")
    update.add_argument("--dry-run", action="store_true", help="say what would be done")
    update.add_argument("--allow-downtime", action="store_true", help="also where nobody serves for a while")
    update.add_argument("--grace", dest="grace_s", type=seconds, metavar="TIME", help="what runs has so long to end")


def _add_events(commands: "argparse._SubParsersAction[Any]") -> None:
    events = _add(commands, "events", help="what has happened, and every decision with its reasons")
    events.add_argument("--follow", "-f", action="store_true", help="go on as they come")
    events.add_argument("--after", type=int, default=0, metavar="N", help="those after number N")
    events.add_argument("--json", action="store_true", help="one JSON object per line")


def _add_logs(commands: "argparse._SubParsersAction[Any]") -> None:
    logs = _add(commands, "logs", help="the log of an instance, a router or the controller")
    logs.add_argument("process", metavar="ID")
    logs.add_argument("--follow", "-f", action="store_true", help="go on as it is written, over its next lives too")
    logs.add_argument("--tail", type=int, default=0, metavar="N", help="the last N lines (default: all)")
