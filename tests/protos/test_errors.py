"""The exception tree, the drawing of it, and the table back from status codes."""

import re

import grpc
import pytest

from biphase.protos import errors
from biphase.protos.errors import ERROR_OF_STATUS, BiphaseError, HandoffFailed, Internal, error_of_status, one_line


def tree(root: type[BiphaseError]) -> list[type[BiphaseError]]:
    return [root] + [below for child in root.__subclasses__() for below in tree(child)]


ALL = [error for error in tree(BiphaseError) if error.__module__ == errors.__name__]


def test_the_drawing_names_every_error_with_its_code() -> None:
    assert errors.__doc__ is not None
    drawn = dict(re.findall(r"[├└]── (\w+) +(\w+|\(no RPC\))", errors.__doc__))
    held = {error.__name__: error.code.name for error in ALL if error is not BiphaseError}
    held["SetupError"] = "(no RPC)"
    assert drawn == held


def test_the_drawing_has_the_depths_of_the_tree() -> None:
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        found = re.match(r"    (│   )?[├└]── (\w+)", line)
        if found:
            error = getattr(errors, found.group(2))
            assert len(error.__mro__) - len(BiphaseError.__mro__) == (2 if found.group(1) else 1)


@pytest.mark.parametrize(
    "error", [error for error in ALL if error is not errors.SetupError], ids=lambda error: error.__name__
)
def test_a_status_comes_back_as_the_error_or_a_more_general_one(error: type[BiphaseError]) -> None:
    back = error_of_status(error.code, "the value is 9, the limit 8")
    assert str(back) == "the value is 9, the limit 8"
    assert back.code is error.code
    assert back.retryable == error.retryable


def test_a_status_that_is_never_sent_is_internal_and_named() -> None:
    error = error_of_status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert type(error) is Internal
    assert str(error) == "UNIMPLEMENTED: Method not found!"
    assert grpc.StatusCode.OK not in ERROR_OF_STATUS


def test_only_what_may_pass_is_worth_another_try() -> None:
    assert {error.__name__ for error in ALL if error.retryable} == {
        "Aborted",
        "Overloaded",
        "Unavailable",
        "HandoffFailed",
        "EngineLost",
    }


def test_one_line() -> None:
    assert one_line(HandoffFailed("a\n  b\tc")) == "a b c"
    assert one_line(HandoffFailed()) == "HandoffFailed"
