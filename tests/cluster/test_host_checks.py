"""When hosts are checked, and what they get meanwhile."""

from biphase.cluster.host_checks import FIRST_AGAIN_S, MAX_AGAIN_S, MAX_FAILED_CHECKS, RETRY_S, HostChecks


def joined(*keys: str) -> HostChecks[str]:
    checks: HostChecks[str] = HostChecks()
    for key in keys:
        checks.join(key, 0.0)
    assert checks.due(0.0) == list(keys)
    return checks


def test_who_joins_gets_nothing_until_it_has_passed() -> None:
    checks = joined("a", "b")
    assert checks.due(1000.0) == [], "one check at a time"
    assert not checks.passes("a") and not checks.passes("b")
    assert (checks.unknown(5.0), checks.unknown(5.0, within_s=5.0)) == ({"a", "b"}, set())
    checks.answered("a", "", 1.0)
    assert (checks.passes("a"), checks.passes("b"), checks.refused, checks.due(1e6)) == (True, False, {}, []), (
        "it is not checked a second time"
    )
    checks.keep(lambda key: key != "b")
    checks.answered("b", "no weights", 2.0)
    assert (checks.passes("b"), checks.refused) == (False, {}), "the answer of one that is gone is nothing"


def test_what_is_answered_counts_at_once_and_is_looked_at_again_later_and_later() -> None:
    checks, now_s, waits = joined("a"), 0.0, []
    for _ in range(8):
        checks.answered("a", "no weights", now_s)
        assert (checks.refused, checks.unknown(now_s)) == ({"a": "no weights"}, set())
        assert checks.due(now_s + FIRST_AGAIN_S - 0.1) == []
        before_s, now_s = now_s, now_s + FIRST_AGAIN_S
        while not checks.due(now_s):
            now_s += 1.0
        assert checks.refused, "it stays refused while it is checked"
        waits.append(now_s - before_s)
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, MAX_AGAIN_S, MAX_AGAIN_S, MAX_AGAIN_S]
    checks.answered("a", "", now_s)
    assert (checks.refused, checks.passes("a")) == ({}, True), "what was repaired is taken back"


def test_one_check_that_fails_refuses_nobody() -> None:
    checks, now_s = joined("a"), 0.0
    for _ in range(MAX_FAILED_CHECKS - 1):
        checks.failed("a", "does not say", now_s)
        assert (checks.refused, checks.passes("a"), checks.unknown(now_s)) == ({}, False, {"a"})
        now_s += RETRY_S
        assert checks.due(now_s) == ["a"]
    checks.failed("a", "does not say", now_s)
    assert checks.refused == {"a": "does not say"}
    assert checks.due(now_s + FIRST_AGAIN_S) == ["a"]
    checks.answered("a", "", now_s)
    assert checks.passes("a")


def test_a_refusal_keeps_its_words_when_the_next_check_fails() -> None:
    checks = joined("a")
    checks.answered("a", "no weights", 0.0)
    checks.due(FIRST_AGAIN_S)
    checks.failed("a", "does not say", FIRST_AGAIN_S)
    assert checks.refused == {"a": "no weights"}
    assert checks.due(3 * FIRST_AGAIN_S) == ["a"]


def test_a_pass_ends_what_was_counted_before() -> None:
    checks, now_s = joined("a"), 0.0
    for _ in range(MAX_FAILED_CHECKS):
        checks.failed("a", "does not say", now_s)
    checks.answered("a", "", 10.0)
    for number in range(1, MAX_FAILED_CHECKS):
        checks.failed("a", "does not say", 500.0)
        assert (checks.refused, checks.passes("a")) == ({}, True), f"{number} failed since"
        assert checks.due(500.0 + RETRY_S) == ["a"]
    checks.failed("a", "does not say", 500.0)
    assert checks.refused == {"a": "does not say"}
    assert checks.due(500.0 + FIRST_AGAIN_S) == ["a"], "the first refusal since"


def test_the_wait_stays_bounded() -> None:
    checks = joined("a")
    for round_number in range(2000):
        checks.answered("a", "no weights", round_number * MAX_AGAIN_S)
        assert checks.due((round_number + 1) * MAX_AGAIN_S) == ["a"]


def test_one_that_has_passed_may_be_refused_by_a_later_look() -> None:
    checks = joined("a")
    checks.answered("a", "", 0.0)
    checks.join("a", 1.0)
    assert checks.passes("a"), "whoever is known stays as it is"
    checks.answered("a", "no weights", 1.0)
    assert not checks.passes("a")
    assert checks.due(1.0 + FIRST_AGAIN_S) == ["a"]
