"""What a step's draws come out in, and what the kernels keep between their launches: allocated once, so that a CUDA
graph may hold the addresses."""

from dataclasses import dataclass

import torch

from biphase.kernels.gpu.check import check_base, check_contiguous, check_dtype, check_same_device, check_shape
from biphase.kernels.sample.draw_row import MAX_TOP_LOGPROBS, Drawn

MAX_SPLITS = 64
"""Programs that share one row, at most."""
MAX_GROUPS = 2048
"""Of a row's tokens, whose largest logits are kept for the searches of top-k and of the best n."""
FIRST_BINS, MIDDLE_BINS, LAST_BINS = 1 << 12, 1 << 11, 1 << 8
"""The 31 bits of -z, taken from the top in three digits."""
STATE_WORDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOut:
    """R rows. Padding rows are left as they were, log-probabilities also where a row asks for none."""

    token_ids: torch.Tensor
    """[R] int64"""
    scores: torch.Tensor
    """[R] float32: the winner's z + noise (greedy: its logit), for ``merge_shards``"""
    logprobs: torch.Tensor
    """[R] float32, of the model's own logits"""
    top_ids: torch.Tensor
    """[R, 20] int32, best first, the lower id first among equals; as many as the row asks for"""
    top_logprobs: torch.Tensor
    """[R, 20] float32"""

    def __post_init__(self) -> None:
        """Raises ValueError naming the tensor: once here, not at every draw."""
        check_shape("token_ids", self.token_ids, None)
        rows = self.token_ids.shape[0]
        for name, dtype, shape in (
            ("token_ids", torch.int64, (rows,)),
            ("scores", torch.float32, (rows,)),
            ("logprobs", torch.float32, (rows,)),
            ("top_ids", torch.int32, (rows, MAX_TOP_LOGPROBS)),
            ("top_logprobs", torch.float32, (rows, MAX_TOP_LOGPROBS)),
        ):
            tensor = getattr(self, name)
            check_dtype(name, tensor, dtype)
            check_shape(name, tensor, *shape)
            check_contiguous(name, tensor)
            check_base(name, tensor)
        check_same_device(token_ids=self.token_ids, scores=self.scores, logprobs=self.logprobs)
        check_same_device(token_ids=self.token_ids, top_ids=self.top_ids, top_logprobs=self.top_logprobs)

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device) -> "SampleOut":
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(max_rows, dtype=torch.int64),
            scores=zeros(max_rows, dtype=torch.float32),
            logprobs=zeros(max_rows, dtype=torch.float32),
            top_ids=zeros(max_rows, MAX_TOP_LOGPROBS, dtype=torch.int32),
            top_logprobs=zeros(max_rows, MAX_TOP_LOGPROBS, dtype=torch.float32),
        )

    def drawn(self, tops: list[int | None]) -> list[Drawn]:
        """Rows 0 .. len(tops) - 1 on the host; ``tops``: each row's ``logprobs``. One copy per tensor."""
        ids = self.token_ids[: len(tops)].tolist()
        if all(top is None for top in tops):
            return [Drawn(token_id=token) for token in ids]
        logprobs, top_ids = self.logprobs[: len(tops)].tolist(), self.top_ids[: len(tops)].tolist()
        values = self.top_logprobs[: len(tops)].tolist()
        return [
            Drawn(token_id=token)
            if top is None
            else Drawn(
                token_id=token,
                logprob=logprobs[row],
                top=tuple(zip(top_ids[row][:top], values[row][:top], strict=True)),
            )
            for row, (token, top) in enumerate(zip(ids, tops, strict=True))
        ]


class SampleWorkspace:
    """About 0.3 MiB and four bytes per token of the vocabulary for each row. Histograms and tickets are all zero between calls."""

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_rows, self.vocab_size = max_rows, vocab_size
        self.edits = zeros(max_rows, -(-vocab_size // 128) * 128, dtype=torch.float32)
        """Edited rows' logits; before that, as int32, how often a token occurred."""
        self.counts = self.edits.view(torch.int32)
        self.row_max = zeros(max_rows, dtype=torch.float32)
        self.state = zeros(max_rows, STATE_WORDS, dtype=torch.int64)
        self.partial_values = zeros(max_rows, 2, MAX_SPLITS, dtype=torch.float32)
        self.partial_ids = zeros(max_rows, 2, MAX_SPLITS, dtype=torch.int32)
        self.partial_sums = zeros(max_rows, MAX_SPLITS, dtype=torch.int64)
        self.groups = zeros(max_rows, 2, num_groups(vocab_size), dtype=torch.float32)
        self.histogram = zeros(max_rows, FIRST_BINS, dtype=torch.int64)
        self.split_histogram = zeros(max_rows, MAX_SPLITS, LAST_BINS, dtype=torch.int32)
        self.ties_before = zeros(max_rows, MAX_SPLITS, dtype=torch.int32)


def group_size(vocab_size: int) -> int:
    """Tokens of one group."""
    return max(64, _power_of_two(-(-vocab_size // MAX_GROUPS)))


def num_groups(vocab_size: int) -> int:
    """Groups of one row, up to the next power of two."""
    return _power_of_two(-(-vocab_size // group_size(vocab_size)))


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


def merge_shards(scores_SR: torch.Tensor, token_ids_SR: torch.Tensor) -> torch.Tensor:
    """Token of each row [R] from those of S shards of the vocabulary: the best score, the lower id among equals."""
    best = scores_SR.amax(dim=0)
    last = torch.iinfo(torch.int64).max
    return torch.where(scores_SR == best, token_ids_SR, last).amin(dim=0)
