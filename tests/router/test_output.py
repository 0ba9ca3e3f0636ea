"""From tokens to text: what counts, what is text, what ends it."""

from collections.abc import Sequence

from biphase.protos.values import FinishReason
from biphase.router.output import Output, Piece


class Utf8:
    """One byte per token; holds back an unfinished character."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, token_ids: Sequence[int]) -> str:
        self._bytes += bytes(token_ids)
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def flush(self) -> str:
        text = self._bytes.decode(errors="replace")
        self._bytes = b""
        return text


def piece(first_index: int, ids: bytes, text: str, finish: FinishReason | None = None, stop_reason: str = "") -> Piece:
    return Piece(first_index=first_index, token_ids=tuple(ids), text=text, finish=finish, stop_reason=stop_reason)


def test_tokens_run_ahead_of_text_that_is_held_back() -> None:
    output = Output(Utf8(), ["END"])
    first, second = "é".encode()
    assert output.push(0, [first], None) == piece(0, bytes([first]), "")
    assert output.push(1, [second], None) == piece(1, bytes([second]), "é")
    assert output.push(2, b"E", None) == piece(2, b"E", "")
    assert output.push(3, b"x", None) == piece(3, b"x", "Ex")


def test_a_stop_string_cuts_text_and_usage_at_the_token_that_completes_it() -> None:
    output = Output(Utf8(), ["END"])
    assert output.push(0, b"okENDmore", None) == piece(0, b"okEND", "ok", FinishReason.STOP, "END")
    assert output.num_tokens == 5


def test_an_ending_token_counts_but_makes_no_text() -> None:
    output = Output(Utf8(), [])
    assert output.push(0, b"hi!", FinishReason.STOP) == piece(0, b"hi!", "hi", FinishReason.STOP, f"token:{ord('!')}")
    assert output.num_tokens == 3


def test_at_the_length_limit_held_back_text_is_output() -> None:
    output = Output(Utf8(), ["END"])
    assert output.push(0, b"okEN", FinishReason.LENGTH) == piece(0, b"okEN", "okEN", FinishReason.LENGTH)


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    output = Output(Utf8(), [])
    assert output.push(0, b"a\xc3", FinishReason.LENGTH) == piece(0, b"a\xc3", "a\ufffd", FinishReason.LENGTH)


def test_a_stop_string_completed_by_the_last_token_is_a_stop() -> None:
    output = Output(Utf8(), ["END"])
    assert output.push(0, b"aEND", FinishReason.LENGTH) == piece(0, b"aEND", "a", FinishReason.STOP, "END")


def test_before_min_tokens_nothing_stops() -> None:
    output = Output(Utf8(), ["x"], min_tokens=3)
    assert output.push(0, b"xx", None) == piece(0, b"xx", "xx")
    assert output.push(2, b"x", None) == piece(2, b"x", "", FinishReason.STOP, "x")
