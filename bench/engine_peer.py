"""vLLM's CPU build as a subprocess of bench/engine.py, on the same weights written as a Hugging Face directory."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file

from biphase.engine.checkpoint.opening import Checkpoint


def write_hf_dir(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint as ``config.json`` and ``model.safetensors``, fused tensors cut apart again; llama only."""
    config = checkpoint.config
    if config.architecture != "llama" or config.rope.scaling is not None:
        raise ValueError(f"the comparison knows plain llama models, not {config.architecture} with {config.rope}")
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {
        "model.embed_tokens.weight": checkpoint.tensors["embed"],
        "model.norm.weight": checkpoint.tensors["norm"],
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = checkpoint.tensors["lm_head"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = checkpoint.tensors[ours + "qkv"].split([q_rows, kv_rows, kv_rows])
        gate, up = checkpoint.tensors[ours + "gate_up"].chunk(2)
        named = {
            "input_layernorm": checkpoint.tensors[ours + "attn_norm"],
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": checkpoint.tensors[ours + "o"],
            "post_attention_layernorm": checkpoint.tensors[ours + "mlp_norm"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": checkpoint.tensors[ours + "down"],
        }
        weights |= {f"{theirs}{name}.weight": tensor for name, tensor in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: _own(tensor) for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=1))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().contiguous()


class Peer:
    """The running peer; use it as a context manager. It is idle except inside ``seconds``."""

    def __init__(self, python: str, model_dir: Path, threads: int, log: Path) -> None:
        driver = Path(__file__).with_name("vllm_driver.py")
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, str(driver), str(model_dir), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log

    def wait_ready(self) -> None:
        self._answer()

    def seconds(self, requests: int, input_len: int, output_len: int) -> float:
        """Wall time of that many requests at once."""
        assert self._process.stdin is not None
        asked = {"requests": requests, "input_len": input_len, "output_len": output_len}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self._process.wait()}; its output is in {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
