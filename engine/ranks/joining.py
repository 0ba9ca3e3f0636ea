"""What ranks of both kinds do to come together: who they are, where rank 0 is, and the groups of their exchanges."""

import asyncio
import time
from pathlib import Path

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Progress
from biphase.engine.parallel.group import RankGroups
from biphase.engine.ranks.channel import FindLeader
from biphase.engine.ranks.greeting import Membership
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.process import Announcement, Announcer

_LOOK_EVERY_S = 0.1
_PROGRESS_EVERY_S = 0.2


def membership(config: WorkerConfig) -> Membership:
    return Membership(instance=config.name, plan=config.plan, rank=config.rank, key=config.rank_key)


def leader_of(config: WorkerConfig) -> FindLeader:
    """By the config alone: ``leader`` is an address, or the file that rank 0 announces itself in."""

    async def find() -> str:
        if "/" not in config.leader:
            return config.leader
        while not (address := _announced_in(Path(config.leader))):  # noqa: ASYNC110 -- a file tells nobody
            await asyncio.sleep(_LOOK_EVERY_S)
        return address

    return find


def _announced_in(file: Path) -> str:
    try:
        return Announcement.from_json(file.read_text()).rank_address
    except (OSError, ValueError, TypeError):
        return ""  # not there yet


def join_groups(config: WorkerConfig, engine: EngineConfig, store: Store, progress: Progress) -> RankGroups:
    """Call it in the engine thread. Raises SetupError when another rank does not come."""
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    return RankGroups.join(
        config.plan,
        config.rank,
        store=store,
        host=config.rank_host,
        backend="nccl" if on_gpu else "gloo",
        timeout_s=config.step_timeout_s,
        join_timeout_s=config.load_timeout_s,
        on_wait=lambda line: progress(line, 0.0),
        device=torch.device("cuda" if engine.device == "auto" else engine.device) if on_gpu else None,
    )


def announcing(announcer: Announcer) -> Progress:
    """Progress as announcements, a few a second."""
    last_s, last_detail = 0.0, ""

    def progress(detail: str, share: float) -> None:
        nonlocal last_s, last_detail
        now_s = time.monotonic()
        if detail != last_detail or now_s - last_s >= _PROGRESS_EVERY_S:
            last_s, last_detail = now_s, detail
            announcer.update(state="loading", detail=detail, progress=share)

    return progress
