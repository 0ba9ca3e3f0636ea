"""The step runner on a GPU. A launch returns when the step is in the device's queue; the next can be launched behind it.

The host writes a step's numbers into pinned memory, one copy takes them over, and kernels read them at fixed addresses:
decode steps replay a CUDA graph per batch bucket, others launch one by one. Tokens that the host has not seen yet are read
on the device from the last step's output; the host gets them with the step's event.
"""

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.checkpoint.shard import Shard
from biphase.engine.config import EngineConfig
from biphase.engine.draw_row import draw_row
from biphase.engine.engine import Engine, Progress
from biphase.engine.gpu.accelerator import Accelerator
from biphase.engine.gpu.launched import Launched
from biphase.engine.gpu.layer_watch import LayerWatch
from biphase.engine.gpu.model import GpuModel, StepShape
from biphase.engine.gpu.sampler import GpuSampler
from biphase.engine.gpu.step_batch import StepRows, fill, rows_of
from biphase.engine.gpu.step_inputs import StepInputs
from biphase.engine.gpu.warm_up import warm_up_handoff, warm_up_plans
from biphase.engine.parallel.group import RankGroups
from biphase.engine.step import PendingStep, StepPlan
from biphase.kernels.linear.rows import accumulate_in_float32
from biphase.kernels.ops import PagedKernels, paged_kernels
from biphase.protos.errors import EngineLost, InvalidRequest, SetupError, one_line
from biphase.protos.ids import SeqId

_log = logging.getLogger(__name__)

_KV_SHARE = 0.9
"""Of the memory that is free once weights and activations are there; graphs and cuBLAS take from the rest."""
_NUM_BUFFERS = 3
"""Pinned buffers: one under way, one being filled, one whose tokens are being read."""


def buckets_up_to(max_seqs: int) -> tuple[int, ...]:
    """Batch sizes that decode steps are padded to: powers of two, then multiples of 8."""
    sizes = {size for size in (1, 2, 4) if size < max_seqs} | set(range(8, max_seqs, 8)) | {max_seqs}
    return tuple(sorted(sizes))


