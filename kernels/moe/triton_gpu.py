"""Mixture of experts on a GPU: routing on the device, products over the tokens grouped by expert, and their sum.

Nothing is read by the host and all grids are fixed by token count alone, so that a CUDA graph serves any routing.
The grouping is that of MegaBlocks (Gale et al. 2023, section 5), its blocks here tiles of one expert's rows that read x
and write out where they lie. Shapes: N tokens, E experts, k per token, P = N * k pairs, F hidden features,
I intermediate features of an expert.
"""

import torch

from biphase.kernels.gpu.check import check_contiguous, check_dtype, check_rows, check_same_device, check_shape
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import target_of
from biphase.kernels.moe.routing import Routing, RoutingWorkspace, padded_experts, token_block
from biphase.kernels.moe.settings import product_settings, tile_rows
from biphase.kernels.moe.triton_kernel import (
    choose_kernel,
    combine_kernel,
    grouped_product_kernel,
    lay_out_kernel,
    place_kernel,
    route_at_once_kernel,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_TOKENS = 16
_PLACE_BLOCK = 512
_LAY_OUT_ELEMENTS = 4096
_COMBINE_BLOCK = 1024


def route(
    router_logits_NE: torch.Tensor,
    workspace: RoutingWorkspace,
    *,
    renormalize: bool,
    slots: torch.Tensor | None = None,
) -> Routing:
    """Each token's k experts of the highest logits (the lower id among equals), weighted by softmax, and their grouping.

    ``renormalize``: softmax over the k instead of over all (Mixtral; Qwen3-MoE's norm_topk_prob). ``slots`` [N] int64:
    a token below 0 takes no experts (padding). A NaN among a token's logits makes its weights NaN. Rows of logits aligned
    to 16 bytes. Raises ValueError naming the argument.
    """
    check_shape("router_logits", router_logits_NE, None, workspace.num_experts)
    check_dtype("router_logits", router_logits_NE, *_DTYPES)
    check_rows("router_logits", router_logits_NE)
    num_tokens, experts = router_logits_NE.shape
    if slots is not None:
        check_shape("slots", slots, num_tokens)
        check_dtype("slots", slots, torch.int64)
        check_rows("slots", slots)
    target = target_of(router_logits_NE.device)
    rows = tile_rows(num_tokens * workspace.num_taken, experts, target, workspace.dtype.itemsize)
    routing = workspace.routing(num_tokens, rows)
    check_same_device(router_logits=router_logits_NE, slots=slots, workspace=routing.weights)
    if not num_tokens:
        return routing
    block, padded = token_block(experts), padded_experts(experts)
    tiles = (routing.expert_starts, routing.tile_experts, routing.tile_firsts, routing.num_tiles)
    shape = {"E": experts, "EP": padded, "K": workspace.num_taken}
    choice = {"STRIDE": router_logits_NE.stride(0), "RENORMALIZE": renormalize}
    layout = {"TILE_ROWS": rows, "BLOCK_T": 64}
    chosen = (router_logits_NE, slots, routing.weights, routing.expert_ids)
    if num_tokens <= block:
        few = min(block, _FEW_TOKENS)
        size = few if num_tokens <= few else block
        launch(
            route_at_once_kernel,
            (1,),
            *chosen,
            routing.sorted_pairs,
            *tiles,
            num_tokens,
            BT=size,
            **shape,
            **choice,
            **layout,
            num_warps=_warps(size * padded),
        )
        return routing
    num_blocks = -(-num_tokens // block)
    launch(
        choose_kernel,
        (num_blocks,),
        *chosen,
        workspace.ranks,
        workspace.block_counts,
        num_tokens,
        BT=block,
        **shape,
        **choice,
        num_warps=_warps(block * padded),
    )
    launch(
        lay_out_kernel,
        (1,),
        workspace.block_counts,
        *tiles,
        num_blocks,
        E=experts,
        EP=padded,
        BLOCK_B=max(2, min(256, _LAY_OUT_ELEMENTS // padded)),
        **layout,
        num_warps=8,
    )
    launch(
        place_kernel,
        (-(-num_tokens * workspace.num_taken // _PLACE_BLOCK),),
        routing.expert_ids,
        workspace.ranks,
        workspace.block_counts,
        routing.expert_starts,
        routing.sorted_pairs,
        num_tokens * workspace.num_taken,
        E=experts,
        K=workspace.num_taken,
        BT=block,
        BLOCK=_PLACE_BLOCK,
        num_warps=4,
    )
    return routing


def grouped_gate_up(x_NF: torch.Tensor, gate_up_EXF: torch.Tensor, routing: Routing, out_PI: torch.Tensor) -> None:
    """``out[i] = silu(gate @ x) * (up @ x)`` of pair ``sorted_pairs[i]``'s token by its expert; X = 2 I, gate above up.

    Rows of ``out`` past the last pair are left as they are. Raises ValueError naming the argument.
    """
    _product(x_NF, gate_up_EXF, routing, out_PI, gated=True)


def grouped_down(h_PI: torch.Tensor, down_EFI: torch.Tensor, routing: Routing, out_PF: torch.Tensor) -> None:
    """``out[p] = down @ h[i]`` with p = ``sorted_pairs[i]``, by the expert of pair p; not weighted yet.

    Rows of ``out`` of pairs that take no expert are left as they are. Raises ValueError naming the argument.
    """
    _product(h_PI, down_EFI, routing, out_PF, gated=False)


def combine(rows_PF: torch.Tensor, routing: Routing, out_NF: torch.Tensor) -> None:
    """``out[n]`` = sum of token n's pairs, weighted, in the order of its choices; 0 for a token without experts."""
    check_shape("rows", rows_PF, routing.num_tokens * routing.num_taken, None)
    check_shape("out", out_NF, routing.num_tokens, rows_PF.shape[1])
    for name, tensor in (("rows", rows_PF), ("out", out_NF)):
        check_dtype(name, tensor, *_DTYPES)
        check_rows(name, tensor)
    check_same_device(rows=rows_PF, out=out_NF, routing=routing.weights)
    features = out_NF.shape[1]
    launch(
        combine_kernel,
        (routing.num_tokens, -(-features // _COMBINE_BLOCK)),
        rows_PF,
        routing.weights,
        routing.expert_ids,
        out_NF,
        ROWS_STRIDE=rows_PF.stride(0),
        OUT_STRIDE=out_NF.stride(0),
        F=features,
        K=routing.num_taken,
        BLOCK=_COMBINE_BLOCK,
        num_warps=4,
    )


def _product(
    x: torch.Tensor, weights_EOI: torch.Tensor, routing: Routing, out_PO: torch.Tensor, *, gated: bool
) -> None:
    pairs = routing.num_tokens * routing.num_taken
    check_shape("experts", weights_EOI, routing.num_experts, None, None)
    _, num_rows, num_in = weights_EOI.shape
    if gated and num_rows % 2:
        raise ValueError(f"experts has {num_rows} rows per expert, expected as many of gate as of up")
    num_out = num_rows // 2 if gated else num_rows
    check_shape("x", x, routing.num_tokens if gated else pairs, num_in)
    check_shape("out", out_PO, pairs, num_out)
    check_dtype("experts", weights_EOI, *_DTYPES)
    check_contiguous("experts", weights_EOI)
    for name, tensor in (("x", x), ("out", out_PO), ("experts", weights_EOI)):
        check_dtype(name, tensor, weights_EOI.dtype)
        check_rows(name, tensor)
    check_same_device(x=x, experts=weights_EOI, out=out_PO, routing=routing.weights)
    target = target_of(x.device)
    settings = product_settings(
        target,
        rows=routing.tile_rows,
        gated=gated,
        num_out=num_out,
        num_in=num_in,
        num_experts=routing.num_experts,
        itemsize=x.element_size(),
    )
    launch(
        grouped_product_kernel,
        (routing.max_tiles * -(-num_out // settings["BLOCK_N"]),),
        x,
        weights_EOI,
        out_PO,
        routing.sorted_pairs,
        routing.expert_starts,
        routing.tile_experts,
        routing.tile_firsts,
        routing.num_tiles,
        routing.max_tiles,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=out_PO.stride(0),
        O=num_out,
        I=num_in,
        K=routing.num_taken,
        FROM_TOKENS=gated,
        GATED=gated,
        BLOCK_M=routing.tile_rows,
        **settings,
    )


def _warps(num_elements: int) -> int:
    """Of a program that routes: 32 logits a thread at most, so that keys and ranks stay in registers."""
    return max(1, min(8, num_elements // 512))
