"""The standing test: the same greedy tokens from P/D, colocated and Hugging Face transformers.

The reference file is made by tests/reference/make_reference.py from the same dequantized weights; it holds, per prompt,
the smallest margin between the two best logits. The negative controls break a handoff on purpose and must be noticed.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.deployment import Deployment, deployed

from biphase.client import AsyncClient
from biphase.protos.values import FinishReason

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

REFERENCE = Path(__file__).parent.parent / "reference" / "smollm2_greedy.json"
MIN_MARGIN = 1e-3


@dataclass(frozen=True)
class Case:
    name: str
    prompt: list[int]
    tokens: list[int]
    max_tokens: int


def cases() -> list[Case]:
    return [Case(row["name"], row["prompt_ids"], row["tokens"], row["max_tokens"]) for row in rows()]


@pytest.fixture(scope="module")
def pd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("pd"), mode="strict") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("colocated"), prefill=0) as deployment:
        yield deployment


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(REFERENCE.read_text())["prompts"]
    return found


async def ask(client: AsyncClient, case: Case, decision: str) -> list[int]:
    tokens: list[int] = []
    async with client.generate(token_ids=case.prompt, max_tokens=case.max_tokens, temperature=0.0) as stream:
        async for delta in stream:
            assert delta.first_index == len(tokens) or not delta.token_ids
            tokens += delta.token_ids
        assert stream.result is not None
        assert stream.result.decision == decision
        assert stream.result.usage.output_tokens == len(tokens)
    return tokens


def different(wanted: list[Case], got: list[list[int]]) -> list[str]:
    return [case.name for case, tokens in zip(wanted, got, strict=True) if tokens != case.tokens]


def test_reference_file_is_worth_comparing_with() -> None:
    found = rows()
    assert len(found) >= 24
    assert all(row["min_margin"] >= MIN_MARGIN for row in found)
    lengths = [len(row["prompt_ids"]) for row in found]
    assert min(lengths) == 1 and max(lengths) >= 2000
    assert any(len(row["tokens"]) == 1 and row["max_tokens"] > 1 for row in found), "EOS as the first token"
    assert any(row["max_tokens"] == 1 for row in found)
    assert any(row.get("stop") for row in found)


async def test_text_and_chats_and_stop_strings_give_the_recorded_text(pd: Deployment) -> None:
    """The same prompts as a user sends them: tokenised, templated and detokenised by the router."""
    async with AsyncClient(pd.address) as client:

        async def check(row: dict[str, Any]) -> None:
            options = {"max_tokens": row["max_tokens"], "temperature": 0.0}
            messages = [{"role": role, "content": content} for role, content in row.get("messages", ())]
            prompt = {"messages": messages} if messages else {"prompt": row["text"]}
            stream = client.generate(**prompt, **options)
            assert await stream.text() == row["output_text"], row["name"]
            assert stream.result.usage.prompt_tokens == len(row["prompt_ids"]), row["name"]
            if "stop" in row:
                stream = client.generate(**prompt, **options, stop=row["stop"])
                assert await stream.text() == row["stop_text"]
                assert stream.result.finish_reason is FinishReason.STOP
                assert stream.result.stop_reason == row["stop"][0]
                assert stream.result.usage.output_tokens == row["stop_tokens"]

        sent = [row for row in rows() if "messages" in row or "text" in row]
        assert len(sent) >= 12
        await asyncio.gather(*(check(row) for row in sent))


async def test_pd_one_at_a_time_equals_transformers(pd: Deployment) -> None:
    wanted = cases()
    async with AsyncClient(pd.address) as client:
        got = [await ask(client, case, "disaggregated") for case in wanted]
    assert different(wanted, got) == []


async def test_pd_32_at_once_equals_one_at_a_time(pd: Deployment) -> None:
    wanted = (cases() * 2)[:32]
    async with AsyncClient(pd.address) as client:
        got = await asyncio.gather(*(ask(client, case, "disaggregated") for case in wanted))
    assert different(wanted, list(got)) == []


async def test_colocated_equals_transformers(colocated: Deployment) -> None:
    wanted = cases()
    async with AsyncClient(colocated.address) as client:
        got = await asyncio.gather(*(ask(client, case, "local") for case in wanted))
    assert different(wanted, list(got)) == []


async def test_block_pressure_changes_no_token(tmp_path: Path) -> None:
    """A decode pool far too small for what it runs: preemptions, and not one token other than alone.

    How often a round preempts depends on how fast prefill is beside decode; rounds go on until it was often enough.
    """
    growing = [case for case in cases() if len(case.prompt) <= 64 and len(case.tokens) == 64]
    longer = [case for case in cases() if 64 < len(case.prompt) <= 260]
    wanted = (growing * 3 + longer)[:32]
    assert len(wanted) == 32
    args = ["--block-size", "16", "--max-model-len", "512", "--num-kv-blocks", "40"]
    with deployed(tmp_path, prefill_args=["--block-size", "16", "--max-model-len", "512"], decode_args=args) as tight:
        async with AsyncClient(tight.address) as client:
            for _ in range(12):
                got = await asyncio.gather(*(ask(client, case, "disaggregated") for case in wanted))
                assert different(wanted, list(got)) == []
                counters = await worker_counters(tight.decode[0].address)
                if counters["preemptions"] >= 20 and counters["preemptions_handed_off"] >= 5:
                    break
    assert counters["preemptions"] >= 20
    assert counters["preemptions_handed_off"] >= 5
    assert counters["blocks_used"] == 0


async def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(pd: Deployment, colocated: Deployment) -> None:
    case = next(case for case in cases() if 20 <= len(case.prompt) <= 200)

    async def sample(client: AsyncClient, seed: int) -> list[int]:
        tokens: list[int] = []
        options = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
        async for delta in client.generate(token_ids=case.prompt, max_tokens=32, seed=seed, ignore_eos=True, **options):
            tokens += delta.token_ids
        return tokens

    async with AsyncClient(pd.address) as split, AsyncClient(colocated.address) as one:
        alone = await sample(split, 7)
        crowd = await asyncio.gather(*(sample(split, seed) for seed in (1, 7, 2, 3, 4, 5)))
        local = await sample(one, 7)
        local_crowd = await asyncio.gather(*(sample(one, seed) for seed in (9, 8, 7)))
    assert len(alone) == 32
    assert alone == crowd[1] == local == local_crowd[2]
    assert len({tuple(tokens) for tokens in crowd}) >= 5, "other seeds give other tokens"


@pytest.mark.parametrize("swap", ["none", "blocks", "heads", "layers"])
async def test_negative_control_a_swapped_handoff_changes_tokens(tmp_path: Path, swap: str) -> None:
    """P packs wrongly *before* the digest: only the comparison of tokens can see it, so it has to."""
    wanted = [
        case for case in cases() if 30 < len(case.prompt) <= 300 and len(case.prompt) % 32 and len(case.tokens) >= 32
    ][:4]
    assert len(wanted) == 4
    command = [sys.executable, str(Path(__file__).parent.parent / "support" / "tampered_prefill.py"), "--swap", swap]
    with deployed(tmp_path, mode="strict", prefill_command=command) as deployment:
        async with AsyncClient(deployment.address) as client:
            got = await asyncio.gather(*(ask(client, case, "disaggregated") for case in wanted))
    assert bool(different(wanted, list(got))) == (swap != "none")


async def worker_counters(address: str) -> dict[str, int]:
    import grpc.aio

    from biphase.protos import worker_pb2, worker_pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        stats = await worker_pb2_grpc.WorkerStub(channel).GetStats(worker_pb2.StatsRequest())
    return dict(stats.counters)
