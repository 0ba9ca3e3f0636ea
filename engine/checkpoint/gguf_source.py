"""Weights from a GGUF file: ggml's names into Hugging Face's, dequantized, llama.cpp's q/k row order undone."""

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from biphase.engine.checkpoint.gguf_config import config_of
from biphase.engine.checkpoint.source import EDGE_BYTES, Stored
from biphase.protos.errors import SetupError, one_line
from biphase.protos.gguf_file import GgufFile, GgufTensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufSource:
    """An opened GGUF file as a WeightSource. Owns the mapping of the file."""

    def __init__(self, path: Path) -> None:
        """Raises SetupError, one line: unsupported architecture or tensor type, truncated data."""
        self.path = path
        self._file = GgufFile(path)
        self.config = config_of(self._file)
        self._tensors = {
            _name(tensor.name): tensor for tensor in self._file.tensors.values() if tensor.name != "rope_freqs.weight"
        }
        self._sizes = {name: self._size(tensor) for name, tensor in self._tensors.items()}
        self.stored = {
            name: Stored(shape=tensor.shape, dtype=gguf.GGMLQuantizationType(tensor.type_id).name)
            for name, tensor in self._tensors.items()
        }

    def edges(self) -> Iterator[tuple[str, bytes, bytes]]:
        for name in sorted(self._tensors):
            start = self._tensors[name].offset
            end = start + self._sizes[name]
            data = self._file.data
            yield name, data[start : min(end, start + EDGE_BYTES)], data[max(start, end - EDGE_BYTES) : end]

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        raw = np.frombuffer(self._file.data, np.uint8, self._sizes[name], tensor.offset)
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        try:
            if kind is gguf.GGMLQuantizationType.F32:
                values = raw.view(np.float32).copy()
            else:
                values = gguf.dequantize(raw.reshape(tensor.shape[0], -1), kind)
        except (NotImplementedError, ValueError) as error:
            raise SetupError(f"{self.path}: tensor {tensor.name} of type {kind.name}: {one_line(error)}") from error
        values = np.ascontiguousarray(values.reshape(tensor.shape), np.float32)
        if self.config.architecture == "llama":
            if name.endswith(".q_proj.weight"):
                values = unpermute(values, self.config.num_heads)
            elif name.endswith(".k_proj.weight"):
                values = unpermute(values, self.config.num_kv_heads)
        return torch.from_numpy(values)

    def _size(self, tensor: GgufTensor) -> int:
        """Bytes of a tensor in the file; SetupError when the file ends before them."""
        try:
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError):
            raise SetupError(f"{self.path}: tensor {tensor.name} has unknown type {tensor.type_id}") from None
        if not tensor.shape or tensor.shape[-1] % per_block:
            raise SetupError(f"{self.path}: tensor {tensor.name} has rows of {tensor.shape}, not whole blocks")
        count = 1
        for extent in tensor.shape:
            count *= extent
        size = count // per_block * block_bytes
        if tensor.offset + size > len(self._file.data):
            raise SetupError(
                f"{self.path}: truncated GGUF file: tensor {tensor.name} ends at byte {tensor.offset + size}, "
                f"the file has {len(self._file.data)}"
            )
        return size


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection from llama.cpp's order (a pair's two rows adjacent) to Hugging Face's (half apart)."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _name(name: str) -> str:
    """ggml's tensor name in Hugging Face's words; an unknown one stays as it is and is refused by name later."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
