"""Dense products on the CPU. The fastest routine depends on the token count; measured in docs/decisions.

Shapes: O output features, I input features, N tokens (padded, see ``padded_tokens``).
"""

import torch

_ONE_TOKEN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's product of one row: 1.4 times MKL's speed at one token. Private to torch, hence optional."""

_TOKEN_MAJOR_UP_TO = 8
"""Up to this many tokens MKL is up to 3 times faster when each token's features are contiguous."""


def padded_tokens(num_tokens: int) -> int:
    """The next token count that runs at full speed (odd ones take up to twice the time of the next in this list)."""
    for size in (1, 2, 4, 8, 16, 32):
        if num_tokens <= size:
            return size
    return -(-num_tokens // 16) * 16


def linear(w_OI: torch.Tensor, x_IN: torch.Tensor, out_ON: torch.Tensor) -> torch.Tensor:
    """``out = w @ x``; returns ``out``, which must be contiguous and must not overlap ``x``."""
    num_tokens = x_IN.shape[1]
    if num_tokens > _TOKEN_MAJOR_UP_TO:
        return torch.mm(w_OI, x_IN, out=out_ON)
    if num_tokens == 1 and _ONE_TOKEN is not None:
        out_ON.view(1, -1).copy_(_ONE_TOKEN(x_IN.view(1, -1), w_OI, None, "none", [], ""))
        return out_ON
    return torch.mm(w_OI, x_IN.t().contiguous().t(), out=out_ON)


def linear_add(w_OI: torch.Tensor, x_IN: torch.Tensor, residual_ON: torch.Tensor) -> torch.Tensor:
    """``residual += w @ x`` in place; returns ``residual``."""
    num_tokens = x_IN.shape[1]
    if num_tokens > _TOKEN_MAJOR_UP_TO:
        return residual_ON.addmm_(w_OI, x_IN)
    if num_tokens == 1 and _ONE_TOKEN is not None:
        residual_ON.view(1, -1).add_(_ONE_TOKEN(x_IN.view(1, -1), w_OI, None, "none", [], ""))
        return residual_ON
    return residual_ON.add_(torch.mm(w_OI, x_IN.t().contiguous().t()))


def linear_logits(w_VI: torch.Tensor, x_IR: torch.Tensor) -> torch.Tensor:
    """Logits ``[R, V]``, each row contiguous, of R tokens' features ``x``; a new tensor."""
    num_rows = x_IR.shape[1]
    x_RI = x_IR.t().contiguous()
    if _ONE_TOKEN is not None and (num_rows == 1 or num_rows > _TOKEN_MAJOR_UP_TO):
        logits: torch.Tensor = _ONE_TOKEN(x_RI, w_VI, None, "none", [], "")
        return logits
    return torch.mm(w_VI, x_RI.t()).t().contiguous()
