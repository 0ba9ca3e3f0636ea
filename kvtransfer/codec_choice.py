"""Which codec a transfer is packed by: a latency model per pair of ranks, and a quality budget. Pure.

Packing, the wire and unpacking work side by side on a transfer's pieces, so its time is that of the slowest of them, and
of one piece for the others:

    predicted = slowest + (pack + wire + unpack - slowest) / pieces

with pack and unpack in measured seconds per raw byte, and the wire's bandwidth as this pair's transfers have shown it.
raw is taken while nothing is known of a pair, where no other codec is clearly faster, and once in a while to see what the
wire can do: a transfer whose codec was slower than the wire only shows a lower bound.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

RAW = "raw"
AUTO = "auto"

TOKENS_CHANGED = {"raw": 0.0, "fp8": 0.012, "int8": 0.011, "int4": 0.08}
"""Share of greedy tokens that a codec changed, each step given the tokens of raw: bench/codec_quality.py on SmolLM2."""

QUALITY_BUDGET = 0.015
"""Largest such share that ``auto`` takes unless told."""

_LEAST_GAIN = 0.1
_LEAST_BYTES = 64 * 1024
"""Smaller transfers show the latency of a wire, not its bandwidth."""

_CLEARLY = 1.25
_WEIGHT = 0.3  # of the newest transfer in the bandwidth
_PROBE_EVERY = 32
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecTimes:
    """Seconds per byte of raw KV."""

    pack: float
    unpack: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecChoice:
    """``reason``: one line. ``predicted_s`` is None where nothing could be predicted."""

    codec: str
    reason: str
    predicted_s: float | None = None


@dataclass(slots=True)
class _Pair:
    """What transfers between two ranks have shown. ``bandwidth``: bytes of wire per second, 0: unknown."""

    bandwidth: float = 0.0
    since_raw: int = 0


@dataclass
class CodecChooser:
    """``wanted``: a codec's name, or ``auto``. ``times``: of the codecs that this instance has measured.

    Owned by the puller of an instance; one task at a time.
    """

    wanted: str = RAW
    budget: float = QUALITY_BUDGET
    times: dict[str, CodecTimes] = field(default_factory=dict)
    _pairs: dict[Hashable, _Pair] = field(default_factory=dict)

    def choose(self, pair: Hashable, wire_bytes: Mapping[str, int]) -> CodecChoice:
        """For a transfer of ``pair`` (any key of both ends). ``wire_bytes``: by codec that both ends speak, raw among
        them, what would travel."""
        if self.wanted != AUTO:
            if self.wanted in wire_bytes:
                return CodecChoice(codec=self.wanted, reason="as configured")
            return CodecChoice(codec=RAW, reason=f"the other end does not speak {self.wanted}")
        known = self._pairs.get(pair)
        if known is None or not known.bandwidth:
            return CodecChoice(codec=RAW, reason="nothing is known of this pair yet")
        raw_bytes = wire_bytes[RAW]
        allowed = [
            codec
            for codec in wire_bytes
            if codec == RAW or (codec in self.times and TOKENS_CHANGED.get(codec, 1.0) <= self.budget)
        ]
        predicted = {codec: self._predict(codec, raw_bytes, wire_bytes[codec], known.bandwidth) for codec in allowed}
        best = min(allowed, key=lambda codec: (predicted[codec], codec != RAW))
        rate = f"{known.bandwidth / 1e9:.3g} GB/s"
        raw_ms = predicted[RAW] * 1e3
        if len(allowed) == 1:
            reason = f"no other codec keeps the budget of {self.budget:.2%} of tokens changed"
        elif predicted[best] > predicted[RAW] * (1 - _LEAST_GAIN):
            reason = f"at {rate} no codec saves {_LEAST_GAIN:.0%} of {raw_ms:.3g} ms"
        elif known.since_raw >= _PROBE_EVERY:
            reason = f"the last {known.since_raw} transfers were packed: to see what the wire can do"
        else:
            reason = (
                f"{predicted[best] * 1e3:.3g} ms predicted against {raw_ms:.3g} ms raw at {rate}; changes "
                f"{TOKENS_CHANGED[best]:.2%} of tokens, the budget is {self.budget:.2%}"
            )
            return CodecChoice(codec=best, reason=reason, predicted_s=predicted[best])
        return CodecChoice(codec=RAW, reason=reason, predicted_s=predicted[RAW])

    def observe(self, pair: Hashable, codec: str, *, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """So much of a transfer came when its KV was wholly computed, and took so long to its last piece written."""
        known = self._pairs.setdefault(pair, _Pair())
        known.since_raw = 0 if codec == RAW else known.since_raw + 1
        if wire_bytes < _LEAST_BYTES or seconds <= 0.0:
            return
        shown = wire_bytes / seconds
        if not known.bandwidth:
            known.bandwidth = shown
        elif shown > known.bandwidth or self._wire_bound(codec, raw_bytes, seconds):
            known.bandwidth += _WEIGHT * (shown - known.bandwidth)

    def forget(self, pair: Hashable) -> None:
        """Another life of the source, perhaps elsewhere and by another transport: what was known says nothing about it."""
        self._pairs.pop(pair, None)

    def bandwidth(self, pair: Hashable) -> float:
        """Bytes per second; 0 where unknown."""
        return self._pairs[pair].bandwidth if pair in self._pairs else 0.0

    def _predict(self, codec: str, raw_bytes: int, wire_bytes: int, bandwidth: float) -> float:
        times = self.times.get(codec, CodecTimes(pack=0.0, unpack=0.0))
        parts = (raw_bytes * times.pack, wire_bytes / bandwidth, raw_bytes * times.unpack)
        return max(parts) + (sum(parts) - max(parts)) / max(1, wire_bytes // _PIECE_BYTES)

    def _wire_bound(self, codec: str, raw_bytes: int, seconds: float) -> bool:
        """Whether a transfer took longer than its codec would have."""
        times = self.times.get(codec)
        return codec == RAW or times is None or seconds > _CLEARLY * raw_bytes * max(times.pack, times.unpack)
