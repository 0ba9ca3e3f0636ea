"""What instances can do under their share of the processors, measured: for the load of bench/live_shift.py and its headroom.

Capacity is measured in a closed loop: so many requests at once, each followed by the next as it ends, their first ones of
different lengths so that they do not end together; what comes in its second half counts.
"""

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from load_clock import shifted
from shift_shape import Shape, decode_step, first_tokens_per_s, length_for, tokens_between

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.measured import Measured
from biphase.client.bench.prompts import RandomPrompts
from biphase.client.bench.runner import Runner
from biphase.protos.values import Role

PREFILL_HEAVY_OUTPUT, DECODE_HEAVY_INPUT = 4, 16
PROBE_INPUT, PROBE_OUTPUT = 128, 48
GOAL_FACTOR = 5.0
NUM_UNLOADED = 5
PROMPTS_AT_ONCE, FEW_AT_ONCE, MANY_AT_ONCE = 12, 6, 20
"""Of an instance, in the closed loops of the calibration."""
LOOP_S, LONG_LOOP_S = 16.0, 40.0
"""The long one is for requests that take most of a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What came of a closed loop in its second half."""

    requests_per_s: float
    """By their first tokens."""
    tokens_per_s: float
    tpot_s: float
    """The median over requests that ended in it."""


async def burst(client: AsyncClient, count: int, input_tokens: int, output_tokens: int, gap_s: float) -> list[Measured]:
    """``count`` requests, ``gap_s`` apart."""
    due = [_arrival(index, index * gap_s, input_tokens, output_tokens) for index in range(count)]
    return _good(await Runner([client], await _prompts(client), timeout_s=300.0).run(due))


async def closed_loop(client: AsyncClient, at_once: int, input_tokens: int, output_tokens: int, seconds: float) -> Loop:
    prompts, numbers, found = await _prompts(client), itertools.count(), list[Measured]()
    began_s = time.perf_counter()

    async def lane(first_output: int) -> None:
        output = first_output
        while time.perf_counter() - began_s < seconds:
            runner = Runner([client], prompts, timeout_s=300.0)
            one = _good(await runner.run([_arrival(next(numbers), 0.0, input_tokens, output)]))
            found.extend(shifted(one, runner.began_at_s - began_s))
            output = output_tokens

    await asyncio.gather(*(lane(max(1, output_tokens * (index + 1) // at_once)) for index in range(at_once)))
    begin_s = seconds / 2
    late = [one.tpot_ms for one in found if begin_s <= one.ended_s and one.tpot_ms is not None]
    return Loop(
        requests_per_s=first_tokens_per_s(found, begin_s, seconds),
        tokens_per_s=tokens_between(found, begin_s, seconds) / (seconds - begin_s),
        tpot_s=statistics.median(late) / 1e3 if late else float("nan"),
    )


async def choose(client: AsyncClient, rate: float, headroom: Mapping[Role, float]) -> Shape:
    """Lengths by which ``rate`` leaves so much of what the right ratio of three can do, on a deployment of 1P2D.

    ``headroom``: of prompts where two instances prefill, of answers where two decode, parts of 1."""
    await burst(client, 2, 64, 8, 0.0)
    alone = [(await burst(client, 1, DECODE_HEAVY_INPUT, PROBE_OUTPUT, 0.0))[0] for _ in range(NUM_UNLOADED)]
    tpot_ms = GOAL_FACTOR * statistics.median(one.tpot_ms or 0.0 for one in alone)
    points = []
    for at_once in (FEW_AT_ONCE, MANY_AT_ONCE):
        found = await closed_loop(client, 2 * at_once, DECODE_HEAVY_INPUT, PROBE_OUTPUT, LOOP_S)
        points.append((float(at_once), found.tpot_s))
    step = decode_step(points[0], points[1])
    decode_rate = step.capacity(tpot_ms / 1e3)
    prompts = await closed_loop(client, PROMPTS_AT_ONCE, PROBE_INPUT, 1, LOOP_S)
    prefill_rate = prompts.requests_per_s * PROBE_INPUT
    input_tokens = length_for(prefill_rate, 2, rate, headroom["prefill"])
    output_tokens = length_for(decode_rate, 2, rate, headroom["decode"])
    longest = (await client.model_info()).model.max_model_len - DECODE_HEAVY_INPUT
    if max(input_tokens, output_tokens) > longest:
        most = max(input_tokens, output_tokens)
        raise SystemExit(f"--rate {rate:g} asks for {most} tokens a request, the most is {longest}: raise it")
    alone = [(await burst(client, 1, input_tokens, PREFILL_HEAVY_OUTPUT, 0.0))[0] for _ in range(NUM_UNLOADED)]
    ttft_ms = GOAL_FACTOR * statistics.median(one.ttft_ms or 0.0 for one in alone)
    return Shape(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        goals={"ttft": ttft_ms, "tpot": tpot_ms},
        prefill_rate=prefill_rate,
        decode_rate=decode_rate,
        decode_requests=int(step.most_at_once(tpot_ms / 1e3)),
    )


async def prefill_capacity(client: AsyncClient, shape: Shape, num_instances: int) -> float:
    """Requests/s of the prefill-heavy phase that so many prefill instances get through."""
    at_once = num_instances * PROMPTS_AT_ONCE
    found = await closed_loop(client, at_once, shape.input_tokens, PREFILL_HEAVY_OUTPUT, LONG_LOOP_S)
    return found.requests_per_s


async def decode_capacity(client: AsyncClient, shape: Shape, num_instances: int) -> float:
    """Requests/s of the decode-heavy phase that so many decode instances get through within the goal for TPOT."""
    at_once = num_instances * shape.decode_requests
    found = await closed_loop(client, at_once, DECODE_HEAVY_INPUT, shape.output_tokens, LONG_LOOP_S)
    return found.tokens_per_s / shape.output_tokens


def _arrival(index: int, at_s: float, input_tokens: int, output_tokens: int) -> Arrival:
    return Arrival(index=index, at_s=at_s, phase=0, input_tokens=input_tokens, output_tokens=output_tokens)


async def _prompts(client: AsyncClient) -> RandomPrompts:
    """Others every time."""
    model = (await client.model_info()).model
    return RandomPrompts(
        vocab_size=model.vocab_size, max_model_len=model.max_model_len, seed=0, salt=time.monotonic_ns()
    )


def _good(found: Sequence[Measured]) -> list[Measured]:
    bad = [one for one in found if not one.done]
    if bad:
        raise SystemExit(f"a request failed while nothing was wrong: {bad[0].detail}")
    return list(found)
