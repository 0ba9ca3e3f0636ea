"""How commands reach a controller: by gRPC alone, with no Ray; and how its refusals become one line for people."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from biphase.protos.errors import InvalidRequest, SetupError, Unavailable, error_of_status, one_line

if TYPE_CHECKING:
    from biphase.protos import controller_pb2_grpc

CALL_S = 30.0
CONTROLLER_VARIABLE = "BIPHASE_CONTROLLER"
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def add_whom(parser: argparse.ArgumentParser) -> None:
    """The flags that say which deployment is meant."""
    parser.add_argument("--name", help="which deployment (default: the one that runs here)")
    parser.add_argument(
        "--controller",
        metavar="HOST:PORT",
        help=f"its controller, where it does not run here (default: ${CONTROLLER_VARIABLE})",
    )


def address_of(arguments: argparse.Namespace) -> str:
    """Where the meant deployment's controller listens. Raises SetupError."""
    given: str | None = arguments.controller or os.environ.get(CONTROLLER_VARIABLE)
    if given and not arguments.name:
        return controller_address(given)
    from biphase.cluster.status_command import chosen

    return chosen(arguments.name)[1].controller_address


def controller_address(given: str) -> str:
    """As given. Raises SetupError where it is no HOST:PORT."""
    if not re.fullmatch(r".+:\d+", given):
        raise SetupError(f"controller is {given!r}: give HOST:PORT")
    return given


@contextlib.contextmanager
def controller_of(arguments: argparse.Namespace) -> Iterator["controller_pb2_grpc.ControllerStub"]:
    """A stub of the meant deployment's controller; what it answers with an error is raised as ours."""
    import grpc

    from biphase.protos import controller_pb2_grpc
    from biphase.protos.grpc_setup import channel_options

    address = address_of(arguments)
    with grpc.insecure_channel(address, options=channel_options(of_client=True)) as channel:
        try:
            yield controller_pb2_grpc.ControllerStub(channel)
        except grpc.RpcError as error:
            code, details = error.code(), one_line(Exception(error.details()))
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(
                    f"the controller at {address} does not answer; `biphase status` tells more"
                ) from error
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequest(details) from error
            raise error_of_status(code, details) from error


def seconds(text: str) -> float:
    """ "90", "90s", "10m", "2h", "1d". Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give it as in 90s, 10m or 2h")
    value = float(match[1]) * _UNITS[match[2]]
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to wait: it must be above 0")
    return value
