"""What `biphase status` says: columns, loads, transports, open ports."""

import io
from typing import Any

import pytest
from rich.console import Console

from biphase.cluster.open_ports import open_ports
from biphase.cluster.router_places import RouterPlace
from biphase.cluster.status_table import COLUMNS, load_of, pairs_without_kv, print_status, tail_lines, transport_lines
from biphase.protos import common_pb2, controller_pb2

BOTH = ("prefill-0", "prefill-1")


def instance(name: str, **values: Any) -> controller_pb2.ProcessStatus:
    kind = name.partition("-")[0]
    role = common_pb2.ROLE_PREFILL if kind == "prefill" else common_pb2.ROLE_DECODE
    common = {"kind": kind, "role": role, "state": "ready", "incarnation": 1, "plan": "tp 1 x pp 1", "pid": 12345}
    common |= {"node": "10.0.0.12", "address": "10.0.0.12:45741", "generation": "14c337aa", "counters": {"legs": 0}}
    common |= {"device": "cuda:0 NVIDIA H100 bfloat16", "log_file": f"/tmp/biphase/logs/{name}-1.log"}
    return controller_pb2.ProcessStatus(name=name, **{**common, **values})  # type: ignore[arg-type]


def test_pairs_that_agree_are_one_line() -> None:
    found = {"rank 0 from rank 0 of prefill-0": "shm: same host", "rank 1 from rank 0 of prefill-0": "shm: same host"}
    assert transport_lines("decode-0", found, BOTH) == ["decode-0 takes KV of prefill-0 by shm: same host"]


def test_pairs_that_differ_are_named() -> None:
    found = {
        "rank 1 from rank 0 of prefill-0": "tcp: another host",
        "rank 0 from rank 0 of prefill-0": "shm: same host",
        "rank 0 from rank 0 of prefill-1": "grpc: as asked",
    }
    assert transport_lines("decode-0", found, BOTH) == [
        "decode-0 takes KV of prefill-0 (rank 0 from rank 0) by shm: same host",
        "decode-0 takes KV of prefill-0 (rank 1 from rank 0) by tcp: another host",
        "decode-0 takes KV of prefill-1 by grpc: as asked",
    ]


def test_without_transfers_there_is_nothing_to_say() -> None:
    assert transport_lines("decode-0", {}, BOTH) == []


def test_pairs_that_have_moved_nothing_yet_are_named_and_those_that_are_over_are_not() -> None:
    pulled = {"rank 0 from rank 0 of prefill-0": "shm: same host", "rank 0 from rank 0 of decode-2": "shm: same host"}
    seen = controller_pb2.ClusterStatus(
        processes=[
            instance("prefill-0"),
            instance("prefill-1"),
            instance("prefill-2", state="loading"),
            instance("decode-0", transports=pulled),
            instance("decode-1", counters={}),  # did not answer: nobody knows
            instance("decode-2", generation="another"),
        ]
    )
    assert pairs_without_kv(seen.processes) == ["prefill-1 to decode-0"]
    assert list(tail_lines(seen, None)) == [
        "decode-0 takes KV of prefill-0 by shm: same host",
        "no KV has moved yet, so nothing is chosen: prefill-1 to decode-0",
    ]


@pytest.mark.parametrize("width", [104, 120, 160, 240])
def test_a_narrow_terminal_shows_fewer_columns_and_says_which_not(width: int) -> None:
    console = Console(width=width, highlight=False, record=True, file=io.StringIO())
    processes = [instance("prefill-0"), instance("decode-0", running=3, legs=4, num_blocks=10, free_blocks=3)]
    print_status(console, controller_pb2.ClusterStatus(processes=processes), None, None)
    lines = console.export_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("process"))
    shown = [column for column in COLUMNS if column in lines[start]]
    assert {"process", "role", "state", "health", "plan", "node", "load", "incarnation"} <= set(shown)
    assert lines[start + 1].startswith("prefill-0") and lines[start + 2].startswith("decode-0"), "no cell is folded"
    assert "4 aboard, 3 running, 70% full" in lines[start + 2]
    rest = " ".join(lines[start + 3 :])
    assert ("no room for" in rest) == (len(shown) < len(COLUMNS)) == (width < 200)
    assert all(column in rest for column in COLUMNS if column not in shown)


def test_a_prompt_that_waits_to_be_pulled_is_load() -> None:
    assert load_of(instance("prefill-0", legs=2, num_blocks=10, free_blocks=10)) == "2 aboard"
    assert load_of(instance("prefill-0", num_blocks=10, free_blocks=10)) == "idle"


def test_a_drain_says_how_long_what_is_aboard_has() -> None:
    console = Console(width=240, highlight=False, record=True, file=io.StringIO())
    draining = instance("decode-0", state="draining", legs=1, running=1, grace_left_s=4.4)
    print_status(console, controller_pb2.ClusterStatus(processes=[draining]), None, None)
    assert "draining, 4 s left" in console.export_text()


def test_ports_that_others_reach_are_named() -> None:
    everywhere = RouterPlace(name="router-0", host="0.0.0.0", port=0)
    coming = RouterPlace(name="router-1", host="10.0.0.7", port=8700)
    said = [("router-0", "127.0.0.1:8700"), ("decode-0", "10.0.0.5:4000"), ("decode-1", ""), ("controller", "[::1]:87")]
    assert open_ports(said, [everywhere, coming]) == [
        "router-0 at 0.0.0.0:8700",
        "decode-0 at 10.0.0.5:4000",
        "router-1 at 10.0.0.7:8700",
    ]
    here = RouterPlace(name="router-0", host="127.0.0.1", port=8700)
    assert open_ports([("router-0", "127.0.0.1:8700"), ("controller", "localhost:8701")], [here]) == []
