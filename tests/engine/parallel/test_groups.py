"""Sums, gathers and pipes between ranks, over gloo on loopback; and what a lost rank looks like from another."""

import socket
import threading

import psutil
import pytest
import torch
from support.ranks import HOST, on_ranks

from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.store import join_store, open_store
from biphase.protos.errors import EngineLost, SetupError
from biphase.protos.parallel_plan import ParallelPlan


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("count", [7, 200_000])
def test_a_sum_is_the_same_to_the_bit_on_every_place(tp: int, count: int) -> None:
    def work(groups: RankGroups) -> torch.Tensor:
        assert groups.tp is not None and groups.tp.size == tp and groups.tp.place == groups.rank
        mine = torch.randn(count, generator=torch.Generator().manual_seed(groups.rank))
        for _ in range(3):
            total = groups.tp.all_reduce(mine.clone())
        return total

    totals = on_ranks(ParallelPlan(tp=tp), work)
    parts = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(tp)]
    torch.testing.assert_close(totals[0], torch.stack(parts).sum(0))
    assert all(torch.equal(totals[0], other) for other in totals[1:])


def test_columns_of_unequal_places_come_together_on_place_0() -> None:
    whole = torch.arange(3 * 10.0).view(3, 10)
    cuts = [range(4), range(4, 7), range(7, 10)]

    def work(groups: RankGroups) -> tuple[torch.Tensor | None, torch.Tensor]:
        assert groups.tp is not None
        cut = cuts[groups.rank]
        mine = whole[:, cut.start : cut.stop]
        everywhere = torch.empty(3, 2)
        groups.tp.all_gather(everywhere, torch.tensor([groups.rank, 9.0]))
        return groups.tp.gather_columns(mine, [len(cut) for cut in cuts]), everywhere

    results = on_ranks(ParallelPlan(tp=3), work)
    assert results[0][0] is not None and torch.equal(results[0][0], whole)
    assert results[1][0] is None and results[2][0] is None
    for _, everywhere in results:
        assert everywhere.tolist() == [[0.0, 9.0], [1.0, 9.0], [2.0, 9.0]]


def test_pipes_connect_the_same_place_of_neighbouring_stages_and_keep_the_order() -> None:
    plan = ParallelPlan(tp=2, pp=3)

    def work(groups: RankGroups) -> list[float]:
        stage = plan.stage_of(groups.rank)
        assert (groups.previous is None) == (stage == 0) and (groups.next is None) == (stage == 2)
        assert groups.samples == (groups.rank == 4)
        seen = []
        for step in range(20):  # more than may be unsent: the first stage waits for the others, not for ever
            tensor = torch.full((step + 1,), 100.0 * plan.place_of(groups.rank) + step)
            if groups.previous is not None:
                groups.previous.recv(tensor.zero_())
                tensor += 1000
            seen.append(float(tensor[-1]))
            if groups.next is not None:
                groups.next.send(tensor)
        groups.meet("sent")
        return seen

    results = on_ranks(plan, work)
    for rank, seen in enumerate(results):
        base = 100 * plan.place_of(rank) + 1000 * plan.stage_of(rank)
        assert seen == [base + step for step in range(20)]


def test_a_rank_that_has_gone_ends_the_others_step() -> None:
    reached = threading.Event()

    def work(groups: RankGroups) -> str:
        assert groups.tp is not None
        groups.tp.all_reduce(torch.ones(4))
        if groups.rank == 1:
            reached.wait()
            groups.tp.close()
            return "gone"
        reached.set()
        with pytest.raises(EngineLost, match="another rank is lost"):
            groups.tp.all_reduce(torch.ones(4))
        return "told"

    assert on_ranks(ParallelPlan(tp=2), work) == ["told", "gone"]


def test_a_rank_that_does_not_answer_is_lost_at_the_deadline() -> None:
    over = threading.Event()

    def work(groups: RankGroups) -> None:
        assert groups.tp is not None
        if groups.rank == 1:
            over.wait()
            return
        try:
            with pytest.raises(EngineLost, match="another rank is lost"):
                groups.tp.all_reduce(torch.ones(4))
        finally:
            over.set()

    on_ranks(ParallelPlan(tp=2), work, timeout_s=1.0)


def test_ranks_that_do_not_come_are_a_set_up_error() -> None:
    store, port = open_store(HOST)
    said: list[str] = []
    with pytest.raises(SetupError, match="^not all of 3 ranks have joined within 0.1 s: missing is rank 1, 2$"):
        RankGroups.join(
            ParallelPlan(tp=3),
            0,
            store=store,
            host=HOST,
            backend="gloo",
            timeout_s=1.0,
            join_timeout_s=0.1,
            on_wait=said.append,
        )
    assert set(said) == {"1 of 3 ranks have joined, waiting for rank 1, 2"}
    with pytest.raises(SetupError, match=f"no store for the ranks on {HOST}:{port}"):
        open_store(HOST, port=port)


@pytest.mark.parametrize("host", [HOST, "::1"])
def test_the_store_listens_on_its_address_alone(host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")

    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections(kind="tcp")
        return {tuple(one.laddr[:2]) for one in found if one.status == psutil.CONN_LISTEN}

    before = listening()
    store, port = open_store(host)
    assert listening() - before == {(host, port)}
    other = join_store(host, port)
    other.set("a", "b")
    assert store.get("a") == b"b"
