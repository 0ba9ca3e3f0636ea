"""PromptQueue: who starts before whom, and how many tokens may pass a prompt."""

import random

from hypothesis import given
from hypothesis import strategies as st

from biphase.engine.sequence import Sequence
from biphase.prefill_worker.prompt_queue import PromptQueue
from biphase.protos.ids import SeqId
from biphase.protos.values import Sampling


def make_sequence(seq_id: int, tokens: int = 10, *, forced: int = 0) -> Sequence:
    """``tokens`` in all, ``forced`` of them output."""
    return Sequence(
        seq_id=SeqId(seq_id),
        token_ids=[0] * tokens,
        num_prompt_tokens=tokens - forced,
        sampling=Sampling(),
        arrived_s=0.0,
    )


def start_all(queue: PromptQueue) -> list[int]:
    started = []
    while len(queue):
        started.append(queue.first.seq_id)
        queue.start_first()
    return started


def test_prompts_start_as_they_came_and_replays_before_them() -> None:
    queue = PromptQueue(passing_tokens=100)
    for seq_id, forced in enumerate((0, 0, 1, 0, 2)):
        queue.join(make_sequence(seq_id, forced=forced), has_room=True)
    assert repr(queue) == "<PromptQueue [5 waiting]>"
    assert start_all(queue) == [2, 4, 0, 1, 3]


def test_a_replay_without_room_passes_nobody_and_no_replay_passes_it() -> None:
    queue = PromptQueue(passing_tokens=100)
    queue.join(make_sequence(1), has_room=True)
    queue.join(make_sequence(2, forced=1), has_room=False)
    queue.join(make_sequence(3), has_room=True)
    queue.join(make_sequence(4, forced=1), has_room=True)
    assert start_all(queue) == [1, 2, 4, 3]


def test_each_prompt_lets_a_number_of_tokens_pass() -> None:
    queue = PromptQueue(passing_tokens=25)
    queue.join(make_sequence(1), has_room=True)
    for seq_id in (2, 3, 4):  # ten tokens each: a third would make it thirty
        queue.join(make_sequence(seq_id, forced=1), has_room=True)
    queue.join(make_sequence(5), has_room=True)
    for seq_id in (6, 7):
        queue.join(make_sequence(seq_id, forced=1), has_room=True)
    assert start_all(queue) == [2, 3, 1, 4, 6, 7, 5]


def test_one_replay_of_any_length_passes() -> None:
    queue = PromptQueue(passing_tokens=25)
    queue.join(make_sequence(1), has_room=True)
    queue.join(make_sequence(2, 400, forced=1), has_room=True)
    queue.join(make_sequence(3, 2, forced=1), has_room=True)
    assert start_all(queue) == [2, 1, 3]


def test_a_replay_that_ends_unstarted_gives_back_what_it_had_and_one_that_started_does_not() -> None:
    queue = PromptQueue(passing_tokens=25)
    queue.join(make_sequence(1), has_room=True)
    gone = [make_sequence(seq_id, forced=1) for seq_id in (2, 3, 4, 5)]
    for sequence in gone:
        queue.join(sequence, has_room=True)
        queue.remove(sequence)
    queue.join(make_sequence(6, 20, forced=1), has_room=True)
    queue.start_first()
    queue.join(make_sequence(7, forced=1), has_room=True)
    assert start_all(queue) == [1, 7]


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.booleans(), st.booleans(), st.sampled_from(["", "", "start", "remove"])),
        max_size=40,
    ),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
)
def test_any_traffic_keeps_the_bound_and_the_order_of_its_kind(
    arrivals: list[tuple[int, bool, bool, str]], passing: int, rng: random.Random
) -> None:
    queue = PromptQueue(passing_tokens=passing)
    waiting: dict[int, Sequence] = {}
    passed: dict[int, list[int]] = {}
    has_room_of: dict[int, bool] = {}
    last_started = {True: -1, False: -1}

    def start() -> None:
        sequence = queue.first
        queue.start_first()
        del waiting[sequence.seq_id]
        assert sequence.seq_id > last_started[sequence.has_begun], "each kind starts as it came"
        last_started[sequence.has_begun] = sequence.seq_id
        for other in waiting.values():
            if other.seq_id < sequence.seq_id:
                assert sequence.has_begun and not other.has_begun and has_room_of[sequence.seq_id]
                passed.setdefault(other.seq_id, []).append(len(sequence.token_ids))
                lengths = passed[other.seq_id]
                assert len(lengths) == 1 or sum(lengths) <= passing

    for seq_id, (tokens, is_replay, has_room, then) in enumerate(arrivals):
        has_room_of[seq_id] = has_room
        waiting[seq_id] = make_sequence(seq_id, tokens, forced=int(is_replay))
        queue.join(waiting[seq_id], has_room=has_room)
        if then == "start":
            start()
        elif then == "remove":
            queue.remove(waiting.pop(rng.choice(list(waiting))))
        assert len(queue) == len(waiting)
    while waiting:
        start()
