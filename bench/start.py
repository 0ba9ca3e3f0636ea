"""How long a start takes, stage by stage, and what an idle deployment costs.

    python bench/start.py [--backend ray|process] [--rounds 5] [--idle-s 30] [--json FILE] [--check]

One start with a fresh weights cache, then ``--rounds`` starts with the converted weights there (page cache warm), each
from the spawn of `biphase serve` to the first token at a client. The last one stays, to measure its idle CPU use.
"""

import argparse
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from report import Report, add_arguments, run

from biphase.client import Client
from biphase.cluster.run_dir import RunDir

FIRST_START_S, SECOND_START_S, IDLE_PERCENT = 45.0, 20.0, 2.0
READY_WITHIN_S = 300.0
STAGES = ("supervisor", "ray up", "processes started", "controller", "workers loading", "ready", "first token")


@dataclass
class Start:
    """One running `biphase serve` and when it reached what, in seconds since its spawn."""

    process: "subprocess.Popen[str]"
    run_dir: RunDir
    stages: dict[str, float]


def start(arguments: argparse.Namespace, base: Path, cache: Path) -> Start:
    """Spawn `biphase serve`, wait for its ready line, ask for one token."""
    command = [sys.executable, "-m", "biphase.cluster.cli", "serve", "--model", arguments.model, "--port", "0"]
    command += ["--backend", arguments.backend, "--weights-cache", str(cache), "--name", "bench-start"]
    began_s = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, "BIPHASE_RUN_DIR": str(base)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], READY_WITHIN_S)
    line = process.stdout.readline() if readable else ""
    run_dir = RunDir(base / "bench-start")
    if not line.startswith("ready: "):
        end(process)
        sys.exit(f"no ready line within {READY_WITHIN_S:g} s; logs: {run_dir.logs}")
    record = run_dir.record()
    assert record is not None
    with Client(record.router_address) as client:
        for _ in client.generate("Hello", max_tokens=1, temperature=0.0):
            pass
    first_token_s = time.monotonic() - began_s
    stages = dict(record.stages)
    loading = [at_s for name, at_s in stages.items() if name.endswith(" loading") and not name.startswith("router")]
    stages["workers loading"] = min(loading, default=stages["ready"])
    stages.setdefault("ray up", stages.get("backend up", 0.0))
    return Start(process, run_dir, {**stages, "first token": first_token_s})


def end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGINT)
    process.wait(60)


def idle_percent(started: Start, idle_s: float) -> tuple[dict[str, float], float]:
    """CPU use of each of our processes, and of Ray's own together, in percent of a core over ``idle_s``."""
    record = started.run_dir.record()
    assert record is not None
    ours = {line.pid: line.name for line in record.processes}
    ours |= {record.pid: "supervisor", started.process.pid: "biphase serve"}
    everyone = [psutil.Process(started.process.pid), *psutil.Process(started.process.pid).children(recursive=True)]
    everyone += [psutil.Process(pid) for pid in ours if pid not in {process.pid for process in everyone}]
    before = {process.pid: _cpu_s(process) for process in everyone}
    began_s = time.monotonic()
    time.sleep(idle_s)  # the measurement itself: what is used while nothing happens
    took_s = time.monotonic() - began_s
    used = {process.pid: 100.0 * (_cpu_s(process) - before[process.pid]) / took_s for process in everyone}
    named = {ours[pid]: percent for pid, percent in used.items() if pid in ours}
    return named, sum(percent for pid, percent in used.items() if pid not in ours)


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", choices=("ray", "process"), default="ray")
    parser.add_argument("--rounds", type=int, default=5, help="second starts")
    parser.add_argument("--idle-s", type=float, default=30.0, help="how long to watch the idle deployment")
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("start", ("start", *STAGES))
    with tempfile.TemporaryDirectory(prefix="biphase-start-") as scratch:
        base, cache = Path(scratch) / "run", Path(scratch) / "weights"
        first_tokens_s = []
        for number in range(arguments.rounds + 1):
            started = start(arguments, base, cache)
            stages = [round(started.stages.get(stage, float("nan")), 2) for stage in STAGES]
            report.row("first" if number == 0 else f"second {number}", *stages)
            first_tokens_s.append(started.stages["first token"])
            if number < arguments.rounds:
                end(started.process)
        idle, ray_idle = idle_percent(started, arguments.idle_s)
        end(started.process)
    report.goal("first_start_s", first_tokens_s[0], FIRST_START_S)
    report.goal("second_start_p50_s", statistics.median(first_tokens_s[1:]), SECOND_START_S)
    print(f"idle CPU over {arguments.idle_s:g} s, percent of one core:")
    for name, percent in sorted(idle.items()):
        print(f"  {name:14s} {percent:5.2f}")
        report.goal(f"idle_percent_{name.replace(' ', '_')}", round(percent, 3), IDLE_PERCENT)
    print(f"  {'Ray itself':14s} {ray_idle:5.2f}")
    report.extra = {"idle_percent": idle, "ray_idle_percent": ray_idle}
    return report.finish(arguments)


if __name__ == "__main__":
    run(main)