class GpuEngine(Engine):
    """Made and used in the engine thread; only ``PendingStep.wait`` may be called elsewhere."""

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        kernels: PagedKernels,
        accelerator: Accelerator,
        groups: RankGroups | None = None,
    ) -> None:
        """``checkpoint.tensors`` on the device already. Raises SetupError when the pool cannot hold one request."""
        super().__init__(config, checkpoint, groups)
        self.pipeline_depth = 2 if self.plan.pp == 1 else self.plan.pp + 1
        self.may_continue = self.plan.pp == 1
        model, device = checkpoint.config, accelerator.device
        self.threads = torch.get_num_threads()
        self._accelerator = accelerator
        self._max_rows = config.max_step_tokens
        self._max_seqs = config.max_step_seqs
        self._model = GpuModel(
            model,
            checkpoint.tensors,
            kernels,
            layout=self.layout,
            max_rows=self._max_rows,
            max_seqs=self._max_seqs,
            max_model_len=self.model_info.max_model_len,
            device=device,
            groups=groups,
        )
        self._samples = groups is None or groups.samples
        self._layer_watch = LayerWatch()
        self._sampler = GpuSampler(kernels, max_rows=self._max_seqs, vocab_size=model.vocab_size, device=device)
        width = self.layout.blocks_for(self.model_info.max_model_len)
        self._inputs = StepInputs(
            accelerator, max_rows=self._max_rows, max_seqs=self._max_seqs, table_width=width, num_buffers=_NUM_BUFFERS
        )
        # graphs only ever need as many rows as sequences: a copy of all of a prefill's rows would cost each step
        self._graph_inputs = StepInputs(
            accelerator, max_rows=self._max_seqs, max_seqs=self._max_seqs, table_width=width, num_buffers=_NUM_BUFFERS
        )
        self._size_pool(self._kv_budget())
        self.kv_memory = self._model.bind_pool(self.num_blocks)
        self._buckets = buckets_up_to(self._max_seqs)
        self._graphs: dict[int, Callable[[], None]] = {}
        host = accelerator.host_buffer(_NUM_BUFFERS * self._max_seqs * 8).view(torch.int64)
        self._tokens = deque(host.view(_NUM_BUFFERS, self._max_seqs).unbind(0))
        self._launched: deque[Launched] = deque(maxlen=_NUM_BUFFERS)
        self._drawn_rows: dict[SeqId, int] = {}

    @staticmethod
    def load(
        config: EngineConfig, progress: Progress, kernels: str = "triton", *, groups: RankGroups | None = None
    ) -> "GpuEngine":
        """As Engine.load, for a resolved config; ``kernels``: the backend's name."""
        accumulate_in_float32()
        accelerator = Accelerator(torch.device(config.device))
        accelerator.enter()
        progress("opening weights", 0.0)
        try:
            checkpoint = open_checkpoint(
                config.model,
                dtype=config.dtype,
                cache_dir=Path(config.weights_cache) if config.weights_cache else None,
                progress=lambda text, done: progress(text, 0.5 * done),
                load_format=config.load_format,
                device=accelerator.device,
                shard=None if groups is None else Shard(plan=groups.plan, rank=groups.rank),
            )
            progress(f"weights to {config.device}", 0.5)
            with torch.inference_mode():
                moved = {name: tensor.to(accelerator.device) for name, tensor in checkpoint.tensors.items()}
                on_device = Checkpoint(config=checkpoint.config, model_hash=checkpoint.model_hash, tensors=moved)
                engine = GpuEngine(config, on_device, paged_kernels(kernels), accelerator, groups)
            if groups is not None:
                progress("waiting for the other ranks to load", 0.7)
                groups.meet("loaded", lambda line: progress(line, 0.7))
            progress("kernels and graphs", 0.7)
            engine.warm_up(lambda done: progress("kernels and graphs", 0.7 + 0.3 * done))
        except torch.OutOfMemoryError as error:
            line = f"{config.device} has too little memory for {config.model}: {one_line(error)}"
            raise SetupError(line) from error
        except ValueError as error:  # what the kernels do not support: a head_dim, a dtype on this GPU, a size
            raise SetupError(f"{config.model} on {config.device}: {one_line(error)}") from error
        progress("loaded", 1.0)
        return engine

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Put one step in the device's queue. Raises InvalidRequest for a malformed plan, with nothing launched;
        EngineLost when the device has failed, here or in an earlier step."""
        self.plan_limits.check(plan)
        rows = rows_of(plan)
        self._check_size(rows)
        try:
            return self._launch(plan, rows)
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) or "CUDA" in str(error):
                raise EngineLost(f"the GPU failed: {one_line(error)}") from error
            raise

    def _launch(self, plan: StepPlan, rows: StepRows) -> PendingStep:
        while len(self._launched) >= _NUM_BUFFERS:
            self._launched.popleft().wait()  # its buffers are needed; whoever launched it reads the kept result
        bucket = self._buckets[bisect_left(self._buckets, rows.num_rows)] if rows.graph else rows.num_rows
        inputs = self._graph_inputs if rows.graph else self._inputs
        fill(inputs.host(), plan, rows, self._drawn_rows, block_size=self.layout.block_size, padded=bucket)
        start = self._accelerator.record()
        inputs.upload(bucket if rows.graph else rows.num_seqs)
        self._sampler.prepare([draw_row(plan.seqs[i]) for i in rows.drawing])
        self._model.receive(bucket)
        told = self._layers_told(plan)
        if rows.graph and bucket in self._graphs:
            self._graphs[bucket]()
        else:
            self._compute(inputs, self._shape(rows, bucket), told and self._layer_watch.follow(told, self._accelerator))
        self._model.send(bucket)
        self._drawn_rows = {plan.seqs[i].seq_id: row for row, i in enumerate(rows.drawing)}
        drawing = rows.drawing if self._samples else ()
        num_drawing = len(drawing)
        tokens = self._tokens[0][:num_drawing]
        self._tokens.rotate(-1)
        tokens.copy_(self._sampler.tokens[:num_drawing], non_blocking=True)
        end = self._accelerator.record()
        launched = Launched(tokens, drawing, len(plan.seqs), start, end, told and self._layer_watch.last())
        self._launched.append(launched)
        return launched

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[float], None]) -> None:
        """Run every kind of step and of copy once, and capture the graphs: nothing is compiled afterwards.

        Block 0 is free yet; what is written there is never read.
        """
        plans = list(
            warm_up_plans(self.plan_limits, max_rows=self._max_rows, max_seqs=self._max_seqs, buckets=self._buckets)
        )
        total = len(plans) + len(self._buckets)
        for done, plan in enumerate(plans):
            self.launch(plan).wait()
            progress(done / total)
        for done, bucket in enumerate(reversed(self._buckets), start=len(plans)):
            self._capture(bucket)
            progress(done / total)
        warm_up_handoff(self.kv_memory)
        self._drawn_rows = {}
        _log.info("%d graphs for batches of up to %d", len(self._graphs), self._max_seqs)
        self._model.kernels.no_more_compiling()

    def _capture(self, bucket: int) -> None:
        """The graph of a decode step of ``bucket`` sequences; all of them padding while it is captured."""
        nobody = StepRows(num_rows=0, singles=(), chunks=(), drawing=(), chunk_lens=(), chunk_contexts=(), graph=True)
        inputs, shape = self._graph_inputs, self._shape(nobody, bucket)
        fill(inputs.host(), StepPlan(seqs=()), nobody, {}, block_size=self.layout.block_size, padded=bucket)
        inputs.upload(bucket)
        self._sampler.prepare([])
        self._compute(inputs, shape)  # what libraries set up at their first call must not be captured
        self._accelerator.synchronize()
        if self._accelerator.is_cuda and self._model.kernels.capturable:
            self._graphs[bucket] = self._accelerator.capture(lambda: self._compute(inputs, shape))

    def last_logits(self, num_rows: int) -> torch.Tensor:
        """Logits ``[num_rows, vocab]`` of the last launched step's drawing sequences, as a copy on the host."""
        return self._model.logits[:num_rows].cpu()

    def _compute(self, inputs: StepInputs, shape: StepShape, on_layers: Callable[[int], None] | None = None) -> None:
        self._model.forward(inputs, self._sampler.tokens, shape, on_layers)
        if shape.num_sampled and self._model.is_last_stage:
            self._sampler.run(self._model.logits[: shape.num_sampled])

    def _shape(self, rows: StepRows, padded: int) -> StepShape:
        num_decode = padded if rows.graph else len(rows.singles)
        prefill = None
        if rows.chunks:
            prefill = self._model.plan_prefill(self._inputs, rows.chunk_lens, rows.chunk_contexts, num_decode)
        return StepShape(
            num_rows=padded,
            num_decode=num_decode,
            prefill=prefill,
            num_sampled=padded if rows.graph else len(rows.drawing),
            gather=not rows.graph,
        )

    def _check_size(self, rows: StepRows) -> None:
        if rows.num_rows > self._max_rows:
            raise InvalidRequest(f"the step has {rows.num_rows} tokens, this engine was made for {self._max_rows}")
        if rows.num_seqs > self._max_seqs:
            raise InvalidRequest(f"the step has {rows.num_seqs} sequences, this engine was made for {self._max_seqs}")

    def _kv_budget(self) -> int:
        if self.config.kv_memory_bytes is not None:
            return self.config.kv_memory_bytes
        if not self._accelerator.is_cuda:
            return self.layout.block_bytes * self.layout.blocks_for(self.model_info.max_model_len)
        total, free, own = self._accelerator.memory_bytes()
        return int(min(_KV_SHARE * total * self.config.gpu_share - own, _KV_SHARE * free))
