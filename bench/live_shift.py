"""The P:D ratio following a load that turns: the autoscaler beside both fixed ratios, on real processes.

    python bench/live_shift.py [--phase 150] [--rate 1.7] [--model smollm2] [--arms auto 2P1D 1P2D] [--plot FILE.svg]
                               [--json FILE] [--check]

Mode strict (in auto a decode instance would repair a wrong ratio by prefilling itself), 3 instances under a fixed budget, each
with half a core of its own (cgroup quota, as root), so that an idle one's time flows to nobody. The load turns from long
prompts with short answers to short prompts with long answers, and back. First the unloaded times are measured, whose medians
x 5 are the goals, then what one prefill and one decode instance can do within them (``shift_shape.py``); lengths are chosen so
that the right ratio has a quarter of headroom and a little more, and each fixed ratio shows before its run what of its capacity
the load leaves (``shift_calibration.py``).
The fixed ratios have the same requests, but begin each phase empty, for the work that the wrong one leaves behind would spoil the
next; the third phase, which is as the first, only the autoscaler has. Attainment counts refused and failed requests as misses; it is taken from 60 s after each turn to its end.
"""

import argparse
import asyncio
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cpu_shares
import report
import shift_plot
from load_clock import shifted
from local_cluster import LocalCluster, local_cluster
from shift_calibration import (
    DECODE_HEAVY_INPUT,
    PREFILL_HEAVY_OUTPUT,
    burst,
    choose,
    decode_capacity,
    prefill_capacity,
)
from shift_judge import (
    AUTO,
    COOLDOWN_S,
    FEWEST_IN_WINDOW,
    FLIP_GRACE_S,
    HEADROOM,
    INSTANCES,
    PHASE_S,
    RIGHT,
    WINDOW_S,
    Arm,
    Look,
    fewest_in_window,
    judge,
    parts_of,
    turn_of,
)
from shift_shape import Shape

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Phase, arrivals, total_s
from biphase.client.bench.lengths import fixed
from biphase.client.bench.prompts import RandomPrompts
from biphase.client.bench.runner import Runner
from biphase.protos.errors import BiphaseError

CORES_EACH = 0.5
CHOSEN_HEADROOM = {"prefill": HEADROOM + 0.12, "decode": HEADROOM + 0.07}
"""A little more than is asked for: a long prompt takes more per token than the short ones that are measured."""
LOOK_EVERY_S, STATUS_EVERY_S = 0.1, 0.5
FLIP = re.compile(r"\bflip ([\w-]+) to ")
RATIOS = {"2P1D": (2, 1), "1P2D": (1, 2)}


def phases_of(shape: Shape, rate: float, seconds: float) -> list[Phase]:
    def phase(name: str, input_tokens: int, output_tokens: int) -> Phase:
        return Phase(
            name=name,
            seconds=seconds,
            rate=rate,
            rate_end=rate,
            burstiness=4.0,  # a little more even than Poisson: 40 requests in a window are few
            input_tokens=fixed(input_tokens),
            output_tokens=fixed(output_tokens),
        )

    heavy = phase("prefill-heavy", shape.input_tokens, PREFILL_HEAVY_OUTPUT)
    return [heavy, phase("decode-heavy", DECODE_HEAVY_INPUT, shape.output_tokens), heavy]


def deploy_of(arguments: argparse.Namespace, ratio: tuple[int, int], policy: dict[str, Any] | None) -> dict[str, Any]:
    plan = {"threads": 1, "kv_memory": arguments.kv_memory, "max_num_seqs": 64}
    deploy: dict[str, Any] = {
        "model": arguments.model,
        "backend": "process",
        "mode": "strict",
        "max_model_len": 1024,
        "prefill": {**plan, "replicas": ratio[0]},
        "decode": {**plan, "replicas": ratio[1]},
        "drain_s": 2.0,
    }
    return deploy | ({"autoscale": policy, "flip_grace_s": FLIP_GRACE_S} if policy else {})


