"""Any plan to any other: every element once, from a rank that has it, evenly over replicas."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.pieces import contains
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.reshard import KvShape, moves
from biphase.protos.parallel_plan import ParallelPlan


def volume(box: KvBox) -> int:
    return box.num_layers * box.num_heads * box.num_tokens


@st.composite
def shapes(draw: st.DrawFn, num_layers: int, num_kv_heads: int) -> KvShape:
    tp = draw(st.sampled_from([tp for tp in range(1, 13) if num_kv_heads % tp == 0 or tp % num_kv_heads == 0]))
    pp = draw(st.integers(1, min(5, num_layers)))
    return KvShape(
        plan=ParallelPlan(tp=tp, pp=pp),
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        block_size=draw(st.sampled_from([1, 3, 4, 16])),
    )


@given(st.data(), st.integers(1, 9), st.integers(1, 8), st.integers(1, 90), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_every_element_arrives_once_from_a_rank_that_has_it(
    data: st.DataObject, num_layers: int, num_kv_heads: int, num_tokens: int, turn: int
) -> None:
    source, target = (data.draw(shapes(num_layers, num_kv_heads)) for _ in range(2))
    found = moves(source, target, num_tokens, turn)
    assert len({(move.source_rank, move.target_rank) for move in found}) == len(found)
    for rank in range(target.plan.num_ranks):
        wanted = target.box(rank, num_tokens)
        arrived = np.zeros((wanted.num_layers, wanted.num_heads, num_tokens), dtype=np.int64)
        for move in found:
            if move.target_rank == rank:
                box = move.box
                assert contains(wanted, box) and contains(source.box(move.source_rank, num_tokens), box)
                assert box.token_start % source.block_size == 0
                arrived[
                    box.layer_start - wanted.layer_start : box.layer_end - wanted.layer_start,
                    box.head_start - wanted.head_start : box.head_end - wanted.head_start,
                    box.token_start : box.token_end,
                ] += 1
        assert (arrived == 1).all()


@given(st.data(), st.integers(1, 9), st.integers(1, 8), st.integers(1, 300), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_replicas_share_the_load_to_a_block(
    data: st.DataObject, num_layers: int, num_kv_heads: int, num_tokens: int, turn: int
) -> None:
    source, target = (data.draw(shapes(num_layers, num_kv_heads)) for _ in range(2))
    assume(source.plan.tp > num_kv_heads)
    found = moves(source, target, num_tokens, turn)
    loads: dict[KvBox, Counter[int]] = defaultdict(Counter)
    for rank in range(source.plan.num_ranks):
        loads[source.box(rank, 1)][rank] = 0
    for move in found:
        loads[source.box(move.source_rank, 1)][move.source_rank] += volume(move.box)
    for held, group in loads.items():
        even = sum(group.values()) / len(group)
        a_block = source.block_size * held.num_layers * held.num_heads
        assert all(abs(load - even) <= a_block for load in group.values())


def test_the_replica_that_is_first_changes_with_the_request() -> None:
    source = KvShape(plan=ParallelPlan(tp=4), num_layers=2, num_kv_heads=1, block_size=16)
    target = KvShape(plan=ParallelPlan(), num_layers=2, num_kv_heads=1, block_size=16)
    assert {moves(source, target, 9, turn)[0].source_rank for turn in range(4)} == {0, 1, 2, 3}


def test_equal_plans_move_rank_to_rank() -> None:
    shape = KvShape(plan=ParallelPlan(tp=2, pp=2), num_layers=5, num_kv_heads=4, block_size=16)
    found = moves(shape, shape, 33)
    assert [(move.source_rank, move.target_rank) for move in found] == [(rank, rank) for rank in range(4)]
    assert [move.box for move in found] == [shape.box(rank, 33) for rank in range(4)]


def test_another_model_is_refused() -> None:
    shape = KvShape(plan=ParallelPlan(), num_layers=5, num_kv_heads=4, block_size=16)
    other = KvShape(plan=ParallelPlan(), num_layers=5, num_kv_heads=2, block_size=16)
    with pytest.raises(ValueError, match="5 layers of 4 KV heads against 5 of 2"):
        moves(shape, other, 1)


def test_a_ranks_memory_is_read_and_written_in_the_models_coordinates() -> None:
    full = KvLayout(num_layers=3, num_kv_heads=4, head_dim=8, block_size=4)
    plan, blocks = ParallelPlan(tp=2, pp=2), [2, 0, 1]
    whole = np.random.default_rng(1).standard_normal(full.pool_shape(3), dtype=np.float32)
    everything = CpuKvMemory(whole, full)
    for rank in range(4):
        layers, heads = plan.layers_of(rank, 3), plan.kv_heads_of(rank, 4)
        local = KvLayout(num_layers=len(layers), num_kv_heads=len(heads), head_dim=8, block_size=4)
        pool = np.zeros(local.pool_shape(3), dtype=np.float32)
        memory = RankMemory(CpuKvMemory(pool, local), full, plan, rank)
        box = memory.box(10)
        data, again = bytearray(box.num_bytes(full)), bytearray(box.num_bytes(full))
        everything.pack(blocks, box, data)
        memory.unpack(blocks, box, data)
        memory.pack(blocks, box, again)
        assert data == again
        assert np.array_equal(pool[:, 2], whole[layers.start : layers.stop, 2, :, heads.start : heads.stop])
        with pytest.raises(ValueError, match="lies outside"):
            memory.pack(blocks, full.box(10), bytearray(full.box(10).num_bytes(full)))
    with pytest.raises(ValueError, match="rank 0 of tp 2 x pp 2 holds"):
        RankMemory(everything, full, plan, 0)
