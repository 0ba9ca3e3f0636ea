"""What an instance is made for: both roles' largest steps, and what it becomes when it turns."""

import pytest

from biphase.engine.config import EngineConfig
from biphase.engine.worker_config import RoleLimits, WorkerConfig
from biphase.engine.worker_main import parse
from biphase.protos.errors import SetupError

OTHER = RoleLimits(max_num_seqs=100, max_num_batched_tokens=64, max_queued_tokens=300)


def config(**settings: object) -> WorkerConfig:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 2048, "local_prefill_tokens": 256, **settings}
    return WorkerConfig(name="p", role="prefill", incarnation=4, engine=EngineConfig(model="m"), **values)  # type: ignore[arg-type]


def test_the_engine_is_made_for_the_largest_step_of_both_roles() -> None:
    engine = config(other=OTHER).step_engine
    assert (engine.max_step_seqs, engine.max_step_tokens) == (100, 8 + 2048)
    many = config(other=RoleLimits(max_num_seqs=3000, max_num_batched_tokens=64)).step_engine
    assert (many.max_step_seqs, many.max_step_tokens) == (3000, 3000 + 256)
    alone = config().step_engine
    assert (alone.max_step_seqs, alone.max_step_tokens) == (8, 8 + 2048)


def test_a_turn_takes_the_other_limits_and_back_again() -> None:
    before = config(other=OTHER, max_queued_tokens=5000)
    turned = before.as_role("decode", 5)
    assert (turned.role, turned.incarnation, turned.own_limits) == ("decode", 5, OTHER)
    assert turned.step_engine == before.step_engine, "the engine that is loaded"
    back = turned.as_role("prefill", 6)
    assert back.own_limits == before.own_limits and (back.role, back.incarnation) == ("prefill", 6)
    assert before.as_role("prefill", 9).own_limits == before.own_limits


def test_without_other_limits_both_roles_have_the_same() -> None:
    assert config().as_role("decode", 5).own_limits == config().own_limits


def test_flags_give_what_is_different_in_the_other_role() -> None:
    flags = ["--model", "m", "--max-num-seqs", "4", "--max-num-batched-tokens", "96", "--other-max-num-seqs", "32"]
    found, _ = parse("prefill", flags)
    assert found.other == RoleLimits(max_num_seqs=32, max_num_batched_tokens=96)
    assert found.drain_s == 30.0
    assert parse("decode", ["--model", "m", "--drain-s", "0"])[0].other is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"drain_s": -1.0}, "drain_s is -1.0, it must be a number from 0 up"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0, it must be from 1 to 65536"),
        ({"max_queued_tokens": 0}, "max_queued_tokens is 0, it must be from 1 to"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(SetupError, match=told):
        config(**settings)
