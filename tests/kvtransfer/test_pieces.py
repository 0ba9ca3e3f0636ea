"""Cutting and counting pieces: every element exactly once."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kvtransfer import pieces as pieces_module
from biphase.kvtransfer.frames import (
    HEADER_BYTES,
    FrameError,
    FrameKind,
    Header,
    Trailer,
    beat,
    check_digest,
    parse_header,
    read_trailer,
    seal,
    trailer,
)
from biphase.kvtransfer.handoff import AllArrived, CancelAsked, Connected, Handoff, LocalHandoffError, State
from biphase.kvtransfer.pieces import Coverage, contains, split
from biphase.protos.ids import TicketId

TICKET = TicketId(bytes(range(16)))


@st.composite
def boxes(draw: st.DrawFn, layers: int = 5, heads: int = 4, tokens: int = 40) -> KvBox:
    spans = [
        sorted(draw(st.lists(st.integers(0, top), min_size=2, max_size=2, unique=True))) for top in (layers, heads)
    ]
    token_start = draw(st.integers(0, tokens - 1))
    return KvBox(
        layer_start=spans[0][0],
        layer_end=spans[0][1],
        head_start=spans[1][0],
        head_end=spans[1][1],
        token_start=token_start,
        token_end=draw(st.integers(token_start + 1, tokens)),
    )


def elements(box: KvBox) -> set[tuple[int, int, int]]:
    return {
        (layer, head, token)
        for layer in range(box.layer_start, box.layer_end)
        for head in range(box.head_start, box.head_end)
        for token in range(box.token_start, box.token_end)
    }


@given(boxes(), st.sampled_from([1, 4, 16]), st.integers(1, 40_000), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_make_up_the_box_within_the_size(box: KvBox, block_size: int, max_bytes: int, by_block: bool) -> None:
    layout = KvLayout(num_layers=5, num_kv_heads=4, head_dim=16, block_size=block_size)
    pieces = list(split(layout, box, max_bytes, by_block=by_block))
    if by_block:
        assert all(piece.token_start // block_size == (piece.token_end - 1) // block_size for piece in pieces)
    counted = [element for piece in pieces for element in elements(piece)]
    assert len(counted) == len(set(counted)) and set(counted) == elements(box)
    least = 2 * layout.head_dim * layout.itemsize
    assert all(piece.num_bytes(layout) <= max(max_bytes, least) for piece in pieces)
    coverage = Coverage(box)
    assert all(coverage.add(piece) for piece in pieces)
    assert coverage.complete and coverage.missing() == []


def test_tokens_are_cut_at_block_boundaries_and_layers_grouped() -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_size=16)
    whole = KvBox(layer_start=0, layer_end=3, head_start=0, head_end=2, token_start=5, token_end=100)
    cuts = [(piece.token_start, piece.token_end) for piece in split(layout, whole, 96 * 1024) if piece.layer_start == 0]
    assert cuts == [(5, 32), (32, 64), (64, 96), (96, 100)]
    assert [piece.num_layers for piece in split(layout, replace(whole, token_start=96), 9 * 1024)] == [2, 1]


def test_pieces_of_a_long_prompt_fill_messages_with_few_blocks_and_many_layers() -> None:
    layout = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32)
    whole = KvBox(layer_start=0, layer_end=30, head_start=0, head_end=3, token_start=0, token_end=5568)
    pieces = list(split(layout, whole, 1 << 20))
    assert {(piece.num_tokens // 32, piece.num_layers) for piece in pieces} == {(2, 10)}
    assert {piece.num_bytes(layout) for piece in pieces} == {983_040}


def test_what_is_missing_of_a_long_prompt_is_found_by_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for in the worker's loop, after one bad piece among thousands."""
    layout = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16)
    arriving = list(split(layout, layout.box(8192), 1 << 20))
    coverage, bad = Coverage(layout.box(8192)), arriving.pop(len(arriving) // 2)
    assert all(coverage.add(piece) for piece in arriving)
    asked = 0

    def counting(outer: KvBox, inner: KvBox) -> bool:
        nonlocal asked
        asked += 1
        return contains(outer, inner)

    monkeypatch.setattr(pieces_module, "contains", counting)
    assert coverage.missing() == [bad]
    assert len(arriving) > 1000 and asked < 20 * len(arriving)


@given(boxes(), st.lists(boxes(), max_size=8))
@settings(max_examples=300, deadline=None)
def test_coverage_takes_each_element_once_and_knows_what_is_missing(whole: KvBox, offered: list[KvBox]) -> None:
    coverage, arrived = Coverage(whole), set[tuple[int, int, int]]()
    for box in offered:
        fits = contains(whole, box) and not elements(box) & arrived
        assert coverage.add(box) == fits
        if fits:
            arrived |= elements(box)
    missing = [element for box in coverage.missing() for element in elements(box)]
    assert len(missing) == len(set(missing)) and set(missing) == elements(whole) - arrived
    assert coverage.complete == (not missing)


def received(data: bytes, ticket: TicketId = TICKET) -> tuple[Header, bytes]:
    """Header and payload of a frame whose digest is right. Raises FrameError."""
    payload = data[HEADER_BYTES:]
    header = parse_header(data[:HEADER_BYTES], len(payload))
    check_digest(header, ticket, (payload,))
    return header, payload


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    try:
        received(data)
    except FrameError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=64), st.data())
def test_every_bit_of_a_frame_counts(payload: bytes, data: st.DataObject) -> None:
    box = KvBox(layer_start=0, layer_end=1, head_start=2, head_end=3, token_start=4, token_end=5)
    parts = (payload[:7], payload[7:])
    header = seal(
        TICKET, FrameKind.PIECE, epoch=3, box=box, payload_bytes=len(payload), computed_tokens=5, contents=parts
    )
    sealed = header + payload
    good, content = received(sealed)
    assert (good.box, good.epoch, content) == (box, 3, payload)
    with pytest.raises(FrameError, match="digest of a piece"):
        received(sealed, TicketId(b"another ticket!!"))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        received(bytes(flipped))


def test_trailer_and_beat_survive_the_wire() -> None:
    value = Trailer(first_token=49151, total_bytes=1 << 40, num_pieces=9, age_ms=1.5)
    assert read_trailer(received(b"".join(trailer(TICKET, 1, value, 10)))[1]) == value
    assert received(beat(TICKET, 1, 10))[0].computed_tokens == 10


def test_the_table_forbids_what_a_state_does_not_know() -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    whole = KvBox(layer_start=0, layer_end=1, head_start=0, head_end=1, token_start=0, token_end=4)
    handoff = Handoff(layout=layout, epoch=1, boxes=[whole])
    with pytest.raises(LocalHandoffError, match="AllArrived cannot happen in state connecting"):
        handoff.on(AllArrived())
    assert handoff.on(Connected()) is State.PULLING
    assert handoff.streams_ended() is State.REPAIRING
    assert handoff.missing(whole) == [whole]
    assert handoff.streams_ended() is State.FAILED
    with pytest.raises(LocalHandoffError):
        handoff.on(CancelAsked())
