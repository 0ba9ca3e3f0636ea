"""A step plan, and what a rank answers when it is over, as messages. Pure.

Lists of numbers travel as their 32 bit values in one run of bytes: the block tables of a large batch are thousands of
them in every step.
"""

from array import array
from collections.abc import Sequence
from typing import Any, cast

from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import EngineLost, InvalidRequest, one_line
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

Tokens = tuple[int | None, ...]


def step_message(number: int, plan: StepPlan) -> dict[str, Any]:
    return {"kind": "step", "number": number, "seqs": [_packed(seq) for seq in plan.seqs]}


def plan_of(message: dict[str, Any]) -> StepPlan:
    return StepPlan(seqs=tuple(_unpacked(*fields) for fields in message["seqs"]))


def done_message(number: int, tokens: Tokens | None) -> dict[str, Any]:
    """``tokens``: of the rank that says what was drawn."""
    return {"kind": "done", "number": number, "tokens": tokens}


def failed_message(number: int, error: BaseException) -> dict[str, Any]:
    return {"kind": "done", "number": number, "error": type(error).__name__, "text": one_line(error)}


def error_of(rank: int, message: dict[str, Any]) -> InvalidRequest | EngineLost | None:
    """What a rank's answer says went wrong. Only a plan that a rank refuses leaves it in step with the others."""
    if "error" not in message:
        return None
    if message["error"] == InvalidRequest.__name__:
        return InvalidRequest(message["text"])
    return EngineLost(f"rank {rank}: {message['error']}: {message['text']}")


def _packed(seq: SeqStep) -> list[Any]:
    drawn = seq.sampling
    return [
        seq.seq_id,
        _bytes(seq.token_ids),
        seq.start,
        _bytes(seq.blocks),
        None if drawn is None else _sampling(drawn),
        seq.output_index,
        list(seq.forbid_ids),
        seq.continues,
    ]


def _unpacked(
    seq_id: int,
    token_ids: bytes,
    start: int,
    blocks: bytes,
    sampling: list[Any] | None,
    output_index: int,
    forbid_ids: list[int],
    continues: bool,
) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(seq_id),
        token_ids=_numbers(token_ids),
        start=start,
        blocks=cast("list[BlockId]", _numbers(blocks)),
        sampling=None if sampling is None else _sampling_of(sampling),
        output_index=output_index,
        forbid_ids=tuple(forbid_ids),
        continues=continues,
    )


def _sampling(sampling: Sampling) -> list[Any]:
    return [
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seed,
        sampling.branch,
        sampling.max_tokens,
        sampling.min_tokens,
        sampling.ignore_eos,
        list(sampling.stop_token_ids),
    ]


def _sampling_of(fields: list[Any]) -> Sampling:
    temperature, top_k, top_p, min_p, seed, branch, max_tokens, min_tokens, ignore_eos, stop_token_ids = fields
    return Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        branch=branch,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token_ids),
    )


def _bytes(numbers: Sequence[int]) -> bytes:
    return array("i", numbers).tobytes()


def _numbers(data: bytes) -> list[int]:
    numbers = array("i")
    numbers.frombytes(data)
    return numbers.tolist()
