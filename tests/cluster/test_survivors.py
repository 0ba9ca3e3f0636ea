"""What a supervisor does with what an earlier one has left: pure decisions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from biphase.cluster.actions import AskToStop
from biphase.cluster.backend import Handle, Kind
from biphase.cluster.controller_state import AbandonedLife, ControllerState, Pin, SlotState, first_state, restore
from biphase.cluster.deployment import Deployment
from biphase.cluster.reconcile import STOP_S, Reconciler
from biphase.cluster.slot import FlipTo
from biphase.cluster.survivors import Served, plan, sort_out, with_routers_anew
from biphase.protos.process import Announcement

DEPLOYMENT = Deployment(model="/models/a", name="x", backend="ray", served_model_name="a")
UPDATED = replace(DEPLOYMENT, model="/models/b")
AT = "10.0.0.1:8701"


@dataclass
class Alive:
    name: str
    kind: Kind
    incarnation: int
    end: str | None = None


def alive(name: str, incarnation: int) -> Handle:
    kind = cast("Kind", name.partition("-")[0])
    return cast("Handle", Alive(name, kind, incarnation))


def served(deployment: Deployment = DEPLOYMENT, incarnation: int = 4) -> str:
    return Served(deployment=deployment.to_json(), controller_address=AT, controller_incarnation=incarnation).to_json()


def state(**changes: Any) -> ControllerState:
    slots: Mapping[str, SlotState] = {
        "prefill-0": SlotState(kind="prefill", incarnation=3, life=3),
        "decode-0": SlotState(kind="decode", incarnation=5, life=4),
        "router-0": SlotState(kind="router", incarnation=1, life=1),
    }
    values: dict[str, Any] = {
        "epoch": 7,
        "was_ready": True,
        "slots": slots,
        "former": {"decode-9": 2},
        "pin": Pin(text="prefill=1", prefill=1, decode=1),
        "generation": "g",
        "deployments": {"g": DEPLOYMENT.to_json()},
        "autoscaler": {"cooldown": 1},
    }
    return ControllerState(**{**values, **changes})


ALL = [alive("prefill-0", 3), alive("decode-0", 4), alive("router-0", 1)]


def test_the_same_deployment_goes_on_with_its_state_and_its_processes() -> None:
    found = plan(served(), DEPLOYMENT, state().to_json(), [*ALL, alive("controller", 6)])
    assert found.goes_on
    assert sorted(found.kept) == ["decode-0", "prefill-0", "router-0"]
    assert found.to_kill == ()
    assert found.state == state(), "pins, epoch, generations, cooldowns"
    assert (found.controller_incarnation, found.controller_address) == (7, AT)
    assert "prefill-0#3, decode-0#4" in found.reason or "router-0#1" in found.reason


def test_controllers_are_counted_on_by_what_is_kept_too() -> None:
    assert plan(served(incarnation=9), DEPLOYMENT, state().to_json(), ALL).controller_incarnation == 10


def test_former_and_unwanted_lives_are_killed_the_newest_stays() -> None:
    others = [alive("prefill-0", 2), alive("decode-7", 1), alive("decode-0", 6)]
    found = plan(served(), DEPLOYMENT, state().to_json(), [*ALL, *others])
    assert {(handle.name, handle.incarnation, why) for handle, why in found.to_kill} == {
        ("prefill-0", 2, "a former life"),
        ("decode-7", 1, "a former life"),
        ("decode-0", 4, "a newer life runs"),
    }
    assert found.kept["decode-0"].incarnation == 6


def test_a_life_whose_place_was_given_away_is_neither_kept_nor_killed() -> None:
    away = AbandonedLife(name="prefill-0", kind="prefill", life=3, incarnation=3)
    found = plan(served(), DEPLOYMENT, state(abandoned=(away,)).to_json(), ALL)
    assert "prefill-0" not in found.kept
    assert found.to_kill == ()
    assert found.state.abandoned == (away,)


def test_where_nothing_lives_the_state_goes_on_all_the_same() -> None:
    found = plan(served(), DEPLOYMENT, state().to_json(), [])
    assert (found.goes_on, found.kept, found.state) == (True, {}, state())
    assert "no process that still lives" in found.reason


@pytest.mark.parametrize(
    "wanted",
    [DEPLOYMENT, UPDATED, replace(UPDATED, served_model_name="b")],
    ids=["as first served", "as updated", "as updated, its name not said"],
)
def test_after_an_update_both_files_go_on(wanted: Deployment) -> None:
    after = state(deployments={"g": UPDATED.to_json()}).to_json()
    assert plan(served(), wanted, after, ALL).goes_on


@pytest.mark.parametrize(
    ("kept", "wanted", "after", "why"),
    [
        (served(), replace(DEPLOYMENT, max_model_len=77), state().to_json(), "another deployment was served"),
        (served(), replace(DEPLOYMENT, served_model_name="z"), state().to_json(), "another deployment was served"),
        (served(), DEPLOYMENT, None, "no state is kept"),
        (served(), DEPLOYMENT, "{", "no state is kept"),
        (None, DEPLOYMENT, state().to_json(), "nothing says what was served"),
        ("[]", DEPLOYMENT, state().to_json(), "nothing says what was served"),
        (
            '{"deployment": "?", "controller_address": "", "controller_incarnation": 1}',
            UPDATED,
            state().to_json(),
            "another deployment was served",
        ),
    ],
)
def test_otherwise_all_is_killed_and_it_begins_anew(
    kept: str | None, wanted: Deployment, after: str | None, why: str
) -> None:
    found = plan(kept, wanted, after, ALL)
    assert not found.goes_on
    assert why in found.reason
    assert [handle for handle, _ in found.to_kill] == ALL
    assert (found.state.pin, found.state.slots, found.state.was_ready) == (None, {}, False)


def test_epochs_and_incarnations_are_used_once() -> None:
    turning = SlotState(kind="prefill", incarnation=3, life=3, flip=FlipTo(kind="decode", incarnation=4))
    before = state(slots={**state().slots, "prefill-0": turning})
    found = plan(None, DEPLOYMENT, before.to_json(), [*ALL, alive("decode-0", 8)])
    assert found.state.epoch == 7
    assert found.state.former == {"decode-9": 2, "prefill-0": 4, "decode-0": 8, "router-0": 1}
    first = ControllerState.from_json(first_state([], used=found.state))
    assert (first.epoch, first.former) == (7, found.state.former)


def test_a_first_serve_says_nothing_of_the_past() -> None:
    found = plan(None, DEPLOYMENT, None, [])
    assert (found.goes_on, found.reason, found.controller_incarnation, found.state) == (False, "", 1, ControllerState())


def test_routers_that_look_elsewhere_start_again_and_nothing_else_does() -> None:
    endings = {name: (slot.ending, slot.grace_s) for name, slot in with_routers_anew(state(), 45.0).slots.items()}
    assert endings == {"prefill-0": ("", 0.0), "decode-0": ("", 0.0), "router-0": ("again", 45.0)}


def test_a_router_that_starts_again_has_its_drain_and_the_time_to_stop() -> None:
    core = Reconciler((), 100.0)
    restore(core, ControllerState.from_json(with_routers_anew(state(), 45.0).to_json()))
    core.adopt("router-0", 1, 0.0)
    word = Announcement(name="router-0", kind="router", incarnation=1, pid=1, state="ready", address="a:1")
    core.announced(word, 0.0)
    assert AskToStop(name="router-0", incarnation=1) in core.decide(1.0)
    core.announced(replace(word, state="draining"), 1.1)
    assert core.next_due_s() == 1.0 + 45.0 + STOP_S
    core.decide(45.9 + STOP_S)
    assert not core.slots["router-0"].killed
    core.decide(46.0 + STOP_S)
    assert core.slots["router-0"].killed
    assert core.slots["router-0"].reason == f"did not end within {45.0 + STOP_S:g} s of being asked"


def test_sort_out_leaves_controllers_alone() -> None:
    assert sort_out({}, [alive("controller", 1)]) == ({}, [])


def test_the_state_is_read_back_with_its_abandoned_lives() -> None:
    away = AbandonedLife(name="p", kind="prefill", life=1, incarnation=2, address="a:1", node="n", since_s=3.0)
    assert ControllerState.from_json(state(abandoned=(away,)).to_json()) == state(abandoned=(away,))
