"""What leaves ahead: only what is computed, every element once, and a group of layers as soon as it is worth a frame."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kvtransfer import due
from biphase.kvtransfer.due import Due
from biphase.kvtransfer.exports import Readable

LAYOUT = KvLayout(num_layers=8, num_kv_heads=2, head_dim=64, block_size=16)


def box(layers: tuple[int, int], tokens: tuple[int, int]) -> KvBox:
    return KvBox(
        layer_start=layers[0], layer_end=layers[1], head_start=0, head_end=2, token_start=tokens[0], token_end=tokens[1]
    )


def elements(part: KvBox) -> list[tuple[int, int]]:
    layers, tokens = range(part.layer_start, part.layer_end), range(part.token_start, part.token_end)
    return [(layer, token) for layer in layers for token in tokens]


CHUNKS = st.lists(st.tuples(st.integers(1, 25), st.sets(st.integers(1, 4))), max_size=5)
"""Tokens of each chunk, and after how many of its layers the sender looks."""


@given(
    CHUNKS,
    st.integers(1, 60),
    st.integers(0, 4),
    st.sampled_from([(0, 4), (0, 2), (1, 3)]),
    st.sampled_from([1, 20_000]),
)
@settings(max_examples=300, deadline=None)
def test_every_element_leaves_once_and_none_before_it_is_computed(
    chunks: list[tuple[int, set[int]]], num_tokens: int, first_layer: int, layers: tuple[int, int], least_bytes: int
) -> None:
    wanted = box((first_layer + layers[0], first_layer + layers[1]), (0, num_tokens))
    way, left, computed = Due(wanted, first_layer, LAYOUT), list[tuple[int, int]](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(due, "LEAST_AHEAD_BYTES", least_bytes)
        for size, looks in [*chunks, (num_tokens, {4})]:
            end = min(num_tokens, computed + size)
            for done in sorted(looks):
                all_done = done == 4
                now = Readable(
                    tokens=end if all_done else computed, ahead_tokens=end, ahead_layers=0 if all_done else done
                )
                while (part := way.take(now)) is not None:
                    assert part.num_layers > 0 and part.num_tokens > 0
                    assert all(
                        token < now.tokens or (token < end and layer < first_layer + done)
                        for layer, token in elements(part)
                    )
                    left += elements(part)
            computed = end
    assert way.done and sorted(left) == sorted(elements(wanted))


def test_groups_of_layers_leave_while_the_others_are_computed() -> None:
    way = Due(box((0, 8), (0, 512)), 0, LAYOUT)
    chunk = [way.take(Readable(tokens=0, ahead_tokens=256, ahead_layers=layers)) for layers in (2, 4, 6, 8)]
    assert chunk == [box((layer, layer + 2), (0, 256)) for layer in (0, 2, 4, 6)]
    assert way.take(Readable(tokens=256, ahead_tokens=256, ahead_layers=0)) is None
    assert way.take(Readable(tokens=512, ahead_tokens=512, ahead_layers=0)) == box((0, 8), (256, 512))
    assert way.done


def test_a_later_stage_counts_its_own_layers() -> None:
    way = Due(box((4, 8), (0, 512)), 4, LAYOUT)
    assert way.take(Readable(tokens=0, ahead_tokens=512, ahead_layers=2)) == box((4, 6), (0, 512))
    assert way.take(Readable(tokens=0, ahead_tokens=512, ahead_layers=4)) == box((6, 8), (0, 512))


def test_a_group_too_small_for_a_frame_waits_for_its_chunk() -> None:
    way = Due(box((0, 8), (0, 16)), 0, LAYOUT)
    assert way.take(Readable(tokens=0, ahead_tokens=16, ahead_layers=4)) is None
    assert way.take(Readable(tokens=16, ahead_tokens=16, ahead_layers=0)) == box((0, 8), (0, 16))
