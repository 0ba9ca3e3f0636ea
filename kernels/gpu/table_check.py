"""Debug mode, BIPHASE_DEBUG=1: block tables are checked on the host before a kernel trusts them.

Off otherwise: it waits for the GPU, and a graph that is replayed reads tables which nobody has checked.
"""

import os

import torch

DEBUG = os.environ.get("BIPHASE_DEBUG") == "1"


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
