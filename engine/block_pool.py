"""Who holds which block of KV memory: reference counts, a free list, and the hashes of full blocks.

Pure: no clock, no torch, no threads. A block is free only when nobody holds it: a sequence holds each of its blocks
once, a transfer holds the blocks it reads or writes once more, and each gives back exactly what it took.

Hashes are recorded so that equal prefixes can be found; a block's hash covers its own tokens and, by chaining, all
tokens before it. They are keyed: without the key nobody can craft a prompt that collides with another's.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NewType

from biphase.protos.ids import BlockId

BlockHash = NewType("BlockHash", bytes)
"""Keyed BLAKE2b-128 of (hash of the block before, this block's tokens)."""

NO_PARENT = BlockHash(b"")
"""What the first block of a sequence is chained to."""


class BlockPool:
    """The one owner of block ids 0 .. num_blocks - 1. Fresh blocks are handed out in rising order, freed ones first."""

    def __init__(self, num_blocks: int, block_size: int, *, hash_key: bytes = b"") -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._hash_key = hash_key
        self._free: list[BlockId] = [BlockId(block) for block in reversed(range(num_blocks))]
        self._refs = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, BlockId] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[BlockId] | None:
        """``count`` blocks, each held once by the caller, or None (and nothing taken) when fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """One more holder of each block. Raises ValueError for a free one: its content is nobody's."""
        blocks = tuple(blocks)
        for block in blocks:
            if not 0 <= block < self.num_blocks or self._refs[block] == 0:
                raise ValueError(f"block {block} is free, it cannot be held")
        for block in blocks:
            self._refs[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """One holder of each block less; a block without holders is free and loses its hash.

        Raises ValueError when a block has no holder left to give back.
        """
        for block in reversed(tuple(blocks)):
            if not 0 <= block < self.num_blocks or self._refs[block] == 0:
                raise ValueError(f"block {block} is free already")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._forget_hash(block)
                self._free.append(block)

    def references(self, block: BlockId) -> int:
        return self._refs[block]

    def record_full(self, block: BlockId, parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
        """Note that ``block`` holds the computed KV of exactly these block_size tokens after those of ``parent``.

        Returns the block's hash, the parent of the next one. Of equal blocks the first one recorded is the one found.
        """
        if len(token_ids) != self.block_size:
            raise ValueError(f"a full block has {self.block_size} tokens, not {len(token_ids)}")
        digest = hashlib.blake2b(parent, digest_size=16, key=self._hash_key)
        digest.update(array("I", token_ids))
        block_hash = BlockHash(digest.digest())
        self._forget_hash(block)
        self._hashes[block] = block_hash
        self._by_hash.setdefault(block_hash, block)
        return block_hash

    def hash_of(self, block: BlockId) -> BlockHash | None:
        """The hash recorded for a held block, None while it is not full and computed."""
        return self._hashes[block]

    def find(self, block_hash: BlockHash) -> BlockId | None:
        """A held block with this content."""
        return self._by_hash.get(block_hash)

    def _forget_hash(self, block: BlockId) -> None:
        block_hash = self._hashes[block]
        self._hashes[block] = None
        if block_hash is not None and self._by_hash.get(block_hash) == block:
            del self._by_hash[block_hash]

    def check(self) -> None:
        """Raises AssertionError when the books do not balance. For idle moments and tests: cost grows with the pool."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        for block in range(self.num_blocks):
            assert self._refs[block] >= 0, f"block {block} has {self._refs[block]} holders"
            assert (self._refs[block] == 0) == (block in free), f"block {block}: holders and free list disagree"
            assert self._hashes[block] is None or self._refs[block] > 0, f"free block {block} has a hash"
        for block_hash, block in self._by_hash.items():
            assert self._hashes[block] == block_hash, f"the index finds block {block} by a hash that is not its own"

    def __repr__(self) -> str:
        return f"<BlockPool [{self.num_used} used, {self.num_free} free]>"
