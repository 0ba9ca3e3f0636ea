"""What of a deployment its model does not allow, known before anything starts or drains. Pure."""

from biphase.cluster.deployment import Deployment
from biphase.cluster.wanted_set import ROLES
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.local_config import local_config
from biphase.kernels.kv_layout import ITEM_BYTES, KvLayout, uniform_scales
from biphase.protos.errors import SetupError
from biphase.protos.values import Role

CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 32, 64


def check_model(deployment: Deployment, config: ModelConfig, *, may_have_gpus: bool = True) -> None:
    """Raises SetupError for a context beyond the model's, a plan that it cannot be cut by, and KV memory that cannot hold one
    request of max_model_len: what every instance would refuse at its start, some after others have drained for it.

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
    if plan.kv_memory_bytes is None:
        return
    max_model_len = deployment.max_model_len or config.max_position_embeddings
    certainly_gpu = deployment.device.startswith("cuda")
    may_be_gpu = certainly_gpu or (may_have_gpus and deployment.device != "cpu" and plan.gpus != 0)
    dtype = _kv_dtype(deployment, may_be_gpu)
    block_size = plan.block_size or (GPU_BLOCK_SIZE if certainly_gpu else CPU_BLOCK_SIZE)
    for rank in range(plan.parallel.num_ranks):
        local = local_config(config, plan.parallel, rank)
        layout = KvLayout(
            num_layers=local.num_layers,
            num_kv_heads=local.num_kv_heads,
            head_dim=local.head_dim,
            block_size=block_size,
            dtype=dtype,
            kv_scales=uniform_scales(local.num_layers, local.num_kv_heads) if dtype == "float8_e4m3fn" else None,
        )
        needed = layout.blocks_for(max_model_len) * layout.block_bytes
        if plan.kv_memory_bytes < needed:
            raise SetupError(
                f"{role}: kv_memory is {plan.kv_memory_bytes} bytes, one request of max_model_len {max_model_len} needs "
                f"{needed}: give more, or a smaller max_model_len"
            )


def _kv_dtype(deployment: Deployment, may_be_gpu: bool) -> str:
    for dtype in (deployment.kv_dtype, deployment.dtype):
        if dtype in ITEM_BYTES:
            return dtype
    return "bfloat16" if may_be_gpu else "float32"
