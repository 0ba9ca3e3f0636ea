"""The codec of a transfer follows from what the wire and the codecs were seen to do, and from the quality budget."""

import numpy as np
import pytest

from biphase.kernels.kv_layout import KvLayout, uniform_scales
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.codec_choice import TOKENS_CHANGED, CodecChooser, CodecTimes
from biphase.kvtransfer.codec_times import measure, speakable

PAIR = ("prefill-0", 0)
RAW_BYTES = 64 << 20
WIRE = {"raw": RAW_BYTES, "fp8": RAW_BYTES // 4, "int8": RAW_BYTES // 4, "int4": RAW_BYTES // 7}
TIMES = {
    "raw": CodecTimes(pack=1 / 15e9, unpack=1 / 15e9),
    "fp8": CodecTimes(pack=1 / 1.2e9, unpack=1 / 0.7e9),
    "int8": CodecTimes(pack=1 / 0.9e9, unpack=1 / 4e9),
    "int4": CodecTimes(pack=1 / 0.6e9, unpack=1 / 1.2e9),
}


def chooser(bandwidth: float = 0.0, **options: object) -> CodecChooser:
    made = CodecChooser(**{"wanted": "auto", "times": dict(TIMES), "budget": 1.0, **options})  # type: ignore[arg-type]
    if bandwidth:
        made.observe(PAIR, "raw", raw_bytes=RAW_BYTES, wire_bytes=RAW_BYTES, seconds=RAW_BYTES / bandwidth)
    return made


@pytest.mark.parametrize(
    ("bandwidth", "codec"),
    [(5e9, "raw"), (1.0e9, "raw"), (0.5e9, "int8"), (0.25e9, "int8"), (0.04e9, "int4"), (1e6, "int4")],
)
def test_slow_wires_take_small_codecs(bandwidth: float, codec: str) -> None:
    choice = chooser(bandwidth).choose(PAIR, WIRE)
    assert choice.codec == codec
    assert choice.predicted_s is not None
    assert choice.predicted_s <= 1.2 * RAW_BYTES / bandwidth
    assert "\n" not in choice.reason and "GB/s" in choice.reason


def test_the_words_say_why() -> None:
    assert chooser().choose(PAIR, WIRE).reason == "nothing is known of this pair yet"
    assert chooser(5e9).choose(PAIR, WIRE).reason == "at 5 GB/s no codec saves 10% of 13.6 ms"
    reason = chooser(0.5e9, budget=0.5).choose(PAIR, WIRE).reason
    assert reason.startswith("77.7 ms predicted against 134 ms raw at 0.5 GB/s; changes ")
    assert reason.endswith(" of tokens, the budget is 50.00%")


def test_the_budget_rules_codecs_out() -> None:
    slow = chooser(1e6, budget=TOKENS_CHANGED["int8"])
    assert slow.choose(PAIR, WIRE).codec == "int8"
    choice = chooser(1e6, budget=0.0).choose(PAIR, WIRE)
    assert (choice.codec, choice.reason) == ("raw", "no other codec keeps the budget of 0.00% of tokens changed")


def test_codecs_that_are_not_measured_or_not_spoken_are_left() -> None:
    only_raw = chooser(1e6, times={})
    assert only_raw.choose(PAIR, WIRE).codec == "raw"
    assert chooser(1e6).choose(PAIR, {"raw": RAW_BYTES, "fp8": WIRE["fp8"]}).codec == "fp8"


def test_a_fixed_codec_is_taken_where_the_other_end_speaks_it() -> None:
    assert CodecChooser(wanted="int4").choose(PAIR, WIRE).codec == "int4"
    choice = CodecChooser(wanted="int4").choose(PAIR, {"raw": RAW_BYTES})
    assert (choice.codec, choice.reason) == ("raw", "the other end does not speak int4")
    assert CodecChooser().choose(PAIR, WIRE).codec == "raw"


def test_pairs_are_apart_and_can_be_forgotten() -> None:
    made = chooser(1e6)
    assert made.choose(("prefill-1", 0), WIRE).codec == "raw"
    assert made.bandwidth(PAIR) == pytest.approx(1e6)
    made.forget(PAIR)
    assert made.bandwidth(PAIR) == 0.0
    assert made.choose(PAIR, WIRE).codec == "raw"


def simulate(made: CodecChooser, bandwidth: float, transfers: int) -> list[str]:
    """Transfers over a wire of that bandwidth, each as long as its slowest part."""
    codecs = []
    for _ in range(transfers):
        codec = made.choose(PAIR, WIRE).codec
        times = made.times[codec]
        seconds = max(RAW_BYTES * times.pack, WIRE[codec] / bandwidth, RAW_BYTES * times.unpack)
        made.observe(PAIR, codec, raw_bytes=RAW_BYTES, wire_bytes=WIRE[codec], seconds=seconds)
        codecs.append(codec)
    return codecs


def test_it_follows_a_wire_that_becomes_slow_and_fast_again() -> None:
    made = chooser()
    assert set(simulate(made, 5e9, 10)) == {"raw"}
    assert simulate(made, 0.05e9, 20)[-1] == "int4"
    found = simulate(made, 5e9, 200)
    assert found[0] == "int4"
    assert found[-30:] == ["raw"] * 30  # a codec's own speed hides the wire's; only raw transfers show it


def test_a_steady_slow_wire_is_asked_again_only_now_and_then() -> None:
    found = simulate(chooser(), 0.05e9, 200)
    assert 4 <= found.count("raw") <= 10


def test_small_transfers_say_nothing_of_the_bandwidth() -> None:
    made = chooser(5e9)
    made.observe(PAIR, "raw", raw_bytes=1000, wire_bytes=1000, seconds=0.1)
    assert made.bandwidth(PAIR) == pytest.approx(5e9)


def test_times_are_measured_on_the_pool() -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16)
    times = measure(CpuKvMemory(np.zeros(layout.pool_shape(4), np.float32), layout))
    assert list(times) == list(speakable("float32")) == ["raw", "fp8", "int8", "int4"]
    assert all(each.pack > 0 and each.unpack > 0 for each in times.values())


def test_an_fp8_pool_speaks_raw_only() -> None:
    layout = KvLayout(
        num_layers=1, num_kv_heads=1, head_dim=16, block_size=16, dtype="float8_e4m3fn", kv_scales=uniform_scales(1, 1)
    )
    assert list(measure(CpuKvMemory(np.zeros(layout.pool_shape(1), np.uint8), layout))) == ["raw"]
