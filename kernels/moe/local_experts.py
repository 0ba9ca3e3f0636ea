"""A step's routing as one of several devices sees it that has some of the experts: every device routes all tokens alike.

Pairs keep their places, so buffers by pair or by place serve any part of the experts. Plain torch, on the device, with
shapes that the host knows: a CUDA graph can hold it. Letters as in routing.py.
"""

from dataclasses import replace

import torch

from biphase.kernels.moe.routing import Routing


def local_routing(routing: Routing, experts: range) -> Routing:
    """``routing`` with tiles of ``experts`` alone, counted from 0; pairs of others have expert id -1, and no tile."""
    counts_E = routing.expert_starts[1:] - routing.expert_starts[:-1]
    tile_ends_E = ((counts_E + routing.tile_rows - 1) // routing.tile_rows).cumsum(0)
    tile_starts_E = torch.nn.functional.pad(tile_ends_E, (1, 0))
    first, last = tile_starts_E[experts.start], tile_starts_E[experts.stop]
    # tiles past the last one repeat it: nobody looks at them
    tiles_T = (torch.arange(routing.max_tiles, device=first.device) + first).clamp(max=routing.max_tiles - 1)
    ids_NK = routing.expert_ids - experts.start
    elsewhere = (ids_NK < 0) | (ids_NK >= len(experts))
    return replace(
        routing,
        num_experts=len(experts),
        expert_ids=ids_NK.masked_fill(elsewhere, -1),
        expert_starts=routing.expert_starts[experts.start : experts.stop + 1],
        tile_experts=routing.tile_experts[tiles_T] - experts.start,
        tile_firsts=routing.tile_firsts[tiles_T],
        num_tiles=(last - first).to(torch.int32).view(1),
    )
