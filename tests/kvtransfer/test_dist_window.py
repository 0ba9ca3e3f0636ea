"""What is under way on a pair group, whatever order the references come in and whichever never come."""

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kvtransfer.pair_groups.buffers import Buffers
from biphase.kvtransfer.pair_groups.ends import DistSender
from biphase.kvtransfer.pair_groups.window import WINDOW, DueWindow, Payload, SentWindow, WindowError, payload_of


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_receive_is_posted_once_in_order(data: st.DataObject) -> None:
    sent, due = SentWindow(), DueWindow()
    posted: list[Payload] = []
    all_sent: list[Payload] = []
    on_their_way: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 120))):
        if sent.num_open < WINDOW and data.draw(st.booleans()):
            size, pull = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1))
            number, reference = sent.add(size, pull)
            assert len(reference) <= 255 and payload_of(reference) == Payload(number, size, pull)
            all_sent.append(Payload(number, size, pull))
            on_their_way.append(reference)
        elif on_their_way:
            reference = on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1)))
            match data.draw(st.sampled_from(("comes", "never comes", "skipped"))):
                case "comes":
                    posted += due.learn(reference)
                    sent.half(payload_of(reference).number)  # the send has ended
                    sent.half(payload_of(reference).number)  # and the reader has done with it
                case "skipped":
                    sent.half(payload_of(reference).number)
        elif sent.num_open == WINDOW:  # nothing comes any more: the next pull's reader says where it is
            sent.acknowledge(due.last)
            posted += due.learn(sent.reference())
            sent.acknowledge(due.last)
            assert sent.num_open == 0
        assert posted == all_sent[: len(posted)]


@pytest.mark.parametrize(
    "reference", [b"", b"\1" * 8, bytes(8) + b"\1" + bytes(8), b"\5" + bytes(7) + b"\2" + bytes(8)]
)
def test_what_is_no_reference(reference: bytes) -> None:
    with pytest.raises(WindowError, match="is no reference"):
        DueWindow().learn(reference)


def test_a_reference_beyond_what_is_known() -> None:
    sent = SentWindow()
    sent.add(1, 1)
    sent.acknowledge(1)
    with pytest.raises(WindowError, match="payload 1 of the pair is due, the reference begins at 2"):
        DueWindow().learn(sent.add(1, 1)[1])
    with pytest.raises(WindowError, match="no payload"):
        payload_of(SentWindow().reference())


class FillingPair:
    """A sending pair that other pulls fill between a room and what is sent from it, and that nobody empties."""

    def __init__(self) -> None:
        self.users = 0
        self.full = False
        self.built: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.built.set_result(None)

    def check(self) -> None:
        pass

    async def changed(self) -> None:
        await asyncio.Event().wait()


async def test_a_full_pair_is_not_waited_for_without_end() -> None:
    buffers = Buffers(0, lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    pair: Any = FillingPair()
    sender = DistSender(pair, 1, buffers, b"", wait_s=0.05)
    room = await sender.room(10)
    pair.full = True
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionError, match=r"the reader has taken nothing for 0\.05 s"):
            await sender.send(room)
