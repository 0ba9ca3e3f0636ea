"""The products by expert on several devices, each with some of the experts: their sums are what one device computes."""

import pytest
import torch

from biphase.kernels.moe.local_experts import local_routing
from biphase.kernels.moe.routing import RoutingWorkspace
from biphase.kernels.ops import paged_kernels

HIDDEN, INTER, EXPERTS, TAKEN = 32, 16, 6, 3


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "places"), [(1, 2), (7, 3), (40, 2), (40, 6)])
def test_the_parts_of_all_places_add_up(kernels: str, tokens: int, places: int) -> None:
    ops = paged_kernels(kernels)
    device = torch.device("cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(tokens + places)
    logits = torch.randn(tokens, 8, device=device)[:, :EXPERTS]
    logits[:, 1] = -100.0  # nobody's expert: a place may have experts without tokens
    x = torch.randn(tokens, HIDDEN, device=device)
    gate_up, down = (
        torch.randn(EXPERTS, 2 * INTER, HIDDEN, device=device),
        torch.randn(EXPERTS, HIDDEN, INTER).to(device),
    )
    slots = torch.arange(tokens, device=device)
    slots[-1] = -1 if tokens > 1 else 0
    workspace = RoutingWorkspace(
        max_tokens=tokens, num_experts=EXPERTS, num_taken=TAKEN, dtype=torch.float32, device=device
    )
    whole = ops.route(logits, workspace, renormalize=True, slots=slots)

    def computed(experts: range) -> torch.Tensor:
        routing = whole if len(experts) == EXPERTS else local_routing(whole, experts)
        rows = torch.full((tokens * TAKEN, HIDDEN), torch.nan, device=device)
        activated = torch.full((tokens * TAKEN, INTER), torch.nan, device=device)
        out = torch.full((tokens, HIDDEN), torch.nan, device=device)
        ours = slice(experts.start, experts.stop)
        ops.grouped_gate_up(x, gate_up[ours].contiguous(), routing, activated)
        ops.grouped_down(activated, down[ours].contiguous(), routing, rows)
        ops.combine(rows, routing, out)
        return out

    size = EXPERTS // places
    parts = [computed(range(first, first + size)) for first in range(0, EXPERTS, size)]
    torch.testing.assert_close(torch.stack(parts).sum(0), computed(range(EXPERTS)), rtol=1e-4, atol=1e-4)
    counts = whole.expert_starts.diff().tolist()
    for place, part in enumerate(parts):
        assert bool(part.any()) == any(counts[place * size : (place + 1) * size])
