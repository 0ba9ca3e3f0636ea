"""What the machine could do at best, measured beside the engine: the model's matrix products alone, and memory reads."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from biphase.engine.checkpoint.opening import Checkpoint
from biphase.kernels.linear import linear, linear_logits, padded_tokens


def times_s(call: Callable[[], object], repeats: int) -> list[float]:
    """Each of ``repeats`` runs, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    return seconds


class Products:
    """The dense products of one step, on the real weights, nothing else. Two ways; the faster counts."""

    def __init__(self, checkpoint: Checkpoint, num_tokens: int, num_logits: int) -> None:
        tensors = checkpoint.tensors
        self._layers = [
            [tensors[f"layers.{i}.{name}"] for name in ("qkv", "o", "gate_up", "down")]
            for i in range(checkpoint.config.num_layers)
        ]
        self._head = tensors.get("lm_head", tensors["embed"])
        padded = padded_tokens(num_tokens)
        self._features = [torch.randn(weight.shape[1], padded) for weight in self._layers[0]]
        self._outs = [torch.empty(weight.shape[0], padded) for weight in self._layers[0]]
        self._tokens = [torch.randn(num_tokens, weight.shape[1]) for weight in self._layers[0]]
        self._last = torch.randn(self._head.shape[1], num_logits)
        self._last_tokens = self._last.t().contiguous()

    def ours(self) -> None:
        """As the engine does them: feature-major."""
        for layer in self._layers:
            for weight, features, out in zip(layer, self._features, self._outs, strict=True):
                linear(weight, features, out)
        linear_logits(self._head, self._last)

    def plain(self) -> None:
        """``F.linear`` on token-major activations."""
        for layer in self._layers:
            for weight, tokens in zip(layer, self._tokens, strict=True):
                F.linear(tokens, weight)
        F.linear(self._last_tokens, self._head)

    def seconds(self, repeats: int) -> list[float]:
        """Times of the way with the shorter median."""
        with torch.inference_mode():
            return min(times_s(self.ours, repeats), times_s(self.plain, repeats), key=statistics.median)


class ReadBandwidth:
    """Bytes per second of a sum over a quarter of a GiB, far beyond any cache here, with torch's threads."""

    def __init__(self) -> None:
        self._values = torch.ones(1 << 26)

    def bytes_per_s(self) -> float:
        return self._values.nbytes / statistics.median(times_s(self._values.sum, 5))


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that a decode step reads: all but the embedding's rows where the head is a tensor of its own."""
    unread = 0 if checkpoint.config.tie_word_embeddings else checkpoint.tensors["embed"].nbytes
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values()) - unread
