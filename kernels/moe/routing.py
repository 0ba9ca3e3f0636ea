"""Which experts each token of a step takes, and those pairs grouped by expert: device tensors that never move.

Shapes: N tokens, E experts, k of them per token, P = N * k pairs (pair p is choice p % k of token p // k), T tiles.
The pairs of one expert stand together, in rising order; a tile is up to ``tile_rows`` of them, all of one expert. How
many tiles there are is known on the device alone: grids cover ``max_tiles``, and programs past ``num_tiles`` end.
"""

from dataclasses import dataclass

import torch

MAX_EXPERTS = 1024
MAX_TAKEN = 32
MIN_TILE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One step's routing; views of a workspace, valid until the next ``route`` into it. Integers are int32.

    Tokens that take no experts (padding rows) have expert id -1 and weight 0 everywhere; their pairs stand nowhere.
    """

    num_tokens: int
    num_taken: int
    """k."""
    num_experts: int
    tile_rows: int
    max_tiles: int
    weights: torch.Tensor
    """[N, k] float32."""
    expert_ids: torch.Tensor
    """[N, k], by falling logit."""
    sorted_pairs: torch.Tensor
    """[P]: the pairs by expert."""
    expert_starts: torch.Tensor
    """[E + 1]: where each expert's pairs begin in ``sorted_pairs``; the last: how many pairs there are."""
    tile_experts: torch.Tensor
    """[T]: whose pairs the tile has."""
    tile_firsts: torch.Tensor
    """[T]: its first place in ``sorted_pairs``."""
    num_tiles: torch.Tensor
    """[1]."""


class RoutingWorkspace:
    """The memory of routings of up to ``max_tokens``; one layer's at a time. Allocated once, used by one stream."""

    def __init__(
        self, *, max_tokens: int, num_experts: int, num_taken: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """``dtype``: of the experts' matrices; tiles are chosen for it. Raises ValueError naming what is not supported."""
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts is {num_experts}, supported: 1 to {MAX_EXPERTS}")
        if not 1 <= num_taken <= min(MAX_TAKEN, num_experts):
            raise ValueError(f"num_taken is {num_taken}, supported: 1 to {min(MAX_TAKEN, num_experts)}")
        self.max_tokens = max_tokens
        self.num_experts = num_experts
        self.num_taken = num_taken
        self.dtype = dtype
        pairs, tiles = max_tokens * num_taken, max_tiles(max_tokens * num_taken, num_experts, MIN_TILE_ROWS)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._weights = torch.zeros(max_tokens, num_taken, device=device)
        self._expert_ids = ints(max_tokens, num_taken)
        self._sorted_pairs = ints(pairs)
        self._expert_starts = ints(num_experts + 1)
        self._tile_experts = ints(tiles)
        self._tile_firsts = ints(tiles)
        self._num_tiles = ints(1)
        self.ranks = ints(pairs)
        """Of each pair among its block's pairs of the same expert."""
        self.block_counts = ints(-(-max_tokens // token_block(num_experts)), num_experts)
        """Pairs per block of tokens and expert; then how many of the expert stand before the block's."""

    def routing(self, num_tokens: int, tile_rows: int) -> Routing:
        """The views for a step. Raises ValueError for more tokens than there is memory for."""
        if num_tokens > self.max_tokens:
            raise ValueError(f"router_logits has {num_tokens} rows, the workspace was made for {self.max_tokens}")
        pairs = num_tokens * self.num_taken
        return Routing(
            num_tokens=num_tokens,
            num_taken=self.num_taken,
            num_experts=self.num_experts,
            tile_rows=tile_rows,
            max_tiles=max_tiles(pairs, self.num_experts, tile_rows),
            weights=self._weights[:num_tokens],
            expert_ids=self._expert_ids[:num_tokens],
            sorted_pairs=self._sorted_pairs[:pairs],
            expert_starts=self._expert_starts,
            tile_experts=self._tile_experts,
            tile_firsts=self._tile_firsts,
            num_tiles=self._num_tiles,
        )


def max_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """At most so many tiles, however the pairs fall: each expert with pairs has one that is not full."""
    return num_pairs // tile_rows + min(num_experts, num_pairs)


def token_block(num_experts: int) -> int:
    """Tokens that one program routes: it has all their logits in registers."""
    return max(2, min(512, 8192 // padded_experts(num_experts)))


def padded_experts(num_experts: int) -> int:
    return max(2, 1 << (num_experts - 1).bit_length())
