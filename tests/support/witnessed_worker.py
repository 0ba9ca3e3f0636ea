"""A worker that writes down which KV it had: python witnessed_worker.py prefill|decode FILE <the worker's arguments>

One line of JSON per ticket and rank, digests of every layer and head of the whole model that the rank holds: of a prefill
rank when the ticket is released, of a decode rank when its pull is complete. Both before anything is computed with them.
"""

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.pull_job import PartsPulled, PullJob
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.rank_pull import RankPuller

_memories: list[RankMemory] = []


def digests(memory: RankMemory, blocks: Sequence[int], num_tokens: int) -> dict[str, str]:
    """By "layer/head" of the whole model."""
    part, found = memory.part, {}
    for layer in range(part.layer_start, part.layer_end):
        for head in range(part.head_start, part.head_end):
            box = KvBox(
                layer_start=layer,
                layer_end=layer + 1,
                head_start=head,
                head_end=head + 1,
                token_start=0,
                token_end=num_tokens,
            )
            data = bytearray(box.num_bytes(memory.layout))
            memory.pack(blocks, box, data)
            found[f"{layer}/{head}"] = xxhash.xxh3_128_hexdigest(data)
    return found


def witness(file: Path) -> None:
    """Have the classes of this process write to ``file``."""

    def write(ticket: bytes, blocks: Sequence[int], num_tokens: int) -> None:
        line = {"ticket": ticket.hex(), "tokens": num_tokens, "digests": digests(_memories[-1], blocks, num_tokens)}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")

    make, end, pull = RankMemory.__init__, ExportTable._end, RankPuller.pull

    def remember(self: RankMemory, *arguments: Any) -> None:
        make(self, *arguments)
        _memories.append(self)

    def ending(self: ExportTable, ticket: Any, outcome: Any, now_s: float) -> None:
        export = self._exports[ticket]
        if outcome == "released":
            write(ticket, export.blocks, export.num_tokens)
        end(self, ticket, outcome, now_s)

    async def pulling(self: RankPuller, job: PullJob) -> PartsPulled:
        pulled = await pull(self, job)
        write(job.ticket, job.blocks, max(part.box.token_end for part in job.parts))
        return pulled

    RankMemory.__init__ = remember  # type: ignore[method-assign]
    ExportTable._end = ending  # type: ignore[method-assign]
    RankPuller.pull = pulling  # type: ignore[method-assign]


if __name__ == "__main__":
    role, file = sys.argv[1:3]
    witness(Path(file))
    sys.argv = [f"biphase.{role}_worker", *sys.argv[3:]]
    runpy.run_module(f"biphase.{role}_worker", run_name="__main__")
