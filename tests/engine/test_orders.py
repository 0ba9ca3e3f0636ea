"""Which orders an instance obeys, and in which words it refuses the others."""

from dataclasses import dataclass, field

import pytest

from biphase.engine.link import Identity
from biphase.engine.orders import Orders, Turn
from biphase.protos.values import ROLES, ModelInfo

MODEL = ModelInfo(
    name="m", model_hash=b"", vocab_size=9, max_model_len=9, eos_token_ids=(), architecture="a", dtype="float32"
)
US = Identity(
    name="decode-1",
    role="decode",
    incarnation=5,
    pid=1,
    model=MODEL,
    kv_address="",
    num_blocks=1,
    block_size=1,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    max_queued_tokens=1,
    threads=1,
    kv_bytes=1,
    version="0",
)


@dataclass
class FakeWorker:
    draining: bool = False
    drains: list[float] = field(default_factory=list)

    def drain(self, grace_s: float = 0.0) -> None:
        self.draining = True
        self.drains.append(grace_s)

    def resume(self) -> None:
        self.draining = False


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def orders(worker: FakeWorker) -> Orders:
    return Orders(worker, US, ROLES)


def test_a_flip_drains_and_says_what_follows(orders: Orders, worker: FakeWorker) -> None:
    assert orders.flip("prefill", 6, 2.5) is None
    assert worker.drains == [2.5] and orders.turning.is_set()
    assert orders.turn == Turn(role="prefill", incarnation=6)
    assert orders.flip("prefill", 6, 2.5) is None, "asked again by a controller that was restarted"
    assert worker.drains == [2.5]


@pytest.mark.parametrize(
    ("role", "incarnation", "grace_s", "told"),
    [
        (None, 6, 0.0, "the role is unknown, there are: prefill, decode"),
        ("decode", 6, 0.0, "decode-1 is a decode instance already"),
        ("prefill", 5, 0.0, "incarnation 5 is not above 5, which decode-1 lives"),
        ("prefill", 0, 0.0, "incarnation 0 is not above 5, which decode-1 lives"),
        ("prefill", 6, -1.0, "grace_s is -1.0, it must be a number from 0 up"),
    ],
)
def test_a_flip_that_makes_no_sense_changes_nothing(
    orders: Orders, worker: FakeWorker, role: str | None, incarnation: int, grace_s: float, told: str
) -> None:
    assert orders.flip(role, incarnation, grace_s) == told  # type: ignore[arg-type]
    assert not worker.draining and orders.turn is None and not orders.turning.is_set()


def test_what_drains_does_not_turn_until_it_is_resumed(orders: Orders, worker: FakeWorker) -> None:
    assert orders.drain(1.0) is None
    assert orders.flip("prefill", 6, 1.0) == "decode-1 is draining already: it is resumed first, or it ends"
    assert orders.resume() is None and not worker.draining
    assert orders.flip("prefill", 6, 1.0) is None


def test_what_turns_takes_no_other_order_but_to_retire(orders: Orders, worker: FakeWorker) -> None:
    assert orders.flip("prefill", 6, 1.0) is None
    told = "decode-1 turns into a prefill instance already"
    assert [orders.drain(0.0), orders.resume(), orders.flip("prefill", 7, 1.0)] == [told] * 3
    assert worker.drains == [1.0] and orders.turn == Turn(role="prefill", incarnation=6)
    assert orders.retire("it was replaced") is None
    assert orders.retiring.is_set() and orders.drain(0.0) == "decode-1 retires: it was replaced"


def test_a_process_that_was_asked_to_stop_is_not_resumed_nor_turned(orders: Orders, worker: FakeWorker) -> None:
    orders.stopping = True
    told = "decode-1 drains to stop"
    assert [orders.drain(0.0), orders.resume(), orders.flip("prefill", 6, 1.0)] == [told] * 3
    assert orders.turn is None and not worker.drains
