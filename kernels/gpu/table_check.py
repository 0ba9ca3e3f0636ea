"""Debug mode, BIPHASE_DEBUG=1: block tables, slots, positions and token ids are checked on the host before a kernel
trusts them.

Off otherwise: it waits for the GPU, and a graph that is replayed reads numbers which nobody has checked.
"""

import os

import torch

DEBUG = os.environ.get("BIPHASE_DEBUG") == "1"


def may_check(tensor: torch.Tensor, *, asked: bool = False) -> bool:
    """Whether a launcher is to read what lies beside ``tensor``: in debug mode or where the caller ``asked``, and there is
    something to read, and no graph is being captured, which a read would end."""
    if not (DEBUG or asked) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_range(name: str, values: torch.Tensor, end: int, what: str, *, where: torch.Tensor | None = None) -> None:
    """Every entry, or those ``where`` says, is one of 0 to ``end`` - 1. Raises ValueError naming the first that is not."""
    wrong = (values < 0) | (values >= end)
    if where is not None:
        wrong &= where
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{row}] is {int(values[row])}, {what} 0 to {end - 1}")


def check_query_starts(starts: list[int], context_lens: list[int], *, num_tokens: int, max_query_len: int) -> None:
    """Each sequence that has a context has its rows among ``num_tokens``, as many as one may have, and no more than the
    context. Raises ValueError naming ``query_starts``."""
    for row, (first, end, context) in enumerate(zip(starts, starts[1:], context_lens, strict=False)):
        if context > 0 and not (0 <= first <= end <= num_tokens and end - first <= min(max_query_len, context)):
            raise ValueError(
                f"query_starts gives sequence {row} the rows {first} to {end} of {num_tokens}, its context is {context}, "
                f"max_query_len is {max_query_len}"
            )


def check_block_tables(
    tables_BW: torch.Tensor, first_tokens: list[int], end_tokens: list[int], *, block_size: int, num_blocks: int
) -> None:
    """Every entry that names a block of tokens [first, end) of its sequence exists and is a block of the pool.

    Raises ValueError naming ``block_tables``.
    """
    tables = tables_BW.tolist()
    for row, (first, end) in enumerate(zip(first_tokens, end_tokens, strict=True)):
        needed = -(-end // block_size)
        if needed > tables_BW.shape[1]:
            raise ValueError(f"block_tables has {tables_BW.shape[1]} entries a row, sequence {row} needs {needed}")
        for column in range(first // block_size, needed):
            if not 0 <= tables[row][column] < num_blocks:
                raise ValueError(
                    f"block_tables[{row}, {column}] is {tables[row][column]}, the pool has blocks 0 to {num_blocks - 1}"
                )
