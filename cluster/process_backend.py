"""The process backend: plain processes on this host, spawned (never forked), each in a session of its own.

Every rank of a life has a record, a spec (which holds the ranks' secret, so its mode is 600) and an announcement in the
run directory; by its records a life is found again, whoever started it.
"""

import asyncio
import json
import logging
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from biphase.cluster.backend import CONTROLLER, STATE, Handle, NodeView, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import GpuPart, divide, host_gpus, part_of
from biphase.cluster.local_logs import LocalLogs
from biphase.cluster.process_rank import ProcessRank
from biphase.cluster.rank_group import MissingRank, RankGroup
from biphase.cluster.ray_node_check import weights_lack, weights_of
from biphase.cluster.run_dir import RunDir, replace_file, started_ticks
from biphase.protos.errors import SetupError
from biphase.protos.process import Announcement
from biphase.protos.values import Role

LOADING_POLL_S = 0.05
MAX_IDLE = 64
"""Instances that would find room are counted no further."""
READY_POLL_S = 0.5
logger = logging.getLogger("biphase.cluster.supervisor")


class ProcessBackend:
    """Processes of one deployment on this host. ``owner`` ends what still runs when it closes (the supervisor does)."""

    kill_patience_s: float | None = None
    can_grow = False
    hosts_may_join = False

    def __init__(self, run_dir: RunDir, *, owner: bool = False) -> None:
        self._run_dir = run_dir
        self._owner = owner
        self._gpus = host_gpus()
        self._groups: dict[tuple[str, int], RankGroup] = {}
        self._gpu_parts: dict[tuple[str, int], GpuPart] = {}

    async def open(self) -> None:
        if self._owner:
            await self._clear()
        self._run_dir.processes.mkdir(parents=True, exist_ok=True)

    async def _clear(self) -> None:
        """End what a supervisor that was killed has left (a stopped process does not see that it is gone), and its records."""
        handles = await self.adopt()
        for handle in handles:
            if handle.end is None:
                logger.warning("killing %s#%d of an earlier life", handle.name, handle.incarnation)
        await self._end_all(handles)
        self._groups.clear()
        self._gpu_parts.clear()
        shutil.rmtree(self._run_dir.processes, ignore_errors=True)

    async def own_address(self) -> str:
        return "127.0.0.1"

    async def nodes(self) -> list[NodeView]:
        return []

    async def ask_node(self, spec: ProcessSpec) -> str:
        return "backend process has this host alone"

    async def withdraw_node(self, role: Role) -> None:
        pass

    async def node_came(self, spec: ProcessSpec) -> None:
        return None

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        """One host takes what it is given (threads and memory are the ranks' own defaults to bound), GPUs apart."""
        divide(specs[0].deployment, len(self._gpus))
        held = self._held()
        for spec in specs:
            for name in emptied.get(spec.name, ()) if emptied is not None else ():
                held.pop(name, None)
            held[spec.name] = self._part(spec, held)

    async def check_nodes(self, deployment: Deployment) -> list[str]:
        lack = await asyncio.to_thread(weights_lack, weights_of(deployment))
        if lack:
            raise SetupError(f"this host has no weights: {lack}")
        return []

    def check_for(self, deployments: Sequence[Deployment]) -> None:
        """This host is the only one."""

    async def start(self, spec: ProcessSpec) -> RankGroup:
        ranks: list[ProcessRank] = []
        rank_specs = self._rank_specs(spec)
        for rank_spec in rank_specs:  # before any is there: they look for rank 0's announcement
            self._file(rank_spec, "announce").unlink(missing_ok=True)
        try:
            for rank_spec in rank_specs:
                ranks.append(self._spawn(rank_spec))
        except SetupError:
            for rank in ranks:
                await rank.kill()
            raise
        group = RankGroup(name=spec.name, kind=spec.kind, incarnation=spec.incarnation, ranks=ranks)
        self._groups[spec.name, spec.incarnation] = group
        return group

    def _spawn(self, spec: ProcessSpec) -> ProcessRank:
        spec_file = self._file(spec, "spec")
        replace_file(spec_file, spec.to_json())
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        rank = ProcessRank.spawn(spec, spec_file, self._file(spec, "announce"))
        record = {
            "name": spec.name,
            "kind": spec.kind,
            "incarnation": spec.incarnation,
            "rank": spec.rank,
            "num_ranks": spec.plan.num_ranks,
            "pid": rank.pid,
            "started_ticks": started_ticks(rank.pid),
            "gpus": self._gpu_parts[spec.name, spec.incarnation].gpus,
            "gpu_share": self._gpu_parts[spec.name, spec.incarnation].share,
        }
        replace_file(self._file(spec), json.dumps(record))
        return rank

    def _file(self, spec: ProcessSpec, what: str = "") -> Path:
        return self._run_dir.process_file(spec.name, spec.incarnation, spec.rank, what)

    def _rank_specs(self, spec: ProcessSpec) -> list[ProcessSpec]:
        """What each rank is told: which one it is, how it finds rank 0, and which GPU is its own."""
        part = self._part(spec, self._held())
        self._gpu_parts[spec.name, spec.incarnation] = part
        several = spec.plan.num_ranks > 1
        key, leader = (secrets.token_hex(16), str(self._file(spec, "announce"))) if several else ("", "")
        specs = []
        for rank in range(spec.plan.num_ranks):
            env = (*spec.env, ("CUDA_VISIBLE_DEVICES", self._gpus[part.gpus[rank]])) if part.gpus else spec.env
            specs.append(replace(spec, rank=rank, rank_key=key, leader=leader, gpus=part.share, env=env))
        return specs

    async def idle(self, spec: ProcessSpec) -> int:
        """By GPUs; instances on the CPU are bounded by the policy alone."""
        held, found = self._held(), 0
        while found < MAX_IDLE:
            try:
                held[f"{spec.name}-{found}"] = self._part(spec, held)
            except SetupError:
                break
            found += 1
        return found

    def _part(self, spec: ProcessSpec, held: Mapping[str, GpuPart]) -> GpuPart:
        """Of the GPUs of this host, beside what others hold."""
        if spec.kind != "prefill" and spec.kind != "decode":
            return GpuPart()
        return part_of(spec.deployment, spec.name, spec.kind, len(self._gpus), held)

    def _held(self) -> dict[str, GpuPart]:
        """What living instances have of the GPUs, whoever started them."""
        held: dict[str, GpuPart] = {}
        for key, part in self._gpu_parts.items():
            group = self._groups.get(key)
            if group is not None and group.end is None:
                held[key[0]] = part
        return held

    async def adopt(self) -> list[Handle]:
        """Every life with a record here. One that has ended already is there too, with its end and last word."""
        records: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        for path in sorted(self._run_dir.processes.glob("*.json")):
            if path.name.endswith((".spec.json", ".announce.json")):
                continue
            with suppress(OSError, ValueError, KeyError):
                record = json.loads(path.read_text())
                records.setdefault((record["name"], record["incarnation"]), {})[record["rank"]] = record
        for key, found in records.items():
            if key not in self._groups:
                record = next(iter(found.values()))
                self._gpu_parts[key] = GpuPart(share=record.get("gpu_share", 0.0), gpus=tuple(record.get("gpus", ())))
                self._groups[key] = self._adopted(next(iter(found.values())), found)
        return [self._groups[key] for key in records]

    def _adopted(self, known: dict[str, Any], records: dict[int, dict[str, Any]]) -> RankGroup:
        """A life by its ranks' records. Its starter may have died before it had started all of them."""
        ranks: list[ProcessRank | MissingRank] = []
        for rank in range(known["num_ranks"]):
            announce_file = self._run_dir.process_file(known["name"], known["incarnation"], rank, "announce")
            ranks.append(
                ProcessRank.adopt(records[rank], announce_file) if rank in records else MissingRank("was never started")
            )
        return RankGroup(name=known["name"], kind=known["kind"], incarnation=known["incarnation"], ranks=ranks)

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        assert isinstance(handle, RankGroup)
        seen: Announcement | None = None
        while True:
            ended = handle.end is not None  # looked at before the files, so that the last announcement is not missed
            newest = handle.word()
            if newest is not None and newest != seen:
                seen = newest
                yield newest
            if ended:
                return
            poll_s = READY_POLL_S if seen is not None and seen.state == "ready" else LOADING_POLL_S
            with suppress(TimeoutError):
                await asyncio.wait_for(handle.ended(), poll_s)

    async def ask_to_stop(self, handle: Handle) -> None:
        assert isinstance(handle, RankGroup)
        await handle.ask_to_stop()

    async def kill(self, handle: Handle) -> None:
        assert isinstance(handle, RankGroup)
        await handle.kill()

    def logs_of(self, node: str) -> LocalLogs:
        return LocalLogs()

    async def save_state(self, text: str, key: str = STATE) -> None:
        replace_file(self._run_dir.kept_file(key), text)

    async def load_state(self, key: str = STATE) -> str | None:
        try:
            return self._run_dir.kept_file(key).read_text()
        except FileNotFoundError:
            return None

    async def close(self) -> None:
        if self._owner:
            await self._end_all([handle for handle in await self.adopt() if handle.kind == CONTROLLER])
            await self._end_all(await self.adopt())  # with what the controller may have started meanwhile
        for group in self._groups.values():
            group.release()
        self._groups.clear()

    async def _end_all(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            await self.kill(handle)
        for handle in handles:
            await handle.ended()
