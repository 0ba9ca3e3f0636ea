"""Which transport a pair of ranks uses, which one next when it fails, and why. Pure.

What both ends have and what their places allow decides; the order is that of measured rates (docs/benchmarks.md): memory
of one host before sockets, sockets before gRPC, which every rank has. Between hosts nixl comes first where both have RDMA:
by TCP it reached 0.6 GB/s, less than sockets of our own.
"""

from dataclasses import dataclass

from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.wire import TRANSPORTS

AUTO = "auto"

_ON_ONE_HOST = ("cuda_ipc", "shm", "nixl", "tcp", "dist", "grpc")
_GPUS_ACROSS = ("dist", "tcp", "nixl", "grpc")
_ACROSS = ("tcp", "dist", "nixl", "grpc")
_ONE_HOST_ONLY = ("cuda_ipc", "shm")


@dataclass(frozen=True, slots=True)
class Choice:
    name: str
    reason: str


def order(ours: RankEndpoint, theirs: RankEndpoint, wanted: str = AUTO) -> list[Choice]:
    """The transports that a reader ``ours`` may use to a source ``theirs``, the best first; gRPC is always among them.

    With ``wanted`` that one comes first, where it can; why it cannot is then told with what comes in its place.
    """
    if wanted != AUTO and wanted not in TRANSPORTS:
        raise ValueError(f"transport {wanted!r} is none of {', '.join((AUTO, *TRANSPORTS))}")
    rdma = ours.rdma and theirs.rdma
    choices = [
        Choice(name, _reason(name, _same_host(ours, theirs), rdma))
        for name in _names(ours, theirs, rdma)
        if why_not(name, ours, theirs) is None
    ]
    if wanted == AUTO:
        return choices
    reason = why_not(wanted, ours, theirs)
    if reason is None:
        return [Choice(wanted, "as configured"), *(each for each in choices if each.name != wanted)]
    return [Choice(choices[0].name, f"{reason}; {choices[0].reason}"), *choices[1:]]


def why_not(name: str, ours: RankEndpoint, theirs: RankEndpoint) -> str | None:
    """Why a pair cannot use a transport, None where it can."""
    if name == "grpc":
        return None
    for end, where in ((ours, "here"), (theirs, "at the source")):
        if name not in end.transports:
            return f"no {name} {where}"
    if not theirs.tcp:
        return f"no {name} at the source: it has no tcp listener"
    if name in _ONE_HOST_ONLY and not _same_host(ours, theirs):
        return f"no {name} between two hosts"
    if name == "cuda_ipc" and not (_on_gpu(ours) and _on_gpu(theirs)):
        return f"no cuda_ipc between {ours.device} and {theirs.device}"
    return None


def _names(ours: RankEndpoint, theirs: RankEndpoint, rdma: bool) -> tuple[str, ...]:
    if _same_host(ours, theirs):
        return _ON_ONE_HOST
    names = _GPUS_ACROSS if _on_gpu(ours) and _on_gpu(theirs) else _ACROSS
    return ("nixl", *(name for name in names if name != "nixl")) if rdma else names


def _same_host(ours: RankEndpoint, theirs: RankEndpoint) -> bool:
    return bool(ours.host_id) and ours.host_id == theirs.host_id


def _on_gpu(end: RankEndpoint) -> bool:
    return end.device != "cpu"


def _reason(name: str, same_host: bool, rdma: bool) -> str:
    where = "on one host" if same_host else "on two hosts"
    match name:
        case "cuda_ipc":
            return "both GPUs are on one host"
        case "shm":
            return "both ends share the memory of one host"
        case "nixl":
            return "both ends have nixl and RDMA" if rdma and not same_host else f"both ends have nixl, {where}"
        case "dist":
            return f"both ends have torch.distributed, {where}"
        case "tcp":
            return f"both ends have sockets, {where}"
    return "every rank has gRPC"
