"""What of a deployment its model does not allow, known before anything starts or drains. Pure."""

from biphase.cluster.deployment import Deployment
from biphase.cluster.wanted_set import ROLES
from biphase.engine.config import EngineConfig
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.local_config import local_config
from biphase.kernels.kv_layout import KvLayout, uniform_scales
from biphase.protos.errors import SetupError
from biphase.protos.values import Role


def check_model(deployment: Deployment, config: ModelConfig, *, may_have_gpus: bool = True) -> None:
    """Raises SetupError for a context beyond the model's, a plan that it cannot be cut by, types that its device does not
    compute in, and KV memory that cannot hold one request of max_model_len: what every instance would refuse at its start, some after others have drained for it.

    ``may_have_gpus``: whether a device of auto may be a GPU; the pool is then judged by what takes less."""
    limit = config.max_position_embeddings
    if deployment.max_model_len is not None and deployment.max_model_len > limit:
        raise SetupError(f"max_model_len is {deployment.max_model_len}, the model's limit is {limit}")
    for role in ROLES:
        if deployment.plan(role).replicas:
            _check_plan(deployment, role, config)
            _check_pool(deployment, role, config, may_have_gpus)


def _check_plan(deployment: Deployment, role: Role, config: ModelConfig) -> None:
    reason = deployment.plan(role).parallel.reason_against(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
    )
    if reason is not None:
        raise SetupError(f"{role}: {reason}")


def _check_pool(deployment: Deployment, role: Role, config: ModelConfig, may_have_gpus: bool) -> None:
    plan = deployment.plan(role)
    engines = _engines(deployment, role, may_have_gpus)
    if plan.kv_memory_bytes is None:
        return
    max_model_len = deployment.max_model_len or config.max_position_embeddings
    for rank in range(plan.parallel.num_ranks):
        local = local_config(config, plan.parallel, rank)
        needed = min(_bytes_for(max_model_len, local, engine) for engine in engines)
        if plan.kv_memory_bytes < needed:
            raise SetupError(
                f"{role}: kv_memory is {plan.kv_memory_bytes} bytes, one request of max_model_len {max_model_len} needs "
                f"{needed}: give more, or a smaller max_model_len"
            )


def _engines(deployment: Deployment, role: Role, may_have_gpus: bool) -> list[EngineConfig]:
    """What its instances may come to be: with a GPU, without one. Raises SetupError where they can be neither."""
    plan = deployment.plan(role)
    possible, reason = list[EngineConfig](), ""
    for has_cuda in (False, True) if may_have_gpus else (False,):
        try:
            engine = EngineConfig(
                model=deployment.model,
                device=deployment.device_of(role),
                dtype=deployment.dtype,
                kv_dtype=deployment.kv_dtype,
                block_size=plan.block_size,
            )
            possible.append(engine.resolved(has_cuda=has_cuda))
        except ValueError as error:
            reason = str(error)
    if not possible:
        raise SetupError(f"{role}: {reason}")
    return possible


def _bytes_for(num_tokens: int, local: ModelConfig, engine: EngineConfig) -> int:
    assert engine.block_size is not None
    fp8 = engine.kv_dtype == "float8_e4m3fn"
    layout = KvLayout(
        num_layers=local.num_layers,
        num_kv_heads=local.num_kv_heads,
        head_dim=local.head_dim,
        block_size=engine.block_size,
        dtype=engine.kv_dtype,
        kv_scales=uniform_scales(local.num_layers, local.num_kv_heads) if fp8 else None,
    )
    return layout.blocks_for(num_tokens) * layout.block_bytes
