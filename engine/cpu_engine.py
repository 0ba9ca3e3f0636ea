"""The step runner on the CPU: model, KV pool and sampler. A step is over when its launch returns."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from biphase.engine.batch import BatchBuilder, StepBatch
from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.checkpoint.shard import Shard
from biphase.engine.config import EngineConfig
from biphase.engine.draw_row import draw_row
from biphase.engine.engine import Engine, Progress
from biphase.engine.host_figures import available_memory_bytes
from biphase.engine.model import LlamaModel
from biphase.engine.parallel.group import RankGroups
from biphase.engine.step import DoneStep, PendingStep, SeqStep, StepPlan, StepResult
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kernels.ops import Kernels, cpu_kernels
from biphase.protos.errors import InvalidRequest, SetupError

_DEFAULT_KV_BYTES = 4 << 30
_DEFAULT_KV_SHARE = 0.2


class CpuEngine(Engine):
    """Float32, feature-major (kernels/ops.py). Everything here runs in the engine thread."""

    may_continue = False

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, kernels: Kernels, groups: RankGroups | None = None
    ) -> None:
        """Raises SetupError when the pool cannot hold one request of max_model_len."""
        model = checkpoint.config
        super().__init__(config, checkpoint, groups)
        self.pipeline_depth = 1 if self.plan.pp == 1 else self.plan.pp + 1
        self.threads = torch.get_num_threads()
        self._size_pool(_kv_budget(config, self.plan.num_ranks))
        try:
            # numpy's zeros are mapped on first touch; torch's would write gigabytes here
            memory = np.zeros(self.layout.pool_shape(self.num_blocks), dtype=np.float32)
        except MemoryError as error:
            raise SetupError(f"no memory for {self.num_blocks} KV blocks, {self.kv_bytes} bytes") from error
        self.kv_memory = CpuKvMemory(memory, self.layout)
        pool = torch.from_numpy(memory)
        self._kernels = kernels
        self._model = LlamaModel(model, checkpoint.tensors, pool, kernels, groups)
        self._builder = BatchBuilder(
            kernels=kernels,
            layout=self.layout,
            limits=self.plan_limits,
            num_heads=model.num_heads // self.plan.tp,
            sliding_window=model.sliding_window,
        )

    @staticmethod
    def load(config: EngineConfig, progress: Progress, *, groups: RankGroups | None = None) -> "CpuEngine":
        """As Engine.load, for a resolved config."""
        num_ranks = 1 if groups is None else groups.plan.num_ranks
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // (config.instances_on_host * num_ranks)))
        progress("opening weights", 0.0)
        cache_dir = Path(config.weights_cache) if config.weights_cache else None
        checkpoint = open_checkpoint(
            config.model,
            dtype=config.dtype,
            cache_dir=cache_dir,
            progress=lambda text, done: progress(text, 0.8 * done),
            load_format=config.load_format,
            shard=None if groups is None else Shard(plan=groups.plan, rank=groups.rank),
        )
        progress("allocating the KV pool", 0.8)
        engine = CpuEngine(config, checkpoint, cpu_kernels(), groups)
        if groups is not None:
            progress("waiting for the other ranks to load", 0.9)
            groups.meet("loaded", lambda line: progress(line, 0.9))
        progress("first step", 0.9)
        engine._warm_up()
        progress("loaded", 1.0)
        return engine

    def launch(self, plan: StepPlan) -> PendingStep:
        return DoneStep(result=self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: k and v of every token into the pool, a token for every sequence that samples.

        Raises InvalidRequest for a malformed plan; then nothing was written.
        """
        start_s = time.perf_counter()
        tokens = self.compute(plan, self.prepare(plan))
        return StepResult(tokens=tokens, step_ms=(time.perf_counter() - start_s) * 1e3)

    def prepare(self, plan: StepPlan) -> StepBatch:
        """First half of ``execute``: check the plan and turn it into tensors. Raises InvalidRequest."""
        for seq in plan.seqs:
            if seq.continues:
                raise InvalidRequest(f"sequence {seq.seq_id} continues a running step; this engine has one at a time")
        with torch.inference_mode():
            return self._builder.build(plan)

    def compute(self, plan: StepPlan, batch: StepBatch) -> tuple[int | None, ...]:
        """Second half of ``execute``: forward pass and draws. ``batch`` is the latest that ``prepare`` made."""
        tokens: list[int | None] = [None] * len(plan.seqs)
        with torch.inference_mode():
            logits_RV = self._model.forward(batch, self._layers_told(plan))
            if logits_RV is not None:
                drawn = self._kernels.sample.sample(logits_RV, [draw_row(plan.seqs[i]) for i in batch.sampled_seqs])
                for i, token in zip(batch.sampled_seqs, drawn, strict=True):
                    tokens[i] = token
        return tuple(tokens)

    def _warm_up(self) -> None:
        """One step through all weights, so that the first request does not wait for page faults. Block 0 is free yet."""
        count = min(self.layout.block_size, self.model_info.max_model_len)
        seq = SeqStep(seq_id=-1, token_ids=[0] * count, start=0, blocks=[0])  # type: ignore[arg-type, list-item]
        self.execute(StepPlan(seqs=(seq,)))


def _kv_budget(config: EngineConfig, num_ranks: int) -> int:
    """Of one rank, as if all ranks of the instance were on this host: too little is the better guess."""
    share = _DEFAULT_KV_SHARE / (config.instances_on_host * num_ranks)
    return config.kv_memory_bytes or min(_DEFAULT_KV_BYTES, int(available_memory_bytes() * share))
