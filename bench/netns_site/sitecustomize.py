"""On the PYTHONPATH of a deployment under the process backend: each of its processes moves to a host of its own.

Python imports a module of this name at start-up. Of `python -m biphase.cluster.process_main SPEC ANNOUNCE` it enters a
network namespace before anything else has happened, and writes the host's address into the spec; the pid stays, so that the
backend watches, kills and adopts the process as always. ``BIPHASE_NETNS`` names a JSON file: {"hosts": {HOST: {"address",
"namespace"}}, "fixed": {PROCESS: HOST}, "controller": ADDRESS, "lives": {HOST: [PROCESS, INCARNATION, PID, TICKS]}}. An
instance takes the first host that has no living process and is not cut ("cut": [HOST]), as a replacement on another machine.

With ``BIPHASE_CGROUP`` (a folder) an instance joins a cgroup of its name there, of ``BIPHASE_CGROUP_CORES`` cores.
"""

import ctypes
import fcntl
import json
import os
import sys

_CLONE_NEWNET = 0x40000000
_PERIOD_US = 50_000
_MODULE = "biphase.cluster.process_main"


def _ticks(pid):
    """As biphase.cluster.run_dir.started_ticks."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _choose(plan, name):
    if name in plan["fixed"]:
        return plan["fixed"][name]
    for host in plan["hosts"]:
        life = plan["lives"].get(host)
        free = life is None or _ticks(life[2]) != life[3]
        if free and host not in plan["fixed"].values() and host not in plan["cut"]:
            return host
    raise SystemExit(f"no free host for {name} of {', '.join(plan['hosts'])}")


def _move(plan_file, spec_file):
    with open(spec_file) as file:
        spec = json.load(file)
    with open(plan_file, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        plan = json.load(file)
        host = _choose(plan, spec["name"])
        plan["lives"][host] = [spec["name"], spec["incarnation"], os.getpid(), _ticks(os.getpid())]
        file.seek(0)
        file.truncate()
        json.dump(plan, file)
    namespace = os.open(f"/run/netns/{plan['hosts'][host]['namespace']}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) != 0:
        raise SystemExit(f"setns: {os.strerror(ctypes.get_errno())}")
    os.close(namespace)
    port = spec["controller_address"].rpartition(":")[2]
    is_controller = spec["name"] == "controller"
    spec["controller_address"] = f"{'0.0.0.0' if is_controller else plan['controller']}:{port}"
    spec["host"] = plan["hosts"][host]["address"]
    with open(spec_file, "w") as file:
        json.dump(spec, file)


def _share(root, spec_file):
    with open(spec_file) as file:
        spec = json.load(file)
    if spec["kind"] not in ("prefill", "decode"):
        return
    group, cores = os.path.join(root, spec["name"]), float(os.environ["BIPHASE_CGROUP_CORES"])
    os.makedirs(group, exist_ok=True)
    if os.path.exists(os.path.join(group, "cpu.max")):
        settings = {"cpu.max": f"{int(cores * _PERIOD_US)} {_PERIOD_US}"}
    else:
        settings = {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(int(cores * _PERIOD_US))}
    for name, value in {**settings, "cgroup.procs": str(os.getpid())}.items():
        with open(os.path.join(group, name), "w") as file:
            file.write(value)


if _MODULE in sys.orig_argv:
    _spec_file = sys.orig_argv[sys.orig_argv.index(_MODULE) + 1]
    if os.environ.get("BIPHASE_CGROUP"):
        _share(os.environ["BIPHASE_CGROUP"], _spec_file)
    if os.environ.get("BIPHASE_NETNS"):
        _move(os.environ["BIPHASE_NETNS"], _spec_file)
