"""Production launches of the experts' kernels: Mixtral-8x7B and Qwen3-30B-A3B, prefill and decode."""

from collections.abc import Callable
from functools import partial

import torch

from biphase.kernels.gpu.target import target_of
from biphase.kernels.gpu.variant import Variant
from biphase.kernels.moe.routing import Routing, RoutingWorkspace
from biphase.kernels.moe.settings import tile_rows
from biphase.kernels.moe.triton_gpu import combine, grouped_down, grouped_gate_up, route

_MODELS = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768)}
"""(experts, experts per token, hidden features, intermediate features of an expert)."""
_TOKENS = {"mixtral-8x7b": (1, 64, 256, 8192), "qwen3-30b-a3b": (1, 64, 320, 8192)}
"""Together they use tiles of all heights."""
_WIDE_ROWS = 64
"""From so many rows on the products take the wide instructions."""


def variants() -> list[Variant]:
    found = []
    for model, token_counts in _TOKENS.items():
        for tokens in token_counts:
            quick = model == "mixtral-8x7b" and tokens == 8192
            for kind, op in (("gate_up", _gate_up), ("down", _down)):
                found.append(
                    Variant(
                        name=f"moe_{kind}/{model}/{tokens}/bf16",
                        run=partial(op, model, tokens, torch.bfloat16),
                        quick=quick,
                        traits=_traits(model, tokens),
                    )
                )
            found.append(
                Variant(
                    name=f"moe_route/{model}/{tokens}", run=partial(_route, model, tokens, torch.bfloat16), quick=quick
                )
            )
        found.append(
            Variant(name=f"moe_combine/{model}/bf16", run=partial(_combine, model, torch.bfloat16), quick=quick)
        )
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        for kind, op in (("gate_up", _gate_up), ("down", _down)):
            for tokens in (64, 8192):
                run: Callable[[], None] = partial(op, "mixtral-8x7b", tokens, dtype)
                found.append(Variant(name=f"moe_{kind}/mixtral-8x7b/{tokens}/{name}", run=run))
    return found


def _traits(model: str, tokens: int) -> frozenset[str]:
    experts, taken, _, _ = _MODELS[model]
    wide = tokens * taken // experts >= _WIDE_ROWS
    return frozenset({"async_loads", "mma_wide" if wide else "mma_sync"})


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _workspace(model: str, tokens: int, dtype: torch.dtype) -> RoutingWorkspace:
    experts, taken, _, _ = _MODELS[model]
    return RoutingWorkspace(
        max_tokens=tokens, num_experts=experts, num_taken=taken, dtype=dtype, device=torch.device("meta")
    )


def _route(model: str, tokens: int, dtype: torch.dtype) -> None:
    logits = _empty(tokens, _MODELS[model][0], dtype=dtype)
    slots = _empty(tokens, dtype=torch.int64)
    route(logits, _workspace(model, tokens, dtype), renormalize=True, slots=slots)


def _routing(model: str, tokens: int, dtype: torch.dtype) -> Routing:
    """Of this shape, without a launch."""
    experts, taken, _, _ = _MODELS[model]
    rows = tile_rows(tokens * taken, experts, target_of(torch.device("meta")), dtype.itemsize)
    return _workspace(model, tokens, dtype).routing(tokens, rows)


def _gate_up(model: str, tokens: int, dtype: torch.dtype) -> None:
    experts, taken, hidden, inter = _MODELS[model]
    grouped_gate_up(
        _empty(tokens, hidden, dtype=dtype),
        _empty(experts, 2 * inter, hidden, dtype=dtype),
        _routing(model, tokens, dtype),
        _empty(tokens * taken, inter, dtype=dtype),
    )


def _down(model: str, tokens: int, dtype: torch.dtype) -> None:
    experts, taken, hidden, inter = _MODELS[model]
    grouped_down(
        _empty(tokens * taken, inter, dtype=dtype),
        _empty(experts, hidden, inter, dtype=dtype),
        _routing(model, tokens, dtype),
        _empty(tokens * taken, hidden, dtype=dtype),
    )


def _combine(model: str, dtype: torch.dtype) -> None:
    tokens, (_, taken, hidden, _) = 64, _MODELS[model]
    rows, out = _empty(tokens * taken, hidden, dtype=dtype), _empty(tokens, hidden, dtype=dtype)
    combine(rows, _routing(model, tokens, dtype), out)
