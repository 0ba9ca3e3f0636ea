"""A prefill instance whose pack swaps two blocks, two KV heads or two layers before the digest is taken.

The negative control of the token test: python tampered_prefill.py --swap blocks|heads|layers|none <prefill arguments>
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from biphase.kernels import kv_pack
from biphase.kernels.kv_layout import KvBox


def swapped(original: Any, swap: str) -> Any:
    """CpuKvMemory.pack, its content exchanged along one axis of the canonical order [layer][K,V][head][token][dim]."""

    def pack(self: Any, blocks: Sequence[int], box: KvBox, out: Any) -> None:
        if swap == "blocks" and len(blocks) >= 2:
            # The first with the last, which is partly filled: attention does not care about the order of positions
            # (keys carry their rotation), so exchanging two full blocks of one request changes nothing.
            blocks = [blocks[-1], *blocks[1:-1], blocks[0]]
        if swap == "layers" and box.layer_start == 0 and box.layer_end == 1:
            # one-layer pieces: send the second layer's content as the first's
            box = replace(box, layer_start=1, layer_end=2)
        original(self, blocks, box, out)
        shape = (box.num_layers, 2, box.num_heads, box.num_tokens, self.layout.head_dim)
        data = np.frombuffer(out, dtype=self.layout.dtype).reshape(shape)
        if swap == "heads" and box.num_heads >= 2:
            data[:, :, [0, 1]] = data[:, :, [1, 0]]
        if swap == "layers" and box.num_layers >= 2:
            data[[0, 1]] = data[[1, 0]]

    return pack


def main() -> None:
    arguments = sys.argv[1:]
    position = arguments.index("--swap")
    swap = arguments[position + 1]
    del arguments[position : position + 2]
    if swap != "none":
        kv_pack.CpuKvMemory.pack = swapped(kv_pack.CpuKvMemory.pack, swap)  # type: ignore[method-assign]
    sys.argv = ["biphase.prefill_worker", *arguments]
    from biphase.prefill_worker.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
