"""Dense products on the CPU. The fastest routine depends on the token count; measured in docs/decisions.

Shapes: O output features, I input features, N tokens (padded, see ``padded_tokens``).
"""

import torch

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch._C._has_mkldnn else None
"""oneDNN's product ``a @ b.T``. Private to torch, hence optional; MKL's serves where it is absent."""

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
    return out_ON.copy_(_few(w_OI, x_IN, num_tokens))


def linear_add(w_OI: torch.Tensor, x_IN: torch.Tensor, residual_ON: torch.Tensor) -> torch.Tensor:
    """``residual += w @ x`` in place; returns ``residual``."""
    num_tokens = x_IN.shape[1]
    if num_tokens > _TOKEN_MAJOR_UP_TO:
        return residual_ON.addmm_(w_OI, x_IN)
    return residual_ON.add_(_few(w_OI, x_IN, num_tokens))


def linear_logits(w_VI: torch.Tensor, x_IR: torch.Tensor) -> torch.Tensor:
    """Logits ``[R, V]``, each row contiguous, of R tokens' features ``x``; a new tensor."""
    num_rows = x_IR.shape[1]
    if _ONEDNN is not None and num_rows > _TOKEN_MAJOR_UP_TO:
        logits: torch.Tensor = _ONEDNN(x_IR.t().contiguous(), w_VI, None, "none", [], "")
        return logits
    return _few(w_VI, x_IR, num_rows).t().contiguous()


def _few(w_OI: torch.Tensor, x_IN: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``w @ x`` for 1 to 8 tokens, a new tensor: oneDNN's best cases are 1 and 8, MKL's 2 and 4."""
    x_NI = x_IN.t().contiguous()
    if _ONEDNN is None or 1 < num_tokens < _TOKEN_MAJOR_UP_TO - 2:
        return torch.mm(w_OI, x_NI.t())
    if num_tokens == 1:
        product: torch.Tensor = _ONEDNN(x_NI, w_OI, None, "none", [], "").t()
        return product
    swapped: torch.Tensor = _ONEDNN(w_OI, x_NI, None, "none", [], "")
    return swapped
