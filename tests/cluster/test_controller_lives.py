"""When a controller that has ended is started again, and when its end is the deployment's."""

import pytest

from biphase.cluster.controller_lives import BACKOFF_S, STABLE_S, ControllerLives
from biphase.protos.errors import SetupError

BAD = "cannot listen on 10.0.0.1:8701: Address already in use"


def test_the_first_ones_failed_set_up_ends_the_deployment() -> None:
    lives = ControllerLives(1, may_fail=True)
    with pytest.raises(SetupError, match="Address already in use"):
        lives.ended(lived_s=0.1, was_up=False, failed=BAD)


def test_a_later_ones_failed_set_up_is_tried_again_later_and_later() -> None:
    lives = ControllerLives(1, may_fail=True)
    assert lives.ended(lived_s=STABLE_S, was_up=True, failed="") == 0.0
    waits = [lives.ended(lived_s=0.1, was_up=False, failed=BAD) for _ in range(6)]
    assert waits == [*BACKOFF_S[1:], BACKOFF_S[-1], BACKOFF_S[-1]]
    assert lives.incarnation == 8


def test_where_a_deployment_goes_on_the_first_one_is_tried_again_too() -> None:
    assert ControllerLives(5, may_fail=False).ended(lived_s=0.1, was_up=False, failed=BAD) > 0


def test_the_verdict_of_one_that_was_up_ends_the_deployment() -> None:
    lives = ControllerLives(1, may_fail=True)
    lives.ended(lived_s=0.1, was_up=True, failed="")
    with pytest.raises(SetupError, match="prefill-0"):
        lives.ended(lived_s=1.0, was_up=True, failed="prefill-0: no weights")


def test_one_that_lived_long_is_replaced_at_once() -> None:
    lives = ControllerLives(1, may_fail=True)
    assert lives.ended(lived_s=1.0, was_up=True, failed="") == BACKOFF_S[1]
    assert lives.ended(lived_s=STABLE_S, was_up=True, failed="") == 0.0
