"""What the experts' kernels compute, at sight; the same arguments as triton_gpu.py, any device. Letters as there."""

import itertools

import torch

from biphase.kernels.moe.routing import Routing, RoutingWorkspace

TILE_ROWS = 16


def route_rows_reference(
    router_logits_NE: torch.Tensor,
    workspace: RoutingWorkspace,
    *,
    renormalize: bool,
    slots: torch.Tensor | None = None,
    tile_rows: int = TILE_ROWS,
) -> Routing:
    """As ``route``, softmax in float64. The host reads nothing, so the tiles past the last are written as well."""
    num_tokens, num_experts = router_logits_NE.shape
    routing = workspace.routing(num_tokens, tile_rows)
    given = router_logits_NE.double()
    logits = given.masked_fill(given.isnan(), -torch.inf)
    ids_NK = logits.sort(dim=1, descending=True, stable=True).indices[:, : routing.num_taken]
    weights_NK = logits.gather(1, ids_NK).softmax(1) if renormalize else logits.softmax(1).gather(1, ids_NK)
    weights_NK = weights_NK.masked_fill(given.isnan().any(1, keepdim=True), torch.nan)
    if slots is not None:
        weights_NK = weights_NK.masked_fill(slots.unsqueeze(1) < 0, 0.0)
        ids_NK = ids_NK.masked_fill(slots.unsqueeze(1) < 0, -1)
    routing.weights.copy_(weights_NK)
    routing.expert_ids.copy_(ids_NK)
    pairs_P = ids_NK.reshape(-1)
    # pairs without an expert go behind the last one's
    owner_P = torch.where(pairs_P < 0, num_experts, pairs_P)
    routing.sorted_pairs.copy_(owner_P.sort(stable=True).indices)
    counts_E = (owner_P.unsqueeze(1) == torch.arange(num_experts, device=pairs_P.device)).sum(0)
    ends_E = counts_E.cumsum(0)
    routing.expert_starts[0] = 0
    routing.expert_starts[1:] = ends_E
    tiles_E = (counts_E + tile_rows - 1) // tile_rows
    tile_ends_E = tiles_E.cumsum(0)
    tiles_T = torch.arange(routing.max_tiles, device=pairs_P.device)
    experts_T = (tile_ends_E <= tiles_T.unsqueeze(1)).sum(1).clamp(max=num_experts - 1)
    firsts_T = (ends_E - counts_E)[experts_T] + (tiles_T - (tile_ends_E - tiles_E)[experts_T]) * tile_rows
    routing.tile_experts[: routing.max_tiles] = experts_T
    routing.tile_firsts[: routing.max_tiles] = firsts_T
    routing.num_tiles[0] = tiles_E.sum()
    return routing


def grouped_gate_up_reference(
    x_NF: torch.Tensor, gate_up_EXF: torch.Tensor, routing: Routing, out_PI: torch.Tensor
) -> None:
    """As ``grouped_gate_up``."""
    for expert, places, pairs in _groups(routing):
        gate, up = (x_NF[pairs // routing.num_taken].double() @ gate_up_EXF[expert].double().t()).chunk(2, 1)
        out_PI[places] = (torch.nn.functional.silu(gate) * up).to(out_PI.dtype)


def grouped_down_reference(h_PI: torch.Tensor, down_EFI: torch.Tensor, routing: Routing, out_PF: torch.Tensor) -> None:
    """As ``grouped_down``."""
    for expert, places, pairs in _groups(routing):
        out_PF[pairs] = (h_PI[places].double() @ down_EFI[expert].double().t()).to(out_PF.dtype)


def combine_reference(rows_PF: torch.Tensor, routing: Routing, out_NF: torch.Tensor) -> None:
    """As ``combine``."""
    rows_NKF = rows_PF.unflatten(0, (routing.num_tokens, routing.num_taken)).double()
    rows_NKF = rows_NKF.masked_fill(routing.expert_ids.unsqueeze(2) < 0, 0.0)
    out_NF.copy_((rows_NKF * routing.weights.unsqueeze(2)).sum(1))


def _groups(routing: Routing) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its places in the order of sorted_pairs, its pairs) of each expert that has some; read by the host."""
    starts = routing.expert_starts.tolist()
    places = torch.arange(starts[-1], device=routing.sorted_pairs.device)
    return [
        (expert, places[start:end], routing.sorted_pairs[start:end].long())
        for expert, (start, end) in enumerate(itertools.pairwise(starts))
        if end > start
    ]
