"""The model that one rank runs, in numbers: fewer layers, heads and features; how often it tells of them. Pure."""

from dataclasses import replace

from biphase.engine.model_config import ModelConfig
from biphase.protos.parallel_plan import ParallelPlan


def local_config(config: ModelConfig, plan: ParallelPlan, rank: int) -> ModelConfig:
    """The layers, heads and features of a rank. Vocabulary and number of experts stay the model's: a token's id and its
    choice among experts mean the same on every rank."""
    if plan.num_ranks == 1:
        return config
    return replace(
        config,
        num_layers=len(plan.layers_of(rank, config.num_layers)),
        num_heads=config.num_heads // plan.tp,
        num_kv_heads=len(plan.kv_heads_of(rank, config.num_kv_heads)),
        intermediate_size=config.intermediate_size if config.num_experts else config.intermediate_size // plan.tp,
    )


def layer_marks(num_layers: int) -> frozenset[int]:
    """After how many layers a step says so: about four times, lastly after all."""
    group = max(1, round(num_layers / 4))
    return frozenset(range(group, num_layers, group)) | {num_layers}
