"""Whether an update's new instances find room in their turn: rooms and hosts in, the first that finds none out. No Ray."""

from typing import Any

from biphase.cluster.gpus import WHOLE
from biphase.cluster.ray_room import Room
from biphase.cluster.ray_turns import NoRoom, Turn, first_without_room, held_of


def cpus(number: float) -> Room:
    return Room(0, int(number * WHOLE))


def turn(name: str, number: float, **turn: Any) -> Turn:
    return Turn(name=name, stages=[cpus(number)], emptied=[name], **turn)


HELD = {"prefill-0": [("a", cpus(1))], "decode-0": [("b", cpus(1))]}


def test_each_takes_the_room_of_its_own_former_life() -> None:
    full = {"a": cpus(0), "b": cpus(0)}
    turns = [turn("prefill-0", 1), turn("decode-0", 1)]
    assert first_without_room(turns, full, HELD) is None
    at_once = [Turn(name="all", stages=[cpus(1), cpus(1)])]
    assert first_without_room(at_once, full, HELD) == NoRoom(turn=at_once[0], free=[cpus(0), cpus(0)])


def test_a_larger_one_needs_what_is_free_beside_it() -> None:
    turns = [turn("prefill-0", 2), turn("decode-0", 2)]
    assert first_without_room(turns, {"a": cpus(1), "b": cpus(1)}, HELD) is None
    # one host: the first takes what was free, and the second finds its own alone
    held = {"prefill-0": [("a", cpus(1))], "decode-0": [("a", cpus(1))]}
    assert first_without_room(turns, {"a": cpus(1)}, held) == NoRoom(turn=turns[1], free=[cpus(1)])
    smaller = [turn("prefill-0", 0.5), turn("decode-0", 2)]
    assert first_without_room(smaller, {"a": cpus(0.5)}, held) is None, "what the first leaves is the second's"


def test_a_host_without_the_new_weights_is_no_choice() -> None:
    turns = [turn("prefill-0", 1, shunned={"a"}), turn("decode-0", 1, shunned={"a"})]
    assert first_without_room(turns, {"a": cpus(0), "b": cpus(1)}, HELD) is None
    assert first_without_room(turns, {"a": cpus(8), "b": cpus(0)}, HELD) == NoRoom(turn=turns[0], free=[cpus(0)])
    nowhere = [Turn(name="decode-0", stages=[], shunned={"a", "b"})]
    assert first_without_room(nowhere, {"a": cpus(8), "b": cpus(8)}, HELD) == NoRoom(turn=nowhere[0], free=[])


def test_one_that_starts_last_has_the_room_of_those_that_stop() -> None:
    turns = [turn("prefill-0", 1), turn("decode-0", 1), Turn(name="decode-1", stages=[cpus(1)], emptied=["prefill-0"])]
    assert first_without_room(turns, {"a": cpus(0), "b": cpus(0)}, HELD) is None
    assert first_without_room([turns[2]] * 2, {"a": cpus(0), "b": cpus(0)}, HELD) is not None, "given back once"


def test_what_is_held_is_read_from_the_newest_life_that_has_its_place() -> None:
    def group(name: str, state: str, node: str, number: float) -> dict[str, Any]:
        return {
            "name": name,
            "state": state,
            "bundles": {0: {"CPU": number}, 1: {"CPU": 1.0}},
            "bundles_to_node_id": {0: node, 1: "z"},
        }

    table = [
        group("biphase-x/decode-0#10", "CREATED", "b", 2.0),
        group("biphase-x/decode-0#9", "CREATED", "a", 4.0),
        group("biphase-x/prefill-0#1", "PENDING", "", 1.0),
        group("biphase-x/prefill-1#3", "REMOVED", "a", 1.0),
        group("biphase-x/node-for-decode", "CREATED", "a", 1.0),
        group("biphase-y/decode-0#11", "CREATED", "a", 1.0),
    ]
    assert held_of(table, "biphase-x") == {"decode-0": [("b", cpus(2)), ("z", cpus(1))]}
