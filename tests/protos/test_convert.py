"""Every value goes to its message and back unchanged, through bytes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.protos import common_pb2, convert, worker_pb2
from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.step_time import RecentSteps, StepTime
from biphase.protos.values import FinishReason, KvTicket, LegStats, Load, ModelInfo, Sampling, WorkerSignals

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
F32 = st.floats(width=32, allow_nan=False)
F64 = st.floats(allow_nan=False)
IDS = st.lists(U32, max_size=4).map(tuple)
STEP_TIMES = st.builds(StepTime, fixed_s=F64, per_token_s=F64, per_context_s=F64, num_steps=U64)

VALUES = {
    "sampling": st.builds(
        Sampling,
        temperature=F32,
        top_k=U32,
        top_p=F32,
        min_p=F32,
        seed=U64,
        branch=U32,
        max_tokens=U32,
        min_tokens=U32,
        ignore_eos=st.booleans(),
        stop_token_ids=IDS,
    ),
    "ticket": st.builds(
        KvTicket,
        id=st.binary(min_size=16, max_size=16).map(TicketId),
        kv_address=st.text(),
        instance=st.text().map(InstanceName),
        incarnation=U64.map(Incarnation),
        num_tokens=U32,
    ),
    "model": st.builds(
        ModelInfo,
        name=st.text(),
        model_hash=st.binary(),
        vocab_size=U32,
        max_model_len=U32,
        eos_token_ids=IDS,
        architecture=st.text(),
        dtype=st.text(),
    ),
    "stats": st.builds(
        LegStats,
        queue_ms=F64,
        prefill_ms=F64,
        transfer_ms=F64,
        transfer_bytes=U64,
        exposed_ms=F64,
        decode_ms=F64,
        preemptions=U32,
        cached_tokens=U32,
    ),
    "load": st.builds(
        Load,
        queued_tokens=U32,
        queued=U32,
        running=U32,
        free_blocks=U32,
        room_blocks=U32,
        draining=st.booleans(),
        legs=U32,
    ),
    "step_time": STEP_TIMES,
    "signals": st.builds(
        WorkerSignals,
        uptime_s=F64,
        prefill_tokens=U64,
        decode_tokens=U64,
        num_steps=U64,
        busy_s=F64,
        queued=U32,
        queued_tokens=U32,
        running=U32,
        running_tokens=U64,
        free_blocks=U32,
        prefill_step=STEP_TIMES,
        decode_step=STEP_TIMES,
        recent=st.builds(RecentSteps, num_steps=U32, seconds=F64, tokens=U64, context_tokens=U64),
    ),
}


@pytest.mark.parametrize("kind", VALUES)
@given(data=st.data())
def test_round_trip(kind: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[kind])
    message: Any = getattr(convert, f"{kind}_to_proto")(value)
    again = type(message).FromString(message.SerializeToString())
    assert getattr(convert, f"{kind}_from_proto")(again) == value


def test_every_pair_is_tested() -> None:
    pairs = {name.removesuffix("_to_proto") for name in vars(convert) if name.endswith("_to_proto")}
    assert pairs == set(VALUES) | {"finish", "role", "outcome"}
    assert pairs == {name.removesuffix("_from_proto") for name in vars(convert) if name.endswith("_from_proto")}


@pytest.mark.parametrize("finish", [None, *FinishReason])
def test_finish_round_trip(finish: FinishReason | None) -> None:
    assert convert.finish_from_proto(convert.finish_to_proto(finish)) is finish


def test_role_and_outcome_round_trip_over_all_their_names() -> None:
    roles = [value for value in common_pb2.Role.values() if value != common_pb2.ROLE_UNSPECIFIED]
    assert [convert.role_to_proto(convert.role_from_proto(value)) for value in roles] == roles
    outcomes = [value for value in worker_pb2.LegOutcome.values() if value != worker_pb2.LEG_UNSPECIFIED]
    assert [convert.outcome_to_proto(convert.outcome_from_proto(value)) for value in outcomes] == outcomes
    with pytest.raises(KeyError):
        convert.role_from_proto(common_pb2.ROLE_UNSPECIFIED)


@given(st.lists(U32))
def test_tokens_round_trip(token_ids: list[int]) -> None:
    packed = convert.pack_tokens(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert convert.unpack_tokens(packed) == token_ids


def test_tokens_are_little_endian_and_whole() -> None:
    assert convert.pack_tokens((1, 258)) == b"\x01\0\0\0\x02\x01\0\0"
    with pytest.raises(ValueError, match="multiple"):
        convert.unpack_tokens(b"\x01\0\0")
