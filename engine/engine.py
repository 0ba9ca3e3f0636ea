"""The step runner: model, KV pool and sampler. Everything here runs in the engine thread."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from biphase.engine.batch import BatchBuilder, StepBatch
from biphase.engine.checkpoint import Checkpoint, open_checkpoint
from biphase.engine.config import EngineConfig
from biphase.engine.model import LlamaModel
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kernels.ops import Kernels, select_kernels
from biphase.kernels.sample import DrawRow
from biphase.protos.errors import SetupError, one_line
from biphase.protos.values import ModelInfo

_DEFAULT_KV_BYTES = 4 << 30
_DEFAULT_KV_SHARE = 0.2

Progress = Callable[[str, float], None]
"""(what is being done, how much of all is done: 0 .. 1)."""


class Engine:
    """One loaded model with its KV pool. Owned by the engine thread; the pool's blocks are whoever holds them."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, kernels: Kernels) -> None:
        """Raises SetupError when the pool cannot hold one request of max_model_len."""
        model = checkpoint.config
        self.config = config
        self.model_config = model
        self.threads = torch.get_num_threads()
        self.layout = KvLayout(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=config.block_size,
            dtype=config.dtype,
        )
        max_model_len = _max_model_len(config, model.max_position_embeddings)
        self.num_blocks = _num_blocks(config, self.layout, max_model_len)
        self.kv_bytes = self.num_blocks * self.layout.block_bytes
        self.rope_signature = f"theta {model.rope.theta} dim {model.rope.rotary_dim} scaling {model.rope.scaling}"
        self.model_info = ModelInfo(
            name=config.served_name or Path(config.model).name,
            model_hash=checkpoint.model_hash,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=model.eos_token_ids,
            architecture=model.architecture,
            dtype=config.dtype,
        )
        try:
            # numpy's zeros are mapped on first touch; torch's would write gigabytes here
            memory = np.zeros(self.layout.pool_shape(self.num_blocks), dtype=np.float32)
        except MemoryError as error:
            raise SetupError(f"no memory for {self.num_blocks} KV blocks, {self.kv_bytes} bytes") from error
        self.kv_memory = CpuKvMemory(memory, self.layout)
        pool = torch.from_numpy(memory)
        self._kernels = kernels
        self._model = LlamaModel(model, checkpoint.tensors, pool, kernels)
        self._builder = BatchBuilder(
            kernels=kernels,
            layout=self.layout,
            num_heads=model.num_heads,
            num_blocks=self.num_blocks,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            sliding_window=model.sliding_window,
        )

    @staticmethod
    def load(config: EngineConfig, progress: Progress) -> "Engine":
        """Call it in the thread that will execute: torch's thread count is a property of the calling thread.

        Raises SetupError, one line.
        """
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // config.instances_on_host))
        try:
            kernels = select_kernels(config.device)
        except ValueError as error:
            raise SetupError(one_line(error)) from error
        progress("opening weights", 0.0)
        cache_dir = Path(config.weights_cache) if config.weights_cache else None
        checkpoint = open_checkpoint(
            config.model,
            dtype=config.dtype,
            cache_dir=cache_dir,
            progress=lambda text, done: progress(text, 0.8 * done),
        )
        progress("allocating the KV pool", 0.8)
        engine = Engine(config, checkpoint, kernels)
        progress("first step", 0.9)
        engine._warm_up()
        progress("loaded", 1.0)
        return engine

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: k and v of every token into the pool, a token for every sequence that samples.

        Raises InvalidRequest for a malformed plan; then nothing was written.
        """
        start_s = time.perf_counter()
        tokens = self.compute(plan, self.prepare(plan))
        return StepResult(tokens=tokens, step_ms=(time.perf_counter() - start_s) * 1e3)

    def prepare(self, plan: StepPlan) -> StepBatch:
        """First half of ``execute``: check the plan and turn it into tensors. Raises InvalidRequest."""
        with torch.inference_mode():
            return self._builder.build(plan)

    def compute(self, plan: StepPlan, batch: StepBatch) -> tuple[int | None, ...]:
        """Second half of ``execute``: forward pass and draws. ``batch`` is the latest that ``prepare`` made."""
        tokens: list[int | None] = [None] * len(plan.seqs)
        with torch.inference_mode():
            logits_RV = self._model.forward(batch)
            if logits_RV is not None:
                drawn = self._kernels.sample.sample(logits_RV, [_draw_row(plan.seqs[i]) for i in batch.sampled_seqs])
                for i, token in zip(batch.sampled_seqs, drawn, strict=True):
                    tokens[i] = token
        return tuple(tokens)

    def _warm_up(self) -> None:
        """One step through all weights, so that the first request does not wait for page faults. Block 0 is free yet."""
        count = min(self.layout.block_size, self.model_info.max_model_len)
        seq = SeqStep(seq_id=-1, token_ids=[0] * count, start=0, blocks=[0])  # type: ignore[arg-type, list-item]
        self.execute(StepPlan(seqs=(seq,)))


def _draw_row(seq: SeqStep) -> DrawRow:
    sampling = seq.sampling
    if sampling is None or sampling.temperature == 0:
        return DrawRow(forbid_ids=seq.forbid_ids)
    return DrawRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        branch=sampling.branch,
        position=seq.output_index,
        forbid_ids=seq.forbid_ids,
    )


def _max_model_len(config: EngineConfig, model_limit: int) -> int:
    if config.max_model_len is not None and config.max_model_len > model_limit:
        raise SetupError(f"max_model_len is {config.max_model_len}, the model's limit is {model_limit}")
    return config.max_model_len or model_limit


def _num_blocks(config: EngineConfig, layout: KvLayout, max_model_len: int) -> int:
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    else:
        free = psutil.virtual_memory().available
        default = min(_DEFAULT_KV_BYTES, int(free * _DEFAULT_KV_SHARE / config.instances_on_host))
        num_blocks = (config.kv_memory_bytes or default) // layout.block_bytes
    needed = layout.blocks_for(max_model_len)
    if num_blocks < needed:
        raise SetupError(
            f"the KV pool holds {num_blocks} blocks of {layout.block_bytes} bytes, max_model_len {max_model_len} needs "
            f"{needed}: give more kv memory or a smaller max_model_len"
        )
    return num_blocks
