"""How far a Ray cluster may grow: its autoscaler's own configuration, read on the head, as values.

`ray up` leaves the configuration on the head and hands it to the autoscaler's monitor, whose command line names it.
Hosts of provider ``local`` do not say there what they have. Where the autoscaler is elsewhere (KubeRay runs it in a container
of its own) variables say how many workers there may be, and how many come by themselves.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from biphase.cluster.ray_room import Room, fits, room_of
from biphase.protos.errors import SetupError

WORKERS_VARIABLE = "BIPHASE_MAX_WORKERS"
"""Set on the head where an autoscaler's configuration cannot be read there: the most worker hosts that it may bring."""
LEAST_VARIABLE = "BIPHASE_MIN_WORKERS"
"""Set beside it: the worker hosts that come by themselves, which first instances wait for. Unset: none."""
MAX_WORKERS = 10_000
_FLAG = "--autoscaling-config="
UNKNOWN = Room(2**62, 2**62)
"""Of a host that has not joined yet and does not say what it will have: never the reason for a refusal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """One kind of worker host: what each has (None: it is not said), and how many there are at least and at most."""

    room: Room | None
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Worker hosts that an autoscaler keeps and may add."""

    most_workers: int
    types: tuple[NodeType, ...]

    @property
    def least_workers(self) -> int:
        """Those that come by themselves."""
        return min(self.most_workers, sum(kind.least for kind in self.types))

    def rooms(self) -> list[Room]:
        """Of all workers that there can be, the largest where not all kinds can be there at once."""
        rooms = [kind.room or UNKNOWN for kind in self.types for _ in range(min(kind.most, self.most_workers))]
        return sorted(rooms, reverse=True)[: self.most_workers]

    def takes(self, asked: Sequence[Room], head: Sequence[Room]) -> bool:
        """Whether what is asked for fits the whole cluster, the head and all workers that may come."""
        return fits(asked, [*head, *self.rooms()])

    def num_gpus(self, there: int) -> int:
        """GPUs of the cluster at its largest, at least those that are there; what is not said counts as none."""
        rooms = [kind.room for kind in self.types for _ in range(kind.most) if kind.room is not None]
        gpus = sorted((room.gpus // room_of({"GPU": 1}).gpus for room in rooms), reverse=True)
        return max(there, sum(gpus[: self.most_workers]))


def growth_of(config: Mapping[str, Any]) -> Growth:
    """From a cluster file as Ray has completed it. Raises KeyError, TypeError or ValueError for anything else."""
    head = config.get("head_node_type")
    kinds = {name: kind for name, kind in config["available_node_types"].items()}
    local = config.get("provider", {}).get("type") == "local"
    most = int(config.get("max_workers", 0))
    if local:
        hosts = config["provider"].get("worker_ips") or []
        most = min(most, len(hosts)) if hosts else most
    types = []
    for name, kind in kinds.items():
        if name == head and not local:
            continue
        resources = kind.get("resources") or {}
        types.append(
            NodeType(
                room=room_of(resources) if resources else None,
                least=int(kind.get("min_workers") or config.get("min_workers") or 0),
                most=int(kind.get("max_workers", most)),
            )
        )
    return Growth(most_workers=most, types=tuple(types))


def config_named_by(command_lines: Iterable[str], gcs_address: str) -> Path | None:
    """The configuration of the monitor of the cluster at ``gcs_address``; the words of a command line end with NUL."""
    for line in command_lines:
        words = line.split("\0")
        if not any(word.endswith(("monitor.py", "autoscaler/v2/monitor.py")) for word in words):
            continue
        said = [word.removeprefix(_FLAG) for word in words if word.startswith(_FLAG)]
        ours = any(word.endswith(f"={gcs_address}") for word in words)
        if said and ours:
            return Path(said[0]).expanduser()
    return None


def find_growth(gcs_address: str) -> Growth | None:
    """Of the cluster whose head this host is; None where it has no autoscaler, or another host is the head.

    Raises SetupError for a bad value of the variables, also where a configuration is found.
    """
    said = growth_said(os.environ.get(WORKERS_VARIABLE, ""), os.environ.get(LEAST_VARIABLE, ""))
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace"))
        except OSError:
            continue
    found = config_named_by(lines, gcs_address)
    if found is None:
        return said
    try:
        return growth_of(yaml.safe_load(found.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return said


def growth_said(text: str, least: str = "") -> Growth | None:
    """By at most and at least so many workers, of which nothing else is known; None for empty texts. Raises SetupError."""
    if not text and not least:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_WORKERS:
        beside = f" beside {LEAST_VARIABLE}" if least and not text else ""
        raise SetupError(f"{WORKERS_VARIABLE} is {text!r}{beside}: a number of worker hosts, 1 to {MAX_WORKERS}")
    most = int(text)
    if least and (not re.fullmatch(r"[0-9]{1,9}", least) or int(least) > most):
        raise SetupError(f"{LEAST_VARIABLE} is {least!r}: a number of worker hosts, 0 to {WORKERS_VARIABLE}, {most}")
    return Growth(most_workers=most, types=(NodeType(room=None, least=int(least or 0), most=most),))
