"""When the benches of faults hit: the victim has work in hand by then."""

import asyncio
from dataclasses import dataclass, field

import pytest
from fault_outcome import Fault
from fault_work import BURST, PROMPTS, at_work, needs_prompts, prompt_burst, work_needed
from load_clock import shifted

from biphase.client.bench.measured import DONE, Measured


@dataclass
class Stream:
    address: str = "a:1"
    tokens: list[int] = field(default_factory=lambda: [1, 2, 3])


class Looks:
    """Each look at the deployment has the next of what was told, the last one again and again."""

    def __init__(self, *found: int | None) -> None:
        self._found, self.asked = list(found), list[str]()

    def _next(self, what: str) -> int | None:
        self.asked.append(what)
        return self._found.pop(0) if len(self._found) > 1 else self._found[0]

    async def legs_on(self, name: str) -> int | None:
        return self._next(f"legs on {name}")

    async def streams_on(self, name: str) -> int:
        return self._next(f"streams of {name}") or 0

    async def open_pulls(self, name: str) -> int:
        return self._next(f"pulls of {name}") or 0


def fault(kind: str, victim: str) -> Fault:
    return Fault(kind=kind, victim=victim, other="prefill-0")  # type: ignore[arg-type]


def work_at_hit(hit: Fault, looks: Looks, streams: list[Stream], address: str = "") -> tuple[int, list[int]]:
    """(what the victim had, how many streams ran each time that prompts were sent)"""
    sent: list[int] = []
    live = dict(enumerate(streams))
    return asyncio.run(at_work(looks, hit, live, address, lambda: sent.append(len(live)))), sent


def test_a_decode_instance_is_hit_with_streams_and_one_to_spare() -> None:
    looks = Looks(0, 3, 4, 6)
    assert work_at_hit(fault("kill", "decode-0"), looks, [Stream()] * BURST) == (6, [])
    assert looks.asked == ["streams of decode-0"] * 4


@pytest.mark.parametrize("streams", [[Stream()] * (BURST - 1), [*[Stream()] * (BURST - 1), Stream(tokens=[1])]])
def test_a_decode_instance_is_hit_once_the_burst_has_been_prefilled(
    streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fault_work.AT_WORK_WITHIN_S", 0.05)
    looks = Looks(6)
    assert work_at_hit(fault("kill", "decode-0"), looks, streams) == (0, [])
    assert looks.asked == []


def test_a_prefill_instance_is_hit_with_prompts_that_were_sent_once_the_others_decode() -> None:
    looks = Looks(0, 2, 4)
    assert work_at_hit(fault("stop", "prefill-0"), looks, [Stream()] * 5) == (4, [5])
    assert looks.asked == ["legs on prefill-0"] * 3


def test_a_pair_is_cut_while_one_end_pulls() -> None:
    looks = Looks(0, 0, 1)
    assert work_at_hit(fault("pair", "decode-0"), looks, [Stream()] * 5) == (1, [5])
    assert looks.asked == ["pulls of decode-0"] * 3


def test_a_router_is_hit_with_streams_of_its_own() -> None:
    streams = [Stream()] * 5 + [Stream("b:1")] * 3 + [Stream(tokens=[1])]
    assert work_at_hit(fault("kill", "router-0"), Looks(0), streams, "a:1") == (5, [])


def test_what_never_comes_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fault_work.AT_WORK_WITHIN_S", 0.0)
    assert work_at_hit(fault("kill", "prefill-0"), Looks(1), [Stream()] * 5) == (1, [5])
    assert work_at_hit(fault("kill", "decode-0"), Looks(None), [Stream()] * 5) == (0, [])


def test_who_needs_prompts_gets_enough_of_them() -> None:
    assert needs_prompts(fault("kill", "prefill-0")) and needs_prompts(fault("pair", "decode-0"))
    assert not needs_prompts(fault("kill", "decode-0")) and not needs_prompts(fault("stop", "controller"))
    assert len(prompt_burst(64)) == PROMPTS > work_needed(fault("kill", "prefill-0")) > 0
    assert len({one.index for one in prompt_burst(64)}) == PROMPTS


def test_a_later_load_is_put_on_the_clock_of_an_earlier_one() -> None:
    late = Measured(
        index=0,
        phase=0,
        due_s=0.0,
        sent_s=0.1,
        ended_s=2.0,
        token_at_s=(1.0, 2.0),
        input_tokens=1,
        asked_tokens=2,
        kind=DONE,
    )
    (found,) = shifted([late], 5.0)
    assert (found.due_s, found.sent_s, found.ended_s, found.token_at_s) == (5.0, 5.1, 7.0, (6.0, 7.0))
    assert found.ttft_ms == pytest.approx(late.ttft_ms)
