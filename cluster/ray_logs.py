"""Logs of another host of a Ray cluster: read by a task that runs there, part by part and only when somebody asks."""

import asyncio
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from biphase.cluster.local_logs import read_part
from biphase.cluster.ray_hosts import RayHost
from biphase.cluster.ray_rank import CallRay
from biphase.protos.errors import InvalidRequest, one_line

READ_S = 20.0
"""The first part waits for Ray to start a Python there."""


class RayLogs:
    """Of ``host``. ``call`` makes a blocking Ray call outside the loop."""

    poll_s = 1.0

    def __init__(self, call: CallRay, host: RayHost) -> None:
        self._call, self._host = call, host
        there = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
        self._task = ray.remote(read_part).options(num_cpus=0, max_retries=0, scheduling_strategy=there)

    async def read(self, path: str, at: int, tail_lines: int = 0) -> tuple[int, bytes]:
        where = self._host.address
        try:
            asked = await self._call(partial(self._ask, path, at, tail_lines))
            end, data, problem = await asyncio.wait_for(asyncio.wrap_future(asked), READ_S)
        except TimeoutError as error:
            raise InvalidRequest(f"it lies on {where}, which has not answered within {READ_S:g} s") from error
        except Exception as error:
            raise InvalidRequest(f"it lies on {where}, which cannot be asked: {one_line(error)[:160]}") from error
        if problem:
            raise InvalidRequest(f"{path} on {where}: {problem}")
        return end, data

    def _ask(self, path: str, at: int, tail_lines: int) -> Any:
        return self._task.remote(path, at, tail_lines).future()

    def __repr__(self) -> str:
        return f"<RayLogs of {self._host.address}>"
