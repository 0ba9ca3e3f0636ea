"""Where requests go, on snapshots written by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.protos.ids import RequestId
from biphase.router.policy import choose_decode, has_room, in_reach, place, wait_for_decode
from biphase.router.view import (
    ClusterView,
    Disaggregated,
    InstanceKey,
    InstanceView,
    Local,
    Pair,
    PlaceRequest,
    Refuse,
    Rules,
    Wait,
)

AUTO, STRICT = Rules(mode="auto"), Rules(mode="strict")


def p(key: str = "p0", **values: Any) -> InstanceView:
    return InstanceView(key=InstanceKey(key), role="prefill", **{"max_queued_tokens": 100, **values})


def d(key: str = "d0", **values: Any) -> InstanceView:
    defaults = {"room_blocks": 10, "num_blocks": 10, "block_size": 4, "max_num_seqs": 4}
    return InstanceView(key=InstanceKey(key), role="decode", **{**defaults, **values})


def view(*instances: InstanceView, now_s: float = 100.0, **since: float) -> ClusterView:
    def none_since(role: str) -> float | None:
        ready = any(one.role == role and one.state == "ready" for one in instances)
        return None if ready else since.get(f"no_{role}_since_s", now_s)

    return ClusterView(
        instances=instances,
        now_s=now_s,
        no_prefill_since_s=none_since("prefill"),
        no_decode_since_s=none_since("decode"),
    )


def request(prompt_tokens: int = 8, max_tokens: int = 16, arrived_s: float = 100.0, **values: Any) -> PlaceRequest:
    return PlaceRequest(
        request_id=RequestId("r"), prompt_tokens=prompt_tokens, max_tokens=max_tokens, arrived_s=arrived_s, **values
    )


@pytest.mark.parametrize("rules", [AUTO, STRICT], ids=["auto", "strict"])
def test_both_phases_have_an_instance(rules: Rules) -> None:
    assert place(request(), view(p(), d()), rules) == Disaggregated(prefill="p0", decode="d0", reason="prefill_ready")


def test_the_shortest_queue_and_the_emptiest_decode_instance() -> None:
    cluster = view(p("p0", queued_tokens=9), p("p1", queued_tokens=8), d("d0", requests=2), d("d1", requests=1))
    assert place(request(), cluster, AUTO) == Disaggregated(prefill="p1", decode="d1", reason="prefill_ready")


def test_among_equals_more_room_then_the_name() -> None:
    assert choose_decode(request(), view(d("d0", room_blocks=5), d("d1", room_blocks=6))) == "d1"
    assert choose_decode(request(), view(d("d1"), d("d0"))) == "d0"


def test_one_token_needs_no_decode_instance() -> None:
    placement = place(request(max_tokens=1), view(p()), STRICT)
    assert placement == Disaggregated(prefill="p0", decode=None, reason="prefill_ready")


def test_no_prompt_is_sent_while_no_decode_instance_has_room() -> None:
    full = d(requests=1, room_blocks=2)
    assert place(request(prompt_tokens=8), view(p(), full), AUTO) == Wait(reason="decode_busy")
    assert place(request(prompt_tokens=7), view(p(), full), AUTO) == Disaggregated(
        prefill="p0", decode="d0", reason="prefill_ready"
    )


def test_an_empty_decode_instance_takes_a_prompt_beyond_its_room() -> None:
    assert has_room(d(requests=0, room_blocks=0), 40)
    assert not has_room(d(requests=1, room_blocks=0), 1)


def test_a_decode_instance_with_all_its_places_taken_has_no_room() -> None:
    assert has_room(d(requests=3), 1)
    assert not has_room(d(requests=4), 1)
    assert has_room(d(requests=4, max_num_seqs=0), 1)


def test_a_full_queue_is_passed_over_and_an_empty_one_takes_any_prompt() -> None:
    cluster = view(p("p0", queued_tokens=93), p("p1", queued_tokens=92), d())
    assert place(request(), cluster, AUTO) == Disaggregated(prefill="p1", decode="d0", reason="prefill_ready")
    assert place(request(prompt_tokens=500), view(p(), d(requests=0)), AUTO) == Disaggregated(
        prefill="p0", decode="d0", reason="prefill_ready"
    )


@pytest.mark.parametrize("rules", [AUTO, STRICT], ids=["auto", "strict"])
@pytest.mark.parametrize("busy", [p(full=True), p(queued_tokens=99)], ids=["said busy", "queue too long"])
def test_a_live_but_busy_prefill_instance_is_waited_for(rules: Rules, busy: InstanceView) -> None:
    assert place(request(), view(busy, d()), rules) == Wait(reason="prefill_busy")


def test_auto_goes_local_when_no_prefill_instance_is_alive() -> None:
    local = Local(decode=InstanceKey("d0"), reason="no_prefill_alive")
    assert place(request(), view(p(state="lost"), d()), AUTO) == local
    assert place(request(), view(p(draining=True), d()), AUTO) == local
    assert place(request(), view(d()), AUTO) == local


def test_one_that_has_just_become_known_is_given_time_to_connect() -> None:
    fresh = p(state="connecting", since_s=99.0)
    assert place(request(), view(fresh, d()), AUTO) == Wait(reason="prefill_connecting", until_s=102.0)
    assert place(request(), view(fresh, d(), now_s=102.0), AUTO) == Local(
        decode=InstanceKey("d0"), reason="no_prefill_alive"
    )


def test_strict_waits_a_moment_then_refuses() -> None:
    lost = p(state="lost")
    assert place(request(), view(lost, d(), no_prefill_since_s=98.0), STRICT) == Wait(
        reason="no_prefill_alive", until_s=101.0
    )
    refusal = place(request(), view(lost, d(), no_prefill_since_s=97.0), STRICT)
    assert refusal == Refuse(
        reason="no_prefill_alive",
        detail="no prefill instance has been ready for 3.0 s (p0 lost), and mode is strict",
    )


def test_strict_never_goes_local_for_a_draining_prefill_instance() -> None:
    assert place(request(), view(p(draining=True), d()), STRICT) == Wait(reason="no_prefill_alive", until_s=103.0)


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_colocated_by_design_is_local_in_every_mode(mode: Any) -> None:
    assert place(request(), view(d()), Rules(mode=mode, colocated=True)) == Local(
        decode=InstanceKey("d0"), reason="colocated"
    )


def test_colocated_by_design_takes_a_prefill_instance_that_came_later() -> None:
    rules = Rules(mode="strict", colocated=True)
    assert isinstance(place(request(), view(p(), d()), rules), Disaggregated)
    assert isinstance(place(request(), view(p(draining=True), d()), rules), Local)


def test_short_prompts_stay_local_in_auto_alone() -> None:
    rules = Rules(mode="auto", local_prefill_max_tokens=8)
    assert place(request(prompt_tokens=8), view(p(), d()), rules) == Local(
        decode=InstanceKey("d0"), reason="short_prompt"
    )
    assert isinstance(place(request(prompt_tokens=9), view(p(), d()), rules), Disaggregated)
    assert isinstance(place(request(prompt_tokens=8), view(p(), d()), replace(rules, mode="strict")), Disaggregated)


@pytest.mark.parametrize("known", [[d(state="lost")], []], ids=["known", "unknown"])
def test_without_a_decode_instance_a_deadline_is_the_limit(known: list[InstanceView]) -> None:
    cluster = view(p(), *known, no_decode_since_s=1.0)
    assert place(request(deadline_s=200.0), cluster, AUTO) == Wait(reason="no_decode_alive", until_s=199.9)
    refusal = place(request(deadline_s=100.1), cluster, AUTO)  # a little before it, so that the client hears why
    assert isinstance(refusal, Refuse) and "no decode instance has been ready for 99.0 s" in refusal.detail


def test_without_a_deadline_the_wait_for_a_decode_instance_is_bounded() -> None:
    cluster = view(p(), d(state="lost"), no_decode_since_s=1.0)
    assert place(request(arrived_s=71.0), cluster, AUTO) == Wait(reason="no_decode_alive", until_s=101.0)
    assert place(request(arrived_s=70.0), cluster, AUTO) == Refuse(
        reason="no_decode_alive", detail="no decode instance has been ready for 99.0 s (d0 lost)"
    )


def test_where_no_decode_instance_is_known_late_requests_do_not_wait_anew() -> None:
    cluster = view(p(), no_decode_since_s=70.0)
    refusal = place(request(arrived_s=100.0), cluster, AUTO)
    assert refusal == Refuse(
        reason="no_decode_alive", detail="no decode instance has been ready for 30.0 s (none is known)"
    )
    replay = place(request(arrived_s=100.0, is_replay=True), cluster, AUTO)  # but those that had begun do
    assert replay == Wait(reason="no_decode_alive", until_s=130.0)


# ---- pairs that do not reach each other

BROKEN = Pair(prefill=InstanceKey("p0"), decode=InstanceKey("d0"))


def with_broken(cluster: ClusterView, *pairs: Pair) -> ClusterView:
    return replace(cluster, broken=frozenset(pairs), retry_s=101.0)


def test_a_broken_pair_is_avoided() -> None:
    cluster = with_broken(view(p(), d("d0"), d("d1", requests=3)), BROKEN)
    assert place(request(), cluster, AUTO) == Disaggregated(prefill="p0", decode="d1", reason="prefill_ready")
    assert choose_decode(request(), cluster, InstanceKey("p0")) == "d1"
    assert choose_decode(request(), cluster) == "d0"
    cluster = with_broken(view(p("p0"), p("p1", queued_tokens=50), d()), BROKEN)
    assert place(request(), cluster, AUTO) == Disaggregated(prefill="p1", decode="d0", reason="prefill_ready")


def test_where_the_pair_that_works_is_busy_it_is_waited_for() -> None:
    cluster = with_broken(view(p("p0"), p("p1", full=True), d()), BROKEN)
    assert place(request(), cluster, AUTO) == Wait(reason="prefill_busy")


def test_without_any_pair_auto_goes_local_and_strict_waits_for_the_next_try() -> None:
    cluster = with_broken(view(p(), d()), BROKEN)
    assert place(request(), cluster, AUTO) == Local(decode=InstanceKey("d0"), reason="no_pair")
    assert place(request(), cluster, STRICT) == Wait(reason="no_pair", until_s=101.0)
    late = place(request(arrived_s=70.0), cluster, STRICT)
    assert isinstance(late, Refuse) and late.detail.endswith("reaches (p0-d0 broken)")
    assert wait_for_decode(request(), cluster, STRICT, InstanceKey("p0")) == Wait(reason="no_pair", until_s=101.0)
    assert place(request(max_tokens=1), cluster, STRICT) == Disaggregated(
        prefill=InstanceKey("p0"), decode=None, reason="prefill_ready"
    )


def test_a_ticket_waits_for_the_busy_instance_in_reach_or_the_pairs_next_try() -> None:
    cluster = with_broken(view(p(), d(), d("d1", full=True)), BROKEN)
    late = request(arrived_s=0.0)
    assert wait_for_decode(late, cluster, STRICT, InstanceKey("p0")) == Wait(reason="decode_busy", until_s=101.0)
    assert [one.key for one in in_reach(late, cluster, InstanceKey("p0"))] == ["d1"]
    assert [one.key for one in in_reach(late, cluster, InstanceKey("p1"))] == ["d0", "d1"]
    assert in_reach(request(generation="old"), cluster, InstanceKey("p0")) == []


# ---- generations of the weights


def test_prefill_and_decode_are_of_one_generation() -> None:
    cluster = view(p("p0", generation="old"), p("p1", generation="new"), d("d0", generation="new"))
    for rules in (AUTO, STRICT):
        assert place(request(), cluster, rules) == Disaggregated(prefill="p1", decode="d0", reason="prefill_ready")
        pinned = request(generation="old")
        assert place(pinned, cluster, rules) == Wait(reason="no_generation", until_s=103.0, alone=True)
    gone = place(request(generation="old", arrived_s=97.0), cluster, AUTO)
    assert isinstance(gone, Refuse) and gone.aborted
    assert gone.detail == ("it began on generation 'old', of which no decode instance is left (there is 'new', 'old')")
    assert wait_for_decode(request(generation="old", arrived_s=97.0), cluster, AUTO) == gone


def test_with_one_of_each_the_decode_instance_serves_meanwhile() -> None:
    cluster = view(p("p0", generation="new"), d("d0", generation="old"))
    assert place(request(), cluster, AUTO) == Local(decode=InstanceKey("d0"), reason="no_prefill_alive")
    assert place(request(), cluster, STRICT) == Wait(reason="no_prefill_alive", until_s=103.0)
    assert isinstance(place(request(arrived_s=60.0), cluster, STRICT), Refuse)


def test_a_request_goes_on_on_its_own_generation_where_there_is_some_of_it() -> None:
    cluster = view(p("p0", generation="new"), d("d0", generation="new"), d("d1", generation="old", requests=3))
    assert place(request(generation="old"), cluster, AUTO) == Local(decode=InstanceKey("d1"), reason="no_prefill_alive")
    assert choose_decode(request(generation="old"), cluster) == "d1"
    full = view(p("p0", generation="new"), d("d0", generation="new"), d("d1", generation="old", full=True))
    assert place(request(generation="old"), full, AUTO) == Wait(reason="decode_busy", alone=True)
    assert place(request(generation="old"), full, STRICT) == Wait(reason="no_prefill_alive", until_s=103.0, alone=True)


def test_what_waits_for_its_generation_comes_before_those_that_may_go_to_another() -> None:
    new = (p("p1", generation="new"), d("d1", generation="new"))
    both = view(p("p0", generation="old"), d("d0", generation="old"), *new)
    assert place(request(), both, AUTO) == Disaggregated(prefill="p0", decode="d0", reason="prefill_ready")
    assert place(request(), both, AUTO, off={"old"}) == Disaggregated(prefill="p1", decode="d1", reason="prefill_ready")
    assert place(request(generation="old"), both, AUTO, off={"old"}) == Wait(reason="replay_first", alone=True)
    busy = view(p("p0", generation="old"), d("d0", generation="old"), d("d1", generation="new", full=True))
    assert place(request(), busy, AUTO, off={"old"}) == Wait(reason="replay_first")
    assert place(request(), busy, AUTO, off={"old", "new"}) == Wait(reason="replay_first")
    lost = view(p("p0", generation="old"), d("d1", generation="old", state="lost"))
    assert place(request(generation="old"), lost, AUTO) == Wait(reason="no_decode_alive", until_s=130.0)


def test_a_ticket_waits_for_room_like_a_prompt() -> None:
    assert wait_for_decode(request(), view(p(), d(full=True)), AUTO) == Wait(reason="decode_busy")


INSTANCES = st.builds(
    InstanceView,
    key=st.sampled_from([InstanceKey(f"i{n}") for n in range(4)]),
    role=st.sampled_from(["prefill", "decode"]),
    state=st.sampled_from(["connecting", "ready", "lost"]),
    since_s=st.floats(90, 100),
    draining=st.booleans(),
    full=st.booleans(),
    queued_tokens=st.integers(0, 200),
    requests=st.integers(0, 6),
    room_blocks=st.integers(-3, 10),
    num_blocks=st.just(10),
    block_size=st.just(4),
    max_num_seqs=st.just(4),
    max_queued_tokens=st.just(100),
)


@given(
    instances=st.lists(INSTANCES, max_size=4, unique_by=lambda one: one.key),
    mode=st.sampled_from(["auto", "strict"]),
    prompt_tokens=st.integers(1, 60),
    max_tokens=st.integers(1, 3),
)
def test_nothing_goes_where_it_must_not(
    instances: list[InstanceView], mode: Any, prompt_tokens: int, max_tokens: int
) -> None:
    cluster = view(*instances)
    by_key = {one.key: one for one in instances}
    asked = request(prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    placement = place(asked, cluster, Rules(mode=mode))
    match placement:
        case Disaggregated():
            chosen = by_key[placement.prefill]
            assert chosen.role == "prefill" and chosen.takes_work and not chosen.full
            assert (placement.decode is None) == (max_tokens == 1)
            if placement.decode is not None:
                assert by_key[placement.decode].role == "decode" and has_room(by_key[placement.decode], prompt_tokens)
        case Local():
            assert mode == "auto"
            assert not any(one.role == "prefill" and one.takes_work for one in instances)
            assert has_room(by_key[placement.decode], prompt_tokens)
        case Wait():
            assert placement.until_s is None or placement.until_s > cluster.now_s
        case Refuse():
            assert placement.detail
