"""One rank's KV pool seen in the coordinates of the whole model. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.memory import KvMemory
from biphase.protos.parallel_plan import ParallelPlan


class RankMemory:
    """A KvMemory whose ``layout`` is that of the whole model; boxes beyond what the rank holds are a ValueError.

    ``part``: what it holds, as a box of no tokens.
    """

    def __init__(self, memory: KvMemory, full: KvLayout, plan: ParallelPlan, rank: int) -> None:
        layers, heads = plan.layers_of(rank, full.num_layers), plan.kv_heads_of(rank, full.num_kv_heads)
        local = memory.layout
        ours = (len(layers), len(heads), full.head_dim, full.block_size, full.dtype)
        theirs = (local.num_layers, local.num_kv_heads, local.head_dim, local.block_size, local.dtype)
        if ours != theirs:
            raise ValueError(f"rank {rank} of {plan} holds {theirs}, its part of {full} is {ours}")
        self.layout = full
        self.part = KvBox(
            layer_start=layers.start,
            layer_end=layers.stop,
            head_start=heads.start,
            head_end=heads.stop,
            token_start=0,
            token_end=0,
        )
        self._memory = memory

    @staticmethod
    def whole(memory: "KvMemory | RankMemory") -> "RankMemory":
        """The memory of the one rank of an instance."""
        return memory if isinstance(memory, RankMemory) else RankMemory(memory, memory.layout, ParallelPlan(), 0)

    @property
    def num_blocks(self) -> int:
        return self._memory.num_blocks

    @property
    def content_digest(self) -> Literal["bytes", "sum64"]:
        return self._memory.content_digest

    def box(self, num_tokens: int) -> KvBox:
        """All that the rank holds of a request's first tokens."""
        return replace(self.part, token_end=num_tokens)

    def holds(self, box: KvBox) -> bool:
        """Whether layers and heads of ``box`` lie here, and there are some."""
        part = self.part
        return (
            part.layer_start <= box.layer_start < box.layer_end <= part.layer_end
            and part.head_start <= box.head_start < box.head_end <= part.head_end
        )

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> int | None:
        return self._memory.pack(blocks, self._local(box), out, **_codec(codec))

    def unpack(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str = "raw", group_size: int | None = None
    ) -> int | None:
        """``group_size``: the block size of the pool that was packed, which codecs that quantise need. The sum of data that
        lies on a device."""
        sizes: dict[str, Any] = {} if codec == "raw" else {"group_size": group_size}
        return self._memory.unpack(blocks, self._local(box), data, **_codec(codec), **sizes)

    def parts(self, blocks: Sequence[int], box: KvBox) -> list[memoryview] | None:
        """The pool's own memory of a box in the order of its canonical bytes; None where the pool cannot show it."""
        parts = getattr(self._memory, "parts", None)
        return None if parts is None else parts(blocks, self._local(box))

    def _local(self, box: KvBox) -> KvBox:
        if not self.holds(box):
            raise ValueError(f"{box} lies outside {self.part}")
        part = self.part
        if part.layer_start == part.head_start == 0:
            return box
        return replace(
            box,
            layer_start=box.layer_start - part.layer_start,
            layer_end=box.layer_end - part.layer_start,
            head_start=box.head_start - part.head_start,
            head_end=box.head_end - part.head_start,
        )


def _codec(codec: str) -> dict[str, Any]:
    """Pools that know one codec only have no argument for it."""
    return {} if codec == "raw" else {"codec": codec}
