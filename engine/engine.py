"""What the rest of an instance knows of its engine: facts about the model, a KV memory, and steps."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch

from biphase.engine.checkpoint.opening import Checkpoint
from biphase.engine.config import EngineConfig
from biphase.engine.limits import Limits
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.local_config import local_config
from biphase.engine.plan_limits import PlanLimits
from biphase.engine.step import PendingStep, StepPlan, StepResult
from biphase.kernels.kv_layout import KvLayout, uniform_scales
from biphase.kernels.kv_pack.memory import KvMemory
from biphase.kernels.ops import choose_backend
from biphase.protos.errors import SetupError, one_line
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import ModelInfo, Role

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""(what is being done, how much of all is done: 0 .. 1)."""

OnLayers = Callable[[StepPlan, int], None]
"""(a running step, how many of this rank's layers have k and v of all its tokens in the pool)."""


class Engine(ABC):
    """One loaded model with its KV pool. Owned by the engine thread; the pool's blocks are whoever holds them."""

    config: EngineConfig
    """Resolved: device, dtypes and block size are what it runs with."""
    model_config: ModelConfig
    model_info: ModelInfo
    plan: ParallelPlan
    rank: int
    full_layout: KvLayout
    """Of the whole model."""
    layout: KvLayout
    """Of this rank's pool: its layers, its KV heads."""
    num_blocks: int
    kv_bytes: int
    kv_memory: KvMemory
    rope_signature: str
    plan_limits: PlanLimits
    threads: int
    pipeline_depth: int
    """How many steps may be launched and not over: the next one's scheduling overlaps with those."""
    may_continue: bool
    """Whether a step may take a token that a running one draws; with several stages none may."""
    on_layers: OnLayers | None = None
    """Called while a step with a prompt chunk runs, after each of about four groups of layers; lastly with all. On the CPU
    in the engine thread, which waits for it; on a GPU in a thread of its own."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, groups: RankGroups | None = None) -> None:
        """The facts of the model. Raises SetupError when max_model_len is beyond it."""
        model = checkpoint.config
        self.plan = ParallelPlan() if groups is None else groups.plan
        self.rank = 0 if groups is None else groups.rank
        self.config = config
        self.model_config = model
        self.full_layout = _layout(model, config)
        self.layout = _layout(local_config(model, self.plan, self.rank), config)
        limit = model.max_position_embeddings
        if config.max_model_len is not None and config.max_model_len > limit:
            raise SetupError(f"max_model_len is {config.max_model_len}, the model's limit is {limit}")
        self.rope_signature = f"theta {model.rope.theta} dim {model.rope.rotary_dim} scaling {model.rope.scaling}"
        self.model_info = ModelInfo(
            name=config.served_name or Path(config.model).name,
            model_hash=checkpoint.model_hash,
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len or limit,
            eos_token_ids=model.eos_token_ids,
            architecture=model.architecture,
            dtype=config.dtype,
        )

    def _size_pool(self, kv_budget_bytes: int) -> None:
        """Sets the number of blocks. Raises SetupError when they cannot hold one request of max_model_len."""
        num_blocks = self.config.num_kv_blocks or kv_budget_bytes // self.layout.block_bytes
        max_model_len = self.model_info.max_model_len
        needed = self.layout.blocks_for(max_model_len)
        if num_blocks < needed:
            raise SetupError(
                f"the KV pool holds {num_blocks} blocks of {self.layout.block_bytes} bytes, max_model_len "
                f"{max_model_len} needs {needed}: give more kv memory or a smaller max_model_len"
            )
        self.num_blocks = num_blocks
        self.kv_bytes = num_blocks * self.layout.block_bytes
        self.plan_limits = PlanLimits(
            block_size=self.layout.block_size,
            num_blocks=num_blocks,
            vocab_size=self.model_info.vocab_size,
            max_model_len=max_model_len,
        )

    @property
    def limits(self) -> Limits:
        """What requests can fit here, by model and pool."""
        info = self.model_info
        return Limits(
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            num_blocks=self.num_blocks,
            block_size=self.layout.block_size,
        )

    @property
    def device(self) -> str:
        """Where it computes and in what, for people: ``cuda bfloat16, KV float8_e4m3fn``."""
        config = self.config
        kv_dtype = "" if config.kv_dtype == config.dtype else f", KV {config.kv_dtype}"
        return f"{config.device} {config.dtype}{kv_dtype}"

    @staticmethod
    def load(config: EngineConfig, progress: Progress, *, groups: RankGroups | None = None) -> "Engine":
        """The engine of the configured device, or one rank of it: then all ranks of ``groups`` load at once.

        Call it in the thread that will launch: torch keeps thread counts and streams per thread. Raises SetupError, one
        line."""
        has_cuda = config.device != "cpu" and torch.cuda.is_available()
        if config.device.startswith("cuda") and not has_cuda:
            raise SetupError(f"device {config.device!r} was asked for, and torch {torch.__version__} finds no CUDA GPU")
        try:
            resolved = config.resolved(has_cuda=has_cuda)
            backend = choose_backend(resolved.device)
        except ValueError as error:
            raise SetupError(one_line(error)) from error
        _log.info("kernels: %s, as %s", backend.name, backend.reason)
        if backend.token_major:
            from biphase.engine.gpu.engine import GpuEngine

            return GpuEngine.load(resolved, progress, backend.name, groups=groups)
        from biphase.engine.cpu_engine import CpuEngine

        return CpuEngine.load(resolved, progress, groups=groups)

    @abstractmethod
    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin one step: k and v of every token into the pool, a token for every sequence that samples.

        What it cannot compute is raised here, then nothing was written (InvalidRequest), or by the pending step's wait().
        """

    def turn(self, role: Role, incarnation: int) -> None:
        """From the next step on it serves that role, as every process that computes its steps is told. None is under way."""
        _log.info("the engine turns: %s, incarnation %d", role, incarnation)

    def _layers_told(self, plan: StepPlan) -> Callable[[int], None] | None:
        """What a step calls with its number of finished layers, None for one that nobody follows."""
        told = self.on_layers
        if told is None or all(len(seq.token_ids) == 1 for seq in plan.seqs):
            return None
        return lambda num_layers: told(plan, num_layers)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step from launch to result."""
        return self.launch(plan).wait()


def _layout(model: ModelConfig, config: EngineConfig) -> KvLayout:
    """fp8 KV is kept as it is: keys and values of common models lie far within e4m3's +-448, and it has no fixed step."""
    assert config.block_size is not None
    is_fp8 = config.kv_dtype == "float8_e4m3fn"
    return KvLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=config.kv_dtype,
        kv_scales=uniform_scales(model.num_layers, model.num_kv_heads) if is_fp8 else None,
    )
