"""From messages and a deployment to the planner's values: reports, and what a decision must know of the deployment."""

from collections.abc import Mapping

from biphase.cluster.deployment import Deployment
from biphase.planner.capacity import RoleShape, Setup
from biphase.planner.policy import ROLES
from biphase.planner.reports import Histogram, InstanceReport, JointHistogram, RouterReport
from biphase.protos import controller_pb2, convert, worker_pb2
from biphase.protos.values import Role


def router_report(message: controller_pb2.RouterReport) -> RouterReport:
    return RouterReport(
        name=message.name,
        incarnation=message.incarnation,
        uptime_s=message.uptime_s,
        offered_requests=message.offered_requests,
        offered_prompt_tokens=message.offered_prompt_tokens,
        offered_output_tokens=message.offered_output_tokens,
        ended=dict(message.ended),
        latency=_joint(message.latency),
        running=_joint(message.running),
        prompt_tokens=_histogram(message.prompt_tokens),
        output_tokens=_histogram(message.output_tokens),
        queued_requests=message.queued_requests,
        queued_tokens=message.queued_tokens,
        running_requests=message.running_requests,
        replays=message.replays,
    )


def instance_report(
    name: str,
    role: Role,
    incarnation: int,
    message: worker_pb2.WorkerSignals,
    *,
    num_blocks: int = 0,
    block_size: int = 0,
) -> InstanceReport:
    """``num_blocks`` and ``block_size`` as the instance's Welcome gave them."""
    signals = convert.signals_from_proto(message)
    return InstanceReport(
        name=name,
        role=role,
        incarnation=incarnation,
        uptime_s=signals.uptime_s,
        prefill_tokens=signals.prefill_tokens,
        decode_tokens=signals.decode_tokens,
        num_steps=signals.num_steps,
        busy_s=signals.busy_s,
        queued=signals.queued,
        queued_tokens=signals.queued_tokens,
        running=signals.running,
        running_tokens=signals.running_tokens,
        free_blocks=signals.free_blocks,
        num_blocks=num_blocks,
        block_size=block_size,
        prefill_step=signals.prefill_step,
        decode_step=signals.decode_step,
        recent=signals.recent,
        step_s=signals.step_s,
        step_expected_s=signals.step_expected_s,
    )


def setup_of(deployment: Deployment, *, gpus: Mapping[Role, float] | None = None) -> Setup:
    """What a decision must know of a deployment. ``gpus``: of one rank of each role, where they are known better.

    On the CPU, and where the deployment gives no number, a rank counts as one GPU.
    """
    shapes = {
        role: RoleShape(
            gpus=plan.parallel.num_ranks * ((gpus or {}).get(role) or plan.gpus or 1.0),
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            step_time=plan.step_time,
            plan=plan.cut,
        )
        for role in ROLES
        for plan in [deployment.plan(role)]
    }
    return Setup(
        prefill=shapes["prefill"],
        decode=shapes["decode"],
        strict=deployment.mode == "strict",
        colocated=deployment.prefill.replicas == 0,
    )


def _joint(message: controller_pb2.JointHistogram) -> JointHistogram:
    return JointHistogram(
        ttft_ms=tuple(message.ttft_ms),
        tpot_ms=tuple(message.tpot_ms),
        counts=tuple(message.counts),
        missed=message.missed,
    )


def _histogram(message: controller_pb2.Histogram) -> Histogram:
    return Histogram(bounds=tuple(message.bounds), counts=tuple(message.counts))
