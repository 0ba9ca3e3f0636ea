"""BlockPool: literal ids, holders, hashes; a state machine that compares it with a model of who holds what."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from biphase.engine.block_pool import NO_PARENT, BlockPool
from biphase.protos.ids import BlockId


def test_blocks_come_in_rising_order_and_freed_ones_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    assert pool.allocate(3) == [0, 1, 2]
    assert repr(pool) == "<BlockPool [3 used, 1 free]>"
    pool.release([BlockId(0), BlockId(1)])
    assert pool.allocate(3) == [0, 1, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.check()


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_a_block_is_free_only_when_nobody_holds_it() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.hold(blocks[:1])
    pool.release(blocks)
    assert repr(pool) == "<BlockPool [1 used, 1 free]>"
    pool.release(blocks[:1])
    assert repr(pool) == "<BlockPool [0 used, 2 free]>"


def test_giving_back_too_often_or_holding_a_free_block_is_an_error() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    with pytest.raises(ValueError, match="block 0 is free already"):
        pool.release([BlockId(0)])
    with pytest.raises(ValueError, match="block 1 is free, it cannot be held"):
        pool.hold([BlockId(1)])
    with pytest.raises(ValueError, match="block -1 is free already"):
        pool.release([BlockId(-1)])
    with pytest.raises(ValueError, match="not 0 blocks of 16"):
        BlockPool(num_blocks=0, block_size=16)


def test_a_hash_covers_all_tokens_before_it_and_dies_with_the_block() -> None:
    pool = BlockPool(num_blocks=6, block_size=2, hash_key=b"k")
    blocks = pool.allocate(5)
    assert blocks is not None
    first = pool.record_full(blocks[0], NO_PARENT, [7, 8])
    second = pool.record_full(blocks[1], first, [9, 9])
    elsewhere = pool.record_full(blocks[2], NO_PARENT, [9, 9])
    twin = pool.record_full(blocks[3], NO_PARENT, [7, 8])
    assert twin == first and second != elsewhere
    assert pool.find(first) == blocks[0] and pool.find(second) == blocks[1]
    assert pool.hash_of(blocks[4]) is None
    pool.release(blocks[:1])
    assert pool.find(first) is None and pool.find(second) == blocks[1]
    pool.check()
    other_key = BlockPool(num_blocks=1, block_size=2, hash_key=b"other")
    assert other_key.allocate(1) == [0]
    assert other_key.record_full(BlockId(0), NO_PARENT, [7, 8]) != first


def test_only_full_blocks_have_hashes() -> None:
    pool = BlockPool(num_blocks=1, block_size=4)
    with pytest.raises(ValueError, match="a full block has 4 tokens, not 3"):
        pool.record_full(BlockId(0), NO_PARENT, [1, 2, 3])


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go in any order; the pool must agree with a plain count."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=2)
        self.held: list[list[BlockId]] = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        blocks = self.pool.allocate(count)
        free_before = 12 - len({block for blocks in self.held for block in blocks})
        assert (blocks is None) == (count > free_before)
        if blocks is not None:
            assert len(set(blocks)) == count
            assert not {block for blocks in self.held for block in blocks} & set(blocks)
            self.held.append(blocks)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if self.held:
            blocks = list(data.draw(st.sampled_from(self.held)))
            self.pool.hold(blocks)
            self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 3), min_size=2, max_size=2))
    def record(self, data: st.DataObject, tokens: list[int]) -> None:
        blocks = [block for blocks in self.held for block in blocks]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            block_hash = self.pool.record_full(block, NO_PARENT, tokens)
            assert self.pool.hash_of(block) == block_hash

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        for block in range(12):
            assert self.pool.references(BlockId(block)) == sum(blocks.count(BlockId(block)) for blocks in self.held)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
