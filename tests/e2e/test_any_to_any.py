"""Every plan hands over to every other: the same greedy tokens, and the same KV, bit for bit.

Tokens are those of Hugging Face transformers, where the two best logits are far enough apart on the whole way; KV is what
each rank writes down of itself (support/witnessed_worker.py). Each plan is started once per side, one thread per rank; the
pairs are requests. The negative controls break a handoff on purpose, before the digests are taken, and must be noticed.
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.link_client import LinkClient, hand_over
from support.random_llama import Case, write_random_llama
from support.rank_processes import RankProcesses

from biphase.kvtransfer.nixl.library import why_not
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import Role, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SUPPORT = Path(__file__).parent.parent / "support"
REFERENCE = Path(__file__).parent.parent / "reference" / "smollm2_greedy.json"
ALL_PLANS = [ParallelPlan(tp=tp, pp=pp) for pp in (1, 2) for tp in (1, 2, 4)]
SMALL_POOL = ["--num-kv-blocks", "128", "--max-model-len", "512", "--max-num-batched-tokens", "64"]


@dataclass(frozen=True)
class Model:
    """``heads``: KV heads."""

    source: str
    layers: int
    heads: int
    cases: list[Case]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    return Model(str(folder), 4, 2, write_random_llama(folder))


def smollm2() -> Model:
    rows = json.loads(REFERENCE.read_text())["prompts"]
    rows = [row for row in rows if len(row["prompt_ids"]) <= 120 and len(row["tokens"]) >= 16][:4]
    cases = [Case(prompt=row["prompt_ids"], tokens=row["tokens"][:16], margin=row["min_margin"]) for row in rows]
    assert len(cases) == 4
    return Model("smollm2", 30, 3, cases)


class Fleet:
    """Instances of one model that write down their KV, and the requests that go through pairs of them."""

    def __init__(self, folder: Path, model: Model) -> None:
        self._folder = folder
        self._model = model
        self._instances: dict[tuple[Role, ParallelPlan], RankProcesses] = {}

    def start(self, role: Role, plans: Sequence[ParallelPlan], *flags: str, command: Sequence[str] = ()) -> None:
        """Each plan once. Block sizes differ between the sides for plans of two stages."""
        folder = self._folder / role
        folder.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            witnessed = (sys.executable, str(SUPPORT / "witnessed_worker.py"), role, str(self._witness(role, plan)))
            size = "32" if role == "decode" and plan.pp == 2 else "16"
            arguments = ["--model", self._model.source, "--block-size", size, *SMALL_POOL, *flags]
            self._instances[role, plan] = RankProcesses.spawn(
                folder, role, plan, arguments, command=command or witnessed
            )
        for plan in plans:
            self._instances[role, plan].wait_ready()

    def stop(self) -> None:
        for instance in self._instances.values():
            instance.stop()

    @contextlib.asynccontextmanager
    async def link(self, role: Role, plan: ParallelPlan) -> AsyncIterator[LinkClient]:
        async with LinkClient(self._instances[role, plan].wait_ready()) as link:
            yield link

    async def tokens_of(self, source: ParallelPlan, target: ParallelPlan) -> list[list[int]]:
        """Every case handed from one to the other, all at once; afterwards nothing is held anywhere."""
        async with self.link("prefill", source) as prefill, self.link("decode", target) as decode:

            async def one(case: Case) -> list[int]:
                sampling = Sampling(max_tokens=len(case.tokens), ignore_eos=True)
                first, second = await hand_over(prefill, decode, case.prompt, sampling)
                assert second is not None, "one token only"
                assert second.handed_off is not None, second.detail
                return first.text + second.text

            found = await asyncio.gather(*(one(case) for case in self._model.cases))
            for link in (prefill, decode):
                async with asyncio.timeout(10.0):
                    while (stats := await link.stats())["blocks_used"] or stats.get("tickets") or stats["legs"]:
                        await asyncio.sleep(0.01)
        return list(found)

    async def local_tokens(self, plan: ParallelPlan) -> list[list[int]]:
        """Every case on a decode instance alone."""
        async with self.link("decode", plan) as decode:

            async def one(case: Case) -> list[int]:
                leg = await decode.open_decode(case.prompt, Sampling(max_tokens=len(case.tokens), ignore_eos=True))
                assert await leg.end() == "done", leg.detail
                return leg.text

            return list(await asyncio.gather(*(one(case) for case in self._model.cases)))

    async def check_pair(self, source: ParallelPlan, target: ParallelPlan, transport: str) -> None:
        """Until all of a round has gone by ``transport``: a pull does not wait for a pair group that is being built."""
        name = f"{source} -> {target}"
        async with asyncio.timeout(300.0):
            while True:
                before, stats = len(self._written("decode", target)), await self._stats(target)
                tokens = await self.tokens_of(source, target)
                assert tokens == [case.tokens for case in self._model.cases], name
                self._check_kv(source, target, self._written("decode", target)[before:], name)
                moved = Counter(await self._stats(target))
                moved.subtract(stats)
                assert moved["bytes_pulled"] > 0 and moved["fallbacks"] == 0, f"{name}: {moved}"
                if moved[f"bytes_by_{transport}"] == moved["bytes_pulled"]:
                    return
                assert transport == "dist", f"{name}: {moved}"

    async def _stats(self, target: ParallelPlan) -> dict[str, int]:
        async with self.link("decode", target) as decode:
            return await decode.stats()

    def _check_kv(self, source: ParallelPlan, target: ParallelPlan, held: list[dict], name: str) -> None:  # type: ignore[type-arg]
        """What decode ranks had after a pull is what prefill ranks had of the same ticket: all of it, on every rank."""
        there: dict[tuple[str, str], set[str]] = {}
        for line in self._written("prefill", source):
            for part, digest in line["digests"].items():
                there.setdefault((line["ticket"], part), set()).add(digest)
        tickets = {line["ticket"] for line in held}
        assert len(tickets) == len(self._model.cases), name
        assert len(held) == len(tickets) * target.num_ranks, name
        for line in held:
            for part, digest in line["digests"].items():
                assert there[line["ticket"], part] == {digest}, f"{name}: layer/head {part} of {line['tokens']} tokens"
        for ticket in tickets:
            parts = [part for line in held if line["ticket"] == ticket for part in line["digests"]]
            replicas = max(1, target.tp // self._model.heads)
            assert len(parts) == self._model.layers * self._model.heads * replicas, name
            assert len(set(parts)) == self._model.layers * self._model.heads, name

    def _written(self, role: Role, plan: ParallelPlan) -> list[dict]:  # type: ignore[type-arg]
        file = self._witness(role, plan)
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _witness(self, role: Role, plan: ParallelPlan) -> Path:
        return self._folder / f"{role}-tp{plan.tp}-pp{plan.pp}.kv"


@contextlib.contextmanager
def fleet(folder: Path, model: Model) -> Iterator[Fleet]:
    made = Fleet(folder, model)
    try:
        yield made
    finally:
        made.stop()


async def check_matrix(
    folder: Path, model: Model, sources: Sequence[ParallelPlan], targets: Sequence[ParallelPlan], transport: str
) -> None:
    flags = ["--kv-transport", transport]
    with fleet(folder, model) as made:
        await asyncio.to_thread(made.start, "prefill", sources, *flags)
        await asyncio.to_thread(made.start, "decode", targets, *flags)
        for target in targets:
            assert await made.local_tokens(target) == [case.tokens for case in model.cases], f"local on {target}"
            for source in sources:
                await made.check_pair(source, target, transport)


@pytest.mark.parametrize(
    "transport, sources, targets",
    [
        ("grpc", [(1, 2), (4, 1)], [(1, 1), (2, 2)]),
        ("dist", [(2, 2)], [(4, 1)]),
    ],
)
async def test_some_plans_to_some_others(
    tmp_path: Path, llama: Model, transport: str, sources: list[tuple[int, int]], targets: list[tuple[int, int]]
) -> None:
    """Fewer and more places, fewer and more stages, heads on several ranks at either end, unequal blocks."""
    of = [[ParallelPlan(tp=tp, pp=pp) for tp, pp in plans] for plans in (sources, targets)]
    await check_matrix(tmp_path, llama, of[0], of[1], transport)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["grpc", "dist"])
async def test_every_plan_to_every_other(tmp_path: Path, llama: Model, transport: str) -> None:
    await check_matrix(tmp_path, llama, ALL_PLANS, ALL_PLANS, transport)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
async def test_some_plans_over_the_other_transports(tmp_path: Path, llama: Model, transport: str) -> None:
    if transport == "nixl" and (reason := why_not()) is not None:
        pytest.skip(reason)
    plans = [ParallelPlan(tp=4, pp=1), ParallelPlan(tp=2, pp=2), ParallelPlan(tp=1, pp=1)]
    await check_matrix(tmp_path, llama, plans, plans, transport)


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("transport", ["grpc", "dist"])
async def test_three_places_and_two_stages_of_smollm2(tmp_path: Path, transport: str) -> None:
    six, one = ParallelPlan(tp=3, pp=2), ParallelPlan()
    await check_matrix(tmp_path, smollm2(), [six, one], [six, one], transport)


@pytest.mark.parametrize("swap", ["blocks", "heads", "layers"])
async def test_negative_control_a_swapped_handoff_changes_tokens(tmp_path: Path, llama: Model, swap: str) -> None:
    """Each stage of the source packs wrongly before the digest: only the tokens can show it, so they have to."""
    source, target = ParallelPlan(pp=2), ParallelPlan()  # both heads in each piece
    tampered = [sys.executable, str(SUPPORT / "tampered_prefill.py"), "--swap", swap]
    with fleet(tmp_path, llama) as made:
        await asyncio.to_thread(made.start, "prefill", [source], "--kv-transport", "grpc", command=tampered)
        await asyncio.to_thread(made.start, "decode", [target], "--kv-transport", "grpc")
        assert await made.tokens_of(source, target) != [case.tokens for case in llama.cases]
