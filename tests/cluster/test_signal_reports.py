"""From messages and deployments to the planner's values."""

import pytest

from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.signal_reports import instance_report, router_report, setup_of
from biphase.planner.reports import Histogram, JointHistogram, RouterReport
from biphase.protos import controller_pb2, convert
from biphase.protos.step_time import RecentSteps, StepTime
from biphase.protos.values import WorkerSignals


def test_a_routers_report_arrives_whole() -> None:
    message = controller_pb2.RouterReport(
        name="router-0",
        incarnation=2,
        uptime_s=5.0,
        offered_requests=9,
        offered_prompt_tokens=90,
        offered_output_tokens=45,
        ended={"finished": 7},
        latency=controller_pb2.JointHistogram(ttft_ms=[1.0], tpot_ms=[2.0], counts=[1, 2, 3, 4], missed=5),
        prompt_tokens=controller_pb2.Histogram(bounds=[8.0], counts=[1, 8]),
        replays=3,
    )
    assert router_report(message) == RouterReport(
        name="router-0",
        incarnation=2,
        uptime_s=5.0,
        offered_requests=9,
        offered_prompt_tokens=90,
        offered_output_tokens=45,
        ended={"finished": 7},
        latency=JointHistogram(ttft_ms=(1.0,), tpot_ms=(2.0,), counts=(1, 2, 3, 4), missed=5),
        prompt_tokens=Histogram(bounds=(8.0,), counts=(1, 8)),
        replays=3,
    )


def test_an_instances_report_arrives_whole() -> None:
    step = StepTime(fixed_s=1.0, per_token_s=2.0, per_context_s=3.0, num_steps=4)
    recent = RecentSteps(num_steps=1, seconds=2.0, tokens=3, context_tokens=4)
    said = WorkerSignals(uptime_s=1.0, decode_tokens=7, running_tokens=8, decode_step=step, recent=recent)
    report = instance_report("decode-0", "decode", 3, convert.signals_to_proto(said), num_blocks=10, block_size=16)
    assert (report.name, report.role, report.incarnation, report.num_blocks) == ("decode-0", "decode", 3, 10)
    assert (report.decode_tokens, report.work_left) == (7, 8)
    assert (report.decode_step, report.recent) == (step, recent)


def test_what_a_decision_knows_of_a_deployment() -> None:
    deployment = Deployment(
        model="m",
        mode="strict",
        prefill=RolePlan(tensor_parallel_size=2, max_num_batched_tokens=1024),
        decode=RolePlan(gpus=0.5, max_num_seqs=8, step_time=StepTime(fixed_s=0.01, num_steps=1)),
    )
    setup = setup_of(deployment)
    assert (setup.prefill.step_time, setup.decode.step_time) == (StepTime(), StepTime(fixed_s=0.01, num_steps=1))
    assert (setup.prefill.gpus, setup.decode.gpus, setup.strict, setup.colocated) == (2.0, 0.5, True, False)
    assert (setup.prefill.max_num_batched_tokens, setup.decode.max_num_seqs) == (1024, 8)
    assert setup.turn_s == setup.rebuild_s
    assert setup_of(Deployment(model="m", prefill=RolePlan(replicas=0))).colocated


@pytest.mark.parametrize(
    ("decode", "in_place"),
    [
        (RolePlan(), False),
        (RolePlan(gpus=0.5), True),
        (RolePlan(gpus=0.5, max_num_seqs=3), True),
        (RolePlan(gpus=1.0), False),
        (RolePlan(gpus=0.5, tensor_parallel_size=2), False),
        (RolePlan(gpus=0.25, tensor_parallel_size=2), False),  # as many GPUs of the instance
    ],
)
def test_a_flip_costs_a_start_wherever_it_is_one(decode: RolePlan, in_place: bool) -> None:
    deployment = Deployment(model="m", prefill=RolePlan(gpus=0.5), decode=decode)
    setup = setup_of(deployment)
    assert deployment.turns_in_place is in_place
    assert setup.turn_s == (setup.flip_s if in_place else setup.rebuild_s)
