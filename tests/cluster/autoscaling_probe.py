"""The inside of test_ray_node_requests: an autoscaling Ray cluster in a pid namespace of its own, as its head and driver.

Ends every Ray process that it can see (the cluster helper runs `ray stop`): only for a pid namespace of its own. Prints one
line of JSON: what was seen, in order.
"""

import asyncio
import json
import os
import sys
import time
import traceback
from pathlib import Path

WAIT_S = 150.0
FAKE: dict[str, object] = {
    "cluster_name": "fake_multinode",
    "max_workers": 2,
    "provider": {"type": "fake_multinode"},
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.05,
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


async def _until(what: object, within_s: float = WAIT_S) -> float:
    """Seconds until ``what()`` is true."""
    began_s = time.monotonic()
    while not await what():  # type: ignore[operator]
        if time.monotonic() - began_s > within_s:
            raise TimeoutError(f"not within {within_s} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - began_s


async def _main() -> dict[str, object]:
    import ray
    from ray.util import placement_group_table

    from biphase.cluster.backend import ProcessSpec
    from biphase.cluster.deploy_schema import deployment_from
    from biphase.cluster.ray_backend import RayBackend
    from biphase.cluster.wanted import spec_of

    deployment = deployment_from({"model": "smollm2", "name": "ask", "device": "cpu", "decode": {"cpus": 2}})
    backend = RayBackend(deployment, owner=True)
    await backend.open()
    base = ProcessSpec(
        name="controller",
        kind="controller",
        incarnation=1,
        deployment=deployment,
        run_dir="/tmp/run",
        controller_address="",
    )
    spec = spec_of(base, "decode-wish", 0, kind="decode")
    seen: dict[str, object] = {"can_grow": backend.can_grow, "idle": await backend.idle(spec)}

    def states() -> list[str]:
        return sorted(group["state"] for group in placement_group_table().values())

    too_many = [spec_of(base, f"decode-{number}", 1, kind="decode") for number in range(4)]
    try:
        await backend.check(too_many)
    except Exception as error:  # noqa: BLE001 -- its words are the result
        seen["refused"] = str(error)
    await backend.check(too_many[:2])  # fits max_workers, though nothing of it is there

    seen["asked"] = await backend.ask_node(spec)
    await backend.ask_node(spec)
    seen["requests"] = states()
    seen["came"] = await backend.node_came(spec)

    async def joined() -> bool:
        return sum(node["Alive"] for node in ray.nodes()) == 2

    seen["came_s"] = round(await _until(joined), 1)

    async def granted() -> bool:
        return states() == ["CREATED"]

    await _until(granted)

    async def came() -> bool:
        return await backend.node_came(spec) is True

    await _until(came)
    seen["idle_while_asked"] = await backend.idle(spec)
    controller = RayBackend(deployment, owner=False)  # a controller's next life
    await controller.open()
    seen["adopted"] = await controller.adopt()

    async def found_again() -> bool:  # once the host is checked
        return await controller.node_came(spec) is True

    await _until(found_again)
    seen["next_life"] = states()
    await controller.close()
    await backend.withdraw_node("decode")
    seen["came_after"] = await backend.node_came(spec)

    async def withdrawn() -> bool:
        return [state for state in states() if state != "REMOVED"] == [] and await backend.idle(spec) == 1

    await _until(withdrawn)
    seen["idle_after"] = await backend.idle(spec)

    await backend.ask_node(spec)

    async def asked_again() -> bool:
        return "CREATED" in states()

    await _until(asked_again)
    for handle in await backend.adopt():  # what a stop does first
        await backend.kill(handle)
    seen["after_stop"] = [state for state in states() if state != "REMOVED"]
    await backend.close()
    return seen


def main() -> int:
    if os.getppid() != 1 or os.getpid() > 100:
        print("run this as the child of the first process of a pid namespace of its own", file=sys.stderr)
        return 2
    import ray
    from ray.cluster_utils import AutoscalingCluster

    class Cluster(AutoscalingCluster):  # type: ignore[misc]
        """Ray's wheel lacks the example that the helper begins with."""

        def _generate_config(
            self, head_resources: object, worker_node_types: dict[str, object], **words: object
        ) -> dict[str, object]:
            head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
            types = {"ray.head.default": head, **worker_node_types}
            return {**FAKE, "available_node_types": types}

    worker = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"CPU": 0, "object_store_memory": 80_000_000}
    cluster = Cluster(head_resources=head, worker_node_types={"worker": worker})
    cluster.start(override_env={"RAY_USAGE_STATS_ENABLED": "0"})
    try:
        address = next(
            word.partition("=")[2]
            for path in Path("/proc").glob("[0-9]*/cmdline")
            for word in path.read_text(errors="replace").split("\0")
            if word.startswith("--gcs-address=")
        )
        os.environ["RAY_ADDRESS"] = address
        print(json.dumps(asyncio.run(_main())), flush=True)
        code = 0
    except Exception:  # noqa: BLE001 -- told before Ray ends this process for having no head any more
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    ray.shutdown()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
