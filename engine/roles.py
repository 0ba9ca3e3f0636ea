"""What each role is made of, found by its name: the package of a role holds its parts, and no role's imports another's.

A process serves both: it begins as the one and may turn into the other while its engine stays loaded.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from biphase.engine.ranks.following import FollowerPhase
from biphase.engine.worker import Worker
from biphase.protos.values import ROLES, Role

Phase = Callable[..., AbstractAsyncContextManager[tuple[Worker[Any, Any], str]]]
"""Makes a phase's worker, and the KV address that its Welcome names; closes what it made when left.

Its arguments are WorkerConfig, Engine, Limits, StepRunner and, where the instance has several ranks, LeaderChannel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleParts:
    """``lead``: on rank 0; ``follow``: on any other."""

    lead: Phase
    follow: FollowerPhase


Roles = Mapping[Role, RoleParts]


def all_roles() -> Roles:
    """Every role that there is: ``<role>_phase`` and ``follower_phase`` of its package's ``serve``."""
    found: dict[Role, RoleParts] = {}
    for role in ROLES:
        module = importlib.import_module(f"biphase.{role}_worker.serve")
        found[role] = RoleParts(lead=getattr(module, f"{role}_phase"), follow=module.follower_phase)
    return found
