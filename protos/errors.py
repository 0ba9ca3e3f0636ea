"""The exception tree, and how each error travels over gRPC.

    BiphaseError
    ├── InvalidRequest        INVALID_ARGUMENT     the user's mistake: value and limit in the message
    │   └── UnknownModel      NOT_FOUND
    ├── RequestNotFound       NOT_FOUND
    ├── RequestExists         ALREADY_EXISTS
    ├── Overloaded            RESOURCE_EXHAUSTED   a queue or pool is full; try again later
    ├── Unavailable           UNAVAILABLE          an instance that the request needs is gone
    │   ├── HandoffFailed     UNAVAILABLE          its KV could not be had
    │   └── EngineLost        UNAVAILABLE          its device failed: the process has to end
    ├── Aborted               ABORTED              the weights that it began on are gone: send it again
    ├── DeadlinePassed        DEADLINE_EXCEEDED
    ├── Cancelled             CANCELLED
    ├── Internal              INTERNAL
    └── SetupError            (no RPC)             a bad file, flag or port: one line, exit code 2

Messages are one line, name the value and the limit, and carry no prompt text.
"""

import grpc


class BiphaseError(Exception):
    """Root of every error that biphase raises on purpose."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    retryable: bool = False
    """Whether the same request may work when it is sent again a little later."""


class InvalidRequest(BiphaseError):
    """A request that can never work as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModel(InvalidRequest):
    """A model name that this deployment does not serve."""

    code = grpc.StatusCode.NOT_FOUND


class RequestNotFound(BiphaseError):
    """No live request has this id."""

    code = grpc.StatusCode.NOT_FOUND


class RequestExists(BiphaseError):
    """A live request already has this client id."""

    code = grpc.StatusCode.ALREADY_EXISTS


class Overloaded(BiphaseError):
    """A bounded queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class Unavailable(BiphaseError):
    """An instance that the request needs is away."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class HandoffFailed(Unavailable):
    """A decode instance could not get a request's KV."""


class EngineLost(Unavailable):
    """An engine's device failed; nothing can be computed in this process any more."""


class Aborted(BiphaseError):
    """The weights that a request began on were replaced before it had ended."""

    code = grpc.StatusCode.ABORTED
    retryable = True


class DeadlinePassed(BiphaseError):
    """The client's deadline came first."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(BiphaseError):
    """The client, or an Abort, ended the request."""

    code = grpc.StatusCode.CANCELLED


class Internal(BiphaseError):
    """Our fault; the log says more."""

    code = grpc.StatusCode.INTERNAL


class SetupError(BiphaseError):
    """A bad file, flag, port or machine at start-up. Printed as one line; exit code 2."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, its type's name when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


ERROR_OF_STATUS: dict[grpc.StatusCode, type[BiphaseError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        RequestNotFound,
        RequestExists,
        Overloaded,
        Unavailable,
        Aborted,
        DeadlinePassed,
        Cancelled,
        Internal,
    )
}
"""What a caller raises for a status it received. A code that several errors share gives the general one."""


def error_of_status(code: grpc.StatusCode, message: str) -> BiphaseError:
    """The error that a received status stands for; Internal, naming the code, for one that biphase never sends."""
    if code in ERROR_OF_STATUS:
        return ERROR_OF_STATUS[code](message)
    return Internal(f"{code.name}: {message}")
