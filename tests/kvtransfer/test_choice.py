"""Which transport a pair of ranks uses, and what it says about it."""

from dataclasses import replace

import pytest

from biphase.kvtransfer.choice import order
from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.wire import TRANSPORTS

ALL = RankEndpoint(grpc="a:1", tcp="a:2", host_id="one", device="cpu", transports=TRANSPORTS)
GPU = replace(ALL, device="cuda")


def names(ours: RankEndpoint, theirs: RankEndpoint, wanted: str = "auto") -> list[str]:
    return [choice.name for choice in order(ours, theirs, wanted)]


def test_the_best_that_both_ends_have_comes_first() -> None:
    assert names(ALL, ALL) == ["shm", "nixl", "tcp", "dist", "grpc"]
    assert names(GPU, GPU) == ["cuda_ipc", "shm", "nixl", "tcp", "dist", "grpc"]
    away = replace(ALL, host_id="two")
    assert names(ALL, away) == ["tcp", "dist", "nixl", "grpc"]
    assert names(GPU, replace(GPU, host_id="two")) == ["dist", "tcp", "nixl", "grpc"]
    assert names(GPU, ALL) == ["shm", "nixl", "tcp", "dist", "grpc"]
    assert names(ALL, replace(ALL, transports=("tcp", "grpc"))) == ["tcp", "grpc"]
    assert names(replace(ALL, transports=("grpc",)), ALL) == ["grpc"]


def test_nixl_comes_first_between_hosts_where_both_have_rdma() -> None:
    """Over TCP it is slower than what comes in its place."""
    ours, theirs = replace(GPU, rdma=True), replace(GPU, rdma=True, host_id="two")
    assert names(ours, theirs) == ["nixl", "dist", "tcp", "grpc"]
    assert order(ours, theirs)[0].reason == "both ends have nixl and RDMA"
    assert names(ours, replace(theirs, rdma=False))[0] == "dist"
    assert names(replace(ours, rdma=False), theirs)[0] == "dist"


def test_an_end_that_knows_no_host_shares_no_memory() -> None:
    nowhere = replace(ALL, host_id="")
    assert "shm" not in names(nowhere, nowhere)


def test_a_source_that_listens_for_grpc_alone() -> None:
    assert names(ALL, replace(ALL, tcp="")) == ["grpc"]
    assert names(RankEndpoint(), RankEndpoint()) == ["grpc"]


def test_what_is_wanted_comes_first_where_it_can() -> None:
    assert names(ALL, ALL, "dist") == ["dist", "shm", "nixl", "tcp", "grpc"]
    assert names(ALL, ALL, "grpc")[0] == "grpc"
    assert order(ALL, ALL, "tcp")[0].reason == "as configured"
    [first, *_] = order(ALL, replace(ALL, host_id="two"), "shm")
    assert (first.name, first.reason) == ("tcp", "no shm between two hosts; both ends have sockets, on two hosts")
    [first, *_] = order(ALL, GPU, "cuda_ipc")
    assert first.reason == "no cuda_ipc between cpu and cuda; both ends share the memory of one host"
    [first, *_] = order(replace(ALL, transports=("tcp", "grpc")), ALL, "nixl")
    assert first.reason == "no nixl here; both ends have sockets, on one host"


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="'rdma' is none of auto, cuda_ipc, shm"):
        order(ALL, ALL, "rdma")
