"""Which faults bench/chaos.py does when."""

from chaos import schedule


def test_a_fault_begins_every_ten_seconds_and_the_seed_says_which() -> None:
    first = schedule(1, 120.0, 10.0, 3.0)
    assert [at_s for at_s, _ in first] == [10.0 * number for number in range(1, 12)]
    assert schedule(1, 120.0, 10.0, 3.0) == first != schedule(2, 120.0, 10.0, 3.0)
    assert schedule(1, 900.0, 10.0, 3.0)[:11] == first


def test_every_process_meets_every_kind_of_fault() -> None:
    faults = [fault for _, fault in schedule(1, 36000.0, 10.0, 3.0)]
    drawn = {(fault.kind, fault.victim) for fault in faults if fault.kind != "pair"}
    victims = {"prefill-0", "decode-0", "decode-1", "router-0", "router-1", "controller"}
    assert drawn == {(kind, victim) for kind in ("kill", "stop", "partition") for victim in victims}
    pairs = {(fault.victim, fault.other) for fault in faults if fault.kind == "pair"}
    assert pairs == {("decode-0", "prefill-0"), ("decode-1", "prefill-0")}
