"""What a controller's next life must know: kept outside it, by the backend. Values and JSON only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from biphase.cluster.backend import ProcessSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """The newest life of a process, and how often it was started again."""

    incarnation: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """``epoch`` counts the controller's lives; ``was_ready``: the deployment was up as a whole at least once."""

    epoch: int = 0
    was_ready: bool = False
    slots: Mapping[str, SlotState] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "ControllerState":
        values = json.loads(text)
        slots = {name: SlotState(**slot) for name, slot in values.pop("slots").items()}
        return ControllerState(**values, slots=slots)


def first_state(specs: Sequence[ProcessSpec]) -> str:
    """The state before the first controller: the supervisor has started these."""
    slots = {spec.name: SlotState(incarnation=spec.incarnation, restarts=0) for spec in specs}
    return ControllerState(slots=slots).to_json()
