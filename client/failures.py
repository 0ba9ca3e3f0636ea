"""From a failed call to an error of biphase, with the server's own line as its message."""

import grpc

from biphase.protos.errors import BiphaseError, InvalidRequest, UnknownModel, error_of_status

NOTHING_LISTENS = "nothing listens at"
"""How the line begins when the connection was refused."""


def failure(
    error: grpc.RpcError, address: str, *, timeout_s: float | None = None, generating: bool = False
) -> BiphaseError:
    """The error that ``error`` stands for. ``generating``: NOT_FOUND then speaks of the model, else of a request."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.NOT_FOUND and generating:
        return UnknownModel(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return InvalidRequest(f"the request's message is too large: {details}")  # now and later
    if (
        code is grpc.StatusCode.DEADLINE_EXCEEDED
        and timeout_s is not None
        and (not details or "Deadline Exceeded" in details)
    ):
        details = f"no end within the deadline of {timeout_s:g} s"
    if code is grpc.StatusCode.UNAVAILABLE and _from_the_transport(details):
        if "connection refused" in details.lower():
            details = f"{NOTHING_LISTENS} {address}"
        else:
            details = f"the router at {address} cannot be reached: {details}"
    if code is grpc.StatusCode.CANCELLED and details in ("", "Locally cancelled by application!"):
        details = "the request was cancelled by this client"
    return error_of_status(code, details or code.name)


_TRANSPORT_LINES = (
    "failed to connect",
    "socket closed",
    "recvmsg",
    "sendmsg",
    "keepalive",
    "ping timeout",
    "connection reset",
    "connection closed",
    "dns resolution",
    "errors resolving",
    "empty address list",
    "stream removed",
    "goaway",
    "endpoint closing",
    "broken pipe",
    "transport closed",
    "cancelling all calls",
)


def _from_the_transport(details: str) -> bool:
    """Whether gRPC wrote the line itself; the router's own lines about instances begin otherwise."""
    return details.lower().startswith(_TRANSPORT_LINES)
