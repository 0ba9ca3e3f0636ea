"""What `biphase status` says of transports."""

from biphase.cluster.status_table import transport_lines


def test_pairs_that_agree_are_one_line() -> None:
    found = {"rank 0 from rank 0 of prefill-0": "shm: same host", "rank 1 from rank 0 of prefill-0": "shm: same host"}
    assert transport_lines("decode-0", found) == ["decode-0 takes KV of prefill-0 by shm: same host"]


def test_pairs_that_differ_are_named() -> None:
    found = {
        "rank 1 from rank 0 of prefill-0": "tcp: another host",
        "rank 0 from rank 0 of prefill-0": "shm: same host",
        "rank 0 from rank 0 of prefill-1": "grpc: as asked",
    }
    assert transport_lines("decode-0", found) == [
        "decode-0 takes KV of prefill-0 (rank 0 from rank 0) by shm: same host",
        "decode-0 takes KV of prefill-0 (rank 1 from rank 0) by tcp: another host",
        "decode-0 takes KV of prefill-1 by grpc: as asked",
    ]


def test_without_transfers_there_is_nothing_to_say() -> None:
    assert transport_lines("decode-0", {}) == []
