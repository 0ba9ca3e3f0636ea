"""What `biphase drain --wait` waits for, by the status that it sees."""

import pytest

from biphase.cluster.drain_wait import meant_by, remaining
from biphase.protos import common_pb2, controller_pb2
from biphase.protos.errors import Aborted

DECODE = common_pb2.ROLE_DECODE


def status(*processes: dict[str, object]) -> controller_pb2.ClusterStatus:
    common = {"role": DECODE, "incarnation": 1, "state": "draining", "node": "one"}
    router = controller_pb2.ProcessStatus(name="router-0", incarnation=1, state="ready", node="one")
    rest = [controller_pb2.ProcessStatus(**{**common, **process}) for process in processes]  # type: ignore[arg-type]
    return controller_pb2.ClusterStatus(processes=[router, *rest])


def test_a_prompt_that_waits_to_be_pulled_is_waited_for() -> None:
    """It neither queues nor runs."""
    seen = status({"name": "prefill-0", "legs": 1, "grace_left_s": 29.6})
    left = remaining(seen, {"prefill-0": 1}, to_stop=False)
    assert left.lines == ("prefill-0 has 1 request aboard",)
    assert str(left) == "prefill-0 has 1 request aboard; what is left in 30 s goes on elsewhere"
    over = status({"name": "prefill-0", "legs": 1})
    assert str(remaining(over, {"prefill-0": 1}, to_stop=False)).endswith(
        "the time is over, what is left goes on elsewhere"
    )


def test_who_has_not_heard_of_the_drain_may_still_be_given_work() -> None:
    left = remaining(status({"name": "decode-0"}), {"decode-0": 1}, to_stop=False)
    assert str(left) == "decode-0 is being told"
    assert remaining(status({"name": "decode-0", "drained": True}), {"decode-0": 1}, to_stop=False).lines == ()


def test_of_a_node_those_that_run_there_are_waited_for_until_they_are_gone() -> None:
    before = status(
        {"name": "decode-0", "legs": 2, "running": 1, "grace_left_s": 5.0},
        {"name": "decode-1", "drained": True},
        {"name": "decode-2", "node": "two"},
        {"name": "decode-3", "node": "one", "state": "waiting"},
    )
    meant = meant_by(before, instance=None, node="one")
    assert meant == {"decode-0": 1, "decode-1": 1}
    left = remaining(before, meant, to_stop=True)
    assert left.lines == ("decode-0 has 2 requests aboard", "decode-1 ends")
    assert (left.aboard, left.grace_left_s) == (2, 5.0)
    after = status({"name": "decode-1", "incarnation": 2, "state": "loading", "node": "two"})
    assert remaining(after, meant, to_stop=True).lines == (), "another life of the name is another's"


def test_a_controller_that_has_just_begun_its_next_life_does_not_end_the_wait() -> None:
    adopted = status({"name": "decode-0", "state": "starting", "node": ""})
    assert remaining(adopted, {"decode-0": 1}, to_stop=False).lines


def test_who_dies_has_nothing_left_and_who_is_lost_on_a_node_is_not_gone_yet() -> None:
    lost = status({"name": "decode-0", "state": "lost", "legs": 3})
    assert remaining(lost, {"decode-0": 1}, to_stop=False).lines == ()
    assert remaining(lost, {"decode-0": 1}, to_stop=True).lines == ("decode-0 ends",)
    assert remaining(status({"name": "decode-0", "state": "waiting"}), {"decode-0": 1}, to_stop=True).lines == ()


def test_a_drain_that_was_taken_back_is_no_drain_that_is_done() -> None:
    with pytest.raises(Aborted, match="the drain of decode-0 was taken back"):
        remaining(status({"name": "decode-0", "state": "ready"}), {"decode-0": 1}, to_stop=False)
