"""On the PYTHONPATH of a deployment under the process backend: each of its processes moves to a host of its own.

Python imports a module of this name at start-up. Of `python -m biphase.cluster.process_main SPEC ANNOUNCE` it enters a
network namespace before anything else has happened, and writes the host's address into the spec; the pid stays, so that the
backend watches, kills and adopts the process as always. ``BIPHASE_NETNS`` names the plan of hosts (``host_plan.py``). An
instance takes the first free host that the controller reaches and that it is not told to avoid, and waits while there is none,
as for room on another machine; the controller's backend is that of several hosts (``other_hosts.py``).

With ``BIPHASE_CGROUP`` (a folder) each life of an instance joins a cgroup of its own there, of ``BIPHASE_CGROUP_CORES`` cores.
"""

import ctypes
import json
import os
import sys
import time
import traceback

_CLONE_NEWNET = 0x40000000
_PERIOD_US = 50_000
_LOOK_EVERY_S = 0.05
_MODULE = "biphase.cluster.process_main"


def _move(plan_file, spec_file):
    import other_hosts
    from host_plan import CONTROLLER, changing_plan, is_alive, started_ticks

    with open(spec_file) as file:
        spec = json.load(file)
    host = None
    while host is None:
        with changing_plan(plan_file) as plan:
            host = plan.choose(spec["name"], spec["avoid_nodes"], is_alive)
            if host is not None:
                pid = os.getpid()
                plan.settle(host, spec["name"], spec["incarnation"], pid, started_ticks(pid), is_alive)
        if host is None:
            time.sleep(_LOOK_EVERY_S)
    namespace = os.open(f"/run/netns/{plan.hosts[host]['namespace']}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(f"setns: {os.strerror(ctypes.get_errno())}")
    os.close(namespace)
    port = spec["controller_address"].rpartition(":")[2]
    home = "0.0.0.0" if spec["name"] == CONTROLLER else plan.hosts[plan.fixed[CONTROLLER]]["address"]
    spec["controller_address"] = f"{home}:{port}"
    spec["host"] = plan.hosts[host]["address"]
    with open(spec_file, "w") as file:
        json.dump(spec, file)
    other_hosts.call_node(host)
    if spec["name"] == CONTROLLER:
        other_hosts.install(plan_file)


def _share(root, spec_file):
    with open(spec_file) as file:
        spec = json.load(file)
    if spec["kind"] not in ("prefill", "decode"):
        return
    group, cores = (
        os.path.join(root, f"{spec['name']}-{spec['incarnation']}"),
        float(os.environ["BIPHASE_CGROUP_CORES"]),
    )
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
    try:
        if os.environ.get("BIPHASE_CGROUP"):
            _share(os.environ["BIPHASE_CGROUP"], _spec_file)
        if os.environ.get("BIPHASE_NETNS"):
            _move(os.environ["BIPHASE_NETNS"], _spec_file)
    except Exception:  # noqa: BLE001 -- Python would go on without us, on the wrong host or with the wrong share
        traceback.print_exc()
        os._exit(1)
