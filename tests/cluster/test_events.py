"""Events: numbered on over restarts, bounded, followed."""

import asyncio

import pytest

from biphase.cluster import events
from biphase.cluster.events import BEGIN, EventLog


class Kept:
    """What a backend keeps, counted by writes."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.writes = 0

    async def save_state(self, text: str, key: str) -> None:
        self.texts[key] = text
        self.writes += 1

    async def load_state(self, key: str) -> str | None:
        return self.texts.get(key)


async def made(kept: Kept) -> EventLog:
    log = EventLog(kept, lambda: 1000.0)
    await log.open()
    return log


async def test_numbers_go_on_in_the_next_life() -> None:
    kept = Kept()
    log = await made(kept)
    for number in range(1, 251):
        assert log.add("start", "decode-0", f"event {number}").number == number
        if number % 40 == 0:
            await log.keep()
    await log.keep()
    again = await made(kept)
    assert [event.number for event in again.after(0)] == list(range(1, 251))
    assert again.add("end", "", "more").number == 251
    assert again.after(250)[0].text == "more"


async def test_one_more_event_is_two_small_writes() -> None:
    kept = Kept()
    log = await made(kept)
    for _ in range(150):
        log.add("start", "", "x")
    await log.keep()
    kept.writes = 0
    log.add("start", "", "x")
    await log.keep()
    await log.keep()
    assert kept.writes == 2


async def test_it_is_bounded_and_its_keys_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENTS", 300)
    kept = Kept()
    log = await made(kept)
    for number in range(1000):
        log.add("start", "", str(number))
        if number % 7 == 0:
            await log.keep()
    await log.keep()
    assert len(log.after(0)) == 300
    assert len(kept.texts) <= 300 // events.CHUNK + 2
    again = await made(kept)
    assert again.after(0)[-1].number == 1000
    assert len(again.after(0)) >= 250


async def test_what_cannot_be_read_is_left_out() -> None:
    kept = Kept()
    log = await made(kept)
    log.add("start", "", "x")
    await log.keep()
    kept.texts["events/0"] = "not json"
    again = await made(kept)
    assert again.add("start", "", "y").number == 2


async def test_followers_get_what_was_and_what_comes() -> None:
    log = await made(Kept())
    log.add("start", "", "a")
    log.add("decision", "", "b")
    seen: list[str] = []

    async def follow() -> None:
        async for event in log.follow(1):
            seen.append(event.text)
            if event.text == "c":
                return

    task = asyncio.create_task(follow())
    while seen != ["b"]:
        await asyncio.sleep(0)
    log.add("end", "", "c")
    await task
    assert seen == ["b", "c"]
    assert [event.text for event in log.last(1, frozenset({"decision"}))] == ["b"]


def test_the_last_decisions_are_those_of_this_deployment_and_not_of_one_that_had_its_name() -> None:
    log = EventLog(Kept(), lambda: 0.0)
    log.add("scale", "", "of the one before")
    log.add(*BEGIN, "another deployment begins")
    assert log.last(5, frozenset({"scale"})) == []
    log.add("scale", "", "mine")
    log.add("start", "controller", "the controller began its life 2")
    log.add("flip", "decode-0", "mine too")
    assert [event.text for event in log.last(5, frozenset({"scale", "flip"}))] == ["mine", "mine too"]
