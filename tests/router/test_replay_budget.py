"""Replays hold a share of the prefilling capacity, and always make progress."""

from hypothesis import given
from hypothesis import strategies as st

from biphase.protos.ids import RequestId
from biphase.router.replay_budget import ReplayBudget


def test_one_always_may_and_more_as_far_as_the_share_goes() -> None:
    budget = ReplayBudget(0.5)
    assert budget.allows(5000, 1000)
    budget.take(RequestId("a"), 200)
    assert budget.allows(300, 1000) and not budget.allows(301, 1000)
    assert budget.give_back(RequestId("a")) and not budget.give_back(RequestId("a"))
    assert budget.held_tokens == 0
    assert repr(budget) == "<ReplayBudget [0 replays, 0 tokens]>"


@given(lengths=st.lists(st.integers(1, 2000), max_size=30), capacity=st.integers(0, 4000), share=st.floats(0.01, 1.0))
def test_everything_goes_on_sooner_or_later(lengths: list[int], capacity: int, share: float) -> None:
    budget, waiting, running = ReplayBudget(share), list(enumerate(lengths)), []
    rounds = 0
    while waiting:
        while waiting and budget.allows(waiting[0][1], capacity):
            number, tokens = waiting.pop(0)
            budget.take(RequestId(str(number)), tokens)
            running.append((number, tokens))
            assert budget.held_tokens <= max(tokens, share * capacity) or len(running) == 1
        assert running
        budget.give_back(RequestId(str(running.pop(0)[0])))
        rounds += 1
    assert rounds <= len(lengths)