def policy_of(shape: Shape) -> dict[str, Any]:
    rule = {"stabilization_s": 5, "cooldown_s": COOLDOWN_S, "max_step": 1}
    return {
        "interval_s": 5,
        "window_s": 20,
        "gpu_budget": {"min": INSTANCES, "max": INSTANCES},
        "prefill": {"min_replicas": 1, "max_replicas": 2},
        "decode": {"min_replicas": 1, "max_replicas": 2},
        "targets": {
            "ttft_ms": shape.goals["ttft"],
            "tpot_ms": shape.goals["tpot"],
            "percentile": 90,
            "attainment": 0.9,
        },
        "scale_up": rule,
        "scale_down": rule,
        "role_flip": {"enabled": True, "min_gain": 0.05, "cooldown_s": COOLDOWN_S},
    }


async def calibrate(arguments: argparse.Namespace) -> Shape:
    with cpu_shares.cpu_shares(CORES_EACH) as env:
        async with local_cluster(deploy_of(arguments, (1, 2), None), env) as cluster:
            async with AsyncClient(cluster.address) as client:
                found = await choose(client, arguments.rate, CHOSEN_HEADROOM)
    print(f"chosen: {found}", file=sys.stderr, flush=True)
    return found


class Following:
    """Notes, until cancelled, every change of the ratio, the controller's decisions, and how instances turn."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient, now_s: Callable[[], float], arm: Arm) -> None:
        self._cluster, self._client, self._now_s, self._arm = cluster, client, now_s, arm
        self._orders: list[tuple[str, float]] = []
        self._looks: dict[str, list[Look]] = defaultdict(list)

    async def run(self) -> None:
        try:
            await asyncio.gather(self._follow_status(), self._follow_instances())
        finally:
            self._arm.turns = [self._turn(index) for index in range(len(self._orders))]

    def _turn(self, index: int) -> Any:
        name, ordered_unix_s = self._orders[index]
        next_unix_s = min((at for other, at in self._orders[index + 1 :] if other == name), default=float("inf"))
        return turn_of(name, ordered_unix_s, [one for one in self._looks[name] if one.asked_unix_s < next_unix_s])

    async def _follow_status(self) -> None:
        arm = self._arm
        while True:
            status = await self._cluster.status()
            if status is not None:
                ready = [process.role for process in status.processes if process.state == "ready" and process.role]
                now = ready.count(1), ready.count(2)
                if sum(now) and (not arm.ratios or arm.ratios[-1][1:] != now):
                    arm.ratios.append((self._now_s(), *now))
                for event in status.decisions:
                    line = f"{event.kind} {event.subject}: {event.text}"
                    if line not in arm.decisions:
                        arm.decisions.append(line)
                        if (flip := FLIP.search(event.text)) is not None:
                            self._orders.append((flip[1], event.unix_s))
                        print(f"{arm.name} at {self._now_s():.0f} s: {line}", file=sys.stderr, flush=True)
            await asyncio.sleep(STATUS_EVERY_S)

    async def _follow_instances(self) -> None:
        while True:
            asked_unix_s = time.time()
            try:
                instances = (await self._client.server_info(timeout_s=1.0)).instances
            except BiphaseError:
                instances = ()
            for one in instances:
                look = Look(
                    asked_unix_s=asked_unix_s,
                    role=one.role,
                    state=one.state,
                    since_unix_s=one.since_unix_s,
                    legs=one.legs,
                )
                self._looks[one.name].append(look)
            await asyncio.sleep(LOOK_EVERY_S)


def check_shares(env: dict[str, str]) -> None:
    """SystemExit unless every instance is in a group of its own."""
    groups = [path for path in Path(env["BIPHASE_CGROUP"]).iterdir() if path.is_dir()]
    taken = [path.name for path in groups if (path / "cgroup.procs").read_text().split()]
    if len(taken) != INSTANCES:
        raise SystemExit(f"{len(taken)} instances have a share of the processors, not {INSTANCES}: {', '.join(taken)}")


async def headroom_of(client: AsyncClient, shape: Shape, ratio: str, rate: float) -> float:
    """The share of what the ratio can do with the load that it is right for, that ``rate`` leaves."""
    num_prefill, num_decode = RATIOS[ratio]
    if RIGHT["prefill-heavy"] == ratio:
        return 1.0 - rate / await prefill_capacity(client, shape, num_prefill)
    return 1.0 - rate / await decode_capacity(client, shape, num_decode)


async def run_arm(arguments: argparse.Namespace, name: str, shape: Shape, phases: Sequence[Phase]) -> Arm:
    arm = Arm(name=name)
    policy = policy_of(shape) if name == AUTO else None
    ratio = RATIOS.get(name, RATIOS["2P1D"])  # the autoscaler begins with what suits the first phase
    with cpu_shares.cpu_shares(CORES_EACH) as env:
        async with local_cluster(deploy_of(arguments, ratio, policy), env) as cluster:
            async with AsyncClient(cluster.address) as client:
                check_shares(env)
                await burst(client, 4, 64, 8, 0.5)
                if policy is None:
                    arm.headroom = await headroom_of(client, shape, name, arguments.rate)
                model = (await client.model_info()).model
                prompts = RandomPrompts(vocab_size=model.vocab_size, max_model_len=model.max_model_len, seed=7)
                due = list(arrivals(phases, random.Random(arguments.seed)))
                for begin_s, part in parts_of(name, due, phases):
                    runner = Runner([client], prompts, timeout_s=120.0)

                    def now_s(runner: Runner = runner, begin_s: float = begin_s) -> float:
                        return begin_s + runner.now_s()

                    following = asyncio.create_task(Following(cluster, client, now_s, arm).run())
                    arm.measured += shifted(await runner.run(part), begin_s)
                    following.cancel()
                    await asyncio.wait([following])
    return arm


async def measure(arguments: argparse.Namespace) -> int:
    columns = ("ratio", "phase", "requests", "attainment", "worst window", "TTFT p90 ms", "TPOT p90 ms", "failed")
    found = report.Report("live_shift", columns)
    shape = await calibrate(arguments)
    phases = phases_of(shape, arguments.rate, arguments.phase)
    due = list(arrivals(phases, random.Random(arguments.seed)))
    if (fewest := fewest_in_window(due, total_s(phases))) < FEWEST_IN_WINDOW:
        least = f"a window of {WINDOW_S:g} s must hold {FEWEST_IN_WINDOW}"
        raise SystemExit(f"--rate {arguments.rate:g} has {fewest} requests in some window, {least}: raise it")
    arms = []
    for name in arguments.arms:
        arms.append(await run_arm(arguments, name, shape, phases))
        found.extra["arms"] = [
            {
                "name": arm.name,
                "ratios": arm.ratios,
                "decisions": arm.decisions,
                "headroom": arm.headroom,
                "turns": [asdict(turn) for turn in arm.turns],
                "requests": len(arm.measured),
                "replays": sum(one.replays for one in arm.measured),
            }
            for arm in arms
        ]
        found.write(arguments)
    found.extra["shape"] = {
        "input_tokens": shape.input_tokens,
        "output_tokens": shape.output_tokens,
        "goals_ms": shape.goals,
        "prefill_tokens_per_s": shape.prefill_rate,
        "decode_tokens_per_s": shape.decode_rate,
        "decode_requests": shape.decode_requests,
        "rate": arguments.rate,
    }
    judge(found, arms, shape.goals, phases)
    if arguments.plot:
        _draw(Path(arguments.plot), arms, phases, shape)
    return found.finish(arguments)


def _draw(path: Path, arms: Sequence[Arm], phases: Sequence[Phase], shape: Shape) -> None:
    path.write_text(shift_plot.picture(arms, phases, shape.goals, WINDOW_S))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=float, default=PHASE_S, metavar="S", help="length of each of the three phases")
    parser.add_argument("--rate", type=float, default=1.7, help="requests/s: a window of 30 s must hold 40")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-memory", default="256MiB", help="of each instance")
    parser.add_argument("--arms", nargs="+", choices=[AUTO, *RATIOS], default=[AUTO, *RATIOS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="an SVG")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    reason = cpu_shares.lacking()
    if reason:
        print(f"live_shift: needs a share of the processors for each instance: {reason}", file=sys.stderr)
        return 2
    return asyncio.run(measure(arguments))


if __name__ == "__main__":
    report.run(main)
