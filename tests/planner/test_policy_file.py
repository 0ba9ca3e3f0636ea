"""Policy files: what is taken, what is refused, in one line with the value and the limit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.sources import ROOT

from biphase.planner.policy import BoundsChange, Policy, RoleBounds, Schedule, contradiction
from biphase.planner.policy_file import load_policy, policy_from, policy_from_text
from biphase.protos.errors import SetupError


def refusal(text: str) -> str:
    with pytest.raises(SetupError) as raised:
        policy_from_text(text, source="policy.yaml")
    message = str(raised.value)
    assert "\n" not in message
    return message


def plain(policy: Policy) -> Any:
    """As a policy file would say it, every key given."""
    return json.loads(json.dumps(asdict(policy)))


def test_an_empty_mapping_is_the_defaults() -> None:
    assert policy_from({}) == Policy()


def test_the_shipped_example_is_taken_as_it_is() -> None:
    policy = load_policy(ROOT / "examples" / "policy.yaml")
    assert policy.schedules
    assert policy_from(plain(policy)) == policy


def test_every_value_arrives() -> None:
    policy = policy_from_text(
        """
interval_s: 2
window_s: 30
gpu_budget: {min: 3, max: 3}
prefill: {min_replicas: 1, max_replicas: 2}
decode: {min_replicas: 1, max_replicas: 2}
targets: {ttft_ms: 500, tpot_ms: 50, percentile: 95, attainment: 0.9}
scale_up: {stabilization_s: 4, cooldown_s: 10, max_step: 1}
scale_down: {stabilization_s: 6, cooldown_s: 30, max_step: 1}
role_flip: {enabled: true, min_gain: 0.1, cooldown_s: 30}
start_timeout_s: 60
node_wait_s: 120
schedules:
  - {name: day, cron: "0 8 * * mon-fri", time_zone: Europe/Berlin, duration_s: 36000, prefill: {min_replicas: 2, max_replicas: 2}}
dry_run: true
""",
        source="policy.yaml",
    )
    assert (policy.interval_s, policy.window_s, policy.dry_run) == (2.0, 30.0, True)
    assert policy.gpu_budget.min == policy.gpu_budget.max == 3.0
    assert policy.targets.percentile == 95.0
    assert policy.rule("down").stabilization_s == 6.0
    (schedule,) = policy.schedules
    assert (schedule.label, schedule.prefill) == ("day", BoundsChange(min_replicas=2, max_replicas=2))
    assert policy.with_schedule(schedule).bounds("prefill").min_replicas == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interval: 5", "policy.yaml:1: unknown key interval: did you mean interval_s?"),
        (
            "prefill:\n  min_replica: 1",
            "policy.yaml:2: unknown key prefill.min_replica: did you mean min_replicas?",
        ),
        ("role_flip: {zzz: 1}", "policy.yaml:1: unknown key role_flip.zzz: known keys: enabled, min_gain, cooldown_s"),
        (
            "prefill: {min_replicas: 3, max_replicas: 2}",
            "policy.yaml:1: prefill.min_replicas is 3, more than prefill.max_replicas 2",
        ),
        ("gpu_budget: {min: 5, max: 4}", "policy.yaml:1: gpu_budget.min is 5, more than gpu_budget.max 4"),
        (
            "gpu_budget: {max: 4}\ndecode: {min_replicas: 4}",
            "policy.yaml:1: gpu_budget.max is 4, and the 1 prefill and 4 decode instances of min_replicas take 5 GPUs",
        ),
        (
            "gpu_budget: {min: 20, max: 20}",
            "policy.yaml:1: gpu_budget.min is 20, and the 8 prefill and 8 decode instances of max_replicas take 16 GPUs at most",
        ),
        ("targets: {ttft_ms: 0}", "policy.yaml:1: targets.ttft_ms is 0: it must be above 0"),
        ("targets:\n  tpot_ms: -1", "policy.yaml:2: targets.tpot_ms is -1: it must be above 0"),
        ("targets: {attainment: 1}", "policy.yaml:1: targets.attainment is 1: it must be below 1"),
        ("role_flip: {min_gain: 7}", "policy.yaml:1: role_flip.min_gain is 7: the most is 1"),
        ("window_s: 2", "policy.yaml:1: window_s is 2, less than interval_s 5"),
        (
            "scale_up: {stabilization_s: 3}",
            "policy.yaml:1: scale_up.stabilization_s is 3, less than interval_s 5: give at least that, or 0",
        ),
        (
            "decode: {min_replicas: 0}",
            "policy.yaml:1: decode.min_replicas is 0, the least is 1: without a decode instance no request ends",
        ),
        ("scale_up: 3", "policy.yaml:1: scale_up is 3: it must be a mapping of stabilization_s, cooldown_s, max_step"),
        ("interval_s: soon", "policy.yaml:1: interval_s is 'soon': input should be a valid number"),
        ("interval_s: .inf", "policy.yaml:1: interval_s is inf: it must be a finite number"),
        ("- 1", "policy.yaml: a policy file is a mapping of keys such as gpu_budget, prefill and targets"),
        ("dry_run: true\ndry_run: false", "policy.yaml:2: not valid YAML: key dry_run is given twice"),
        ("a: [", "policy.yaml:1: not valid YAML: expected the node content, but found '<stream end>'"),
        (
            "schedules:\n  - {cron: '0 8 * *', duration_s: 60}",
            "policy.yaml:2: schedules.0.cron is '0 8 * *': 4 fields, give 5: minute, hour, day of month, month, day of week",
        ),
        (
            "schedules:\n  - {cron: '0 8 31 2 *', duration_s: 60}",
            "policy.yaml:2: schedules.0.cron is '0 8 31 2 *': bad day-of-month",
        ),
        (
            "schedules:\n  - {cron: '0 8 * * *', duration_s: 60, time_zone: Europe/Atlantis}",
            "policy.yaml:2: schedules.0.time_zone is 'Europe/Atlantis': no such time zone, give one as in Europe/Berlin",
        ),
        (
            "schedules:\n  - {cron: '0 8 * * *', duration_s: 60, gpu_budget: {max: 1}}",
            "policy.yaml:2: schedules.0.gpu_budget.max is 1, and the 1 prefill and 1 decode instances of min_replicas take 2 GPUs",
        ),
        ("schedules:\n  - {cron: '0 8 * * *'}", "policy.yaml:2: key schedules.0.duration_s is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    assert refusal(text) == message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot read policy file .*: No such file or directory"):
        load_policy(tmp_path / "none.yaml")


def test_contradictions_with_the_deployment() -> None:
    assert contradiction(Policy(), gpus={"prefill": 8.0, "decode": 4.0}) == (
        "gpu_budget.max is 8, and the 1 prefill and 1 decode instances of min_replicas take 12 GPUs"
    )
    none = Policy(prefill=RoleBounds(min_replicas=0, max_replicas=2))
    assert contradiction(none) is None
    assert contradiction(none, strict=True) == (
        "prefill.min_replicas is 0 with mode strict, whose least is 1: decode instances do not prefill in it"
    )
    assert contradiction(none, colocated=True) == (
        "prefill.max_replicas is 2, and the deployment has 0 prefill instances"
    )


def test_a_policy_is_what_its_values_make() -> None:
    policy = Policy(schedules=(Schedule(cron="0 0 * * *", duration_s=5, decode=BoundsChange(min_replicas=2)),))
    assert policy_from(plain(policy)) == policy
