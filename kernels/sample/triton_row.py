# mypy: ignore-errors
"""What the sampling kernels share on the device: a row's record and state, its logits, order-preserving keys, mass in
fixed point, and the hand-over to the program of a row that ends last."""

import triton
import triton.language as tl

from biphase.kernels.sample import params as _params

_FIELDS = _params.FIELD_WORD
WORDS: tl.constexpr = tl.constexpr(_params.WORDS)
FLAGS: tl.constexpr = tl.constexpr(_FIELDS["flags"])
TOP_K: tl.constexpr = tl.constexpr(_FIELDS["top_k"])
NUM_TOP: tl.constexpr = tl.constexpr(_FIELDS["num_top"])
LATE_ROW: tl.constexpr = tl.constexpr(_FIELDS["late_row"])
TEMPERATURE: tl.constexpr = tl.constexpr(_FIELDS["temperature"])
FLOOR: tl.constexpr = tl.constexpr(_FIELDS["floor"])
REPETITION: tl.constexpr = tl.constexpr(_FIELDS["repetition"])
FREQUENCY: tl.constexpr = tl.constexpr(_FIELDS["frequency"])
PRESENCE: tl.constexpr = tl.constexpr(_FIELDS["presence"])
MASK_START: tl.constexpr = tl.constexpr(_FIELDS["mask_start"])
PROMPT: tl.constexpr = tl.constexpr(_FIELDS["prompt_start"])
OUTPUT: tl.constexpr = tl.constexpr(_FIELDS["output_start"])
BIAS: tl.constexpr = tl.constexpr(_FIELDS["bias_start"])
FORBID: tl.constexpr = tl.constexpr(_FIELDS["forbid_start"])
SEED: tl.constexpr = tl.constexpr(_FIELDS["seed"])
BRANCH: tl.constexpr = tl.constexpr(_FIELDS["branch"])
POSITION: tl.constexpr = tl.constexpr(_FIELDS["position"])
TOP_P: tl.constexpr = tl.constexpr(_FIELDS["top_p"])

ACTIVE: tl.constexpr = tl.constexpr(int(_params.RowFlag.ACTIVE))
DRAWN: tl.constexpr = tl.constexpr(int(_params.RowFlag.DRAWN))
HAS_TOP_K: tl.constexpr = tl.constexpr(int(_params.RowFlag.TOP_K))
HAS_TOP_P: tl.constexpr = tl.constexpr(int(_params.RowFlag.TOP_P))
LOGPROBS: tl.constexpr = tl.constexpr(int(_params.RowFlag.LOGPROBS))
PENALISED: tl.constexpr = tl.constexpr(int(_params.RowFlag.PENALISED))
EDITED: tl.constexpr = tl.constexpr(int(_params.RowFlag.EDITED))

# words of a row's state, int64
STATE: tl.constexpr = tl.constexpr(16)
TICKET: tl.constexpr = tl.constexpr(0)  # programs of the row that have ended
BEST_ID: tl.constexpr = tl.constexpr(1)  # of the edited logits
BEST: tl.constexpr = tl.constexpr(8)  # float32 bits of that token's logit: a shard's own, where row_max is all shards'
RAW_MAX: tl.constexpr = tl.constexpr(2)  # float32 bits: of the model's own logits
LIMIT: tl.constexpr = tl.constexpr(3)  # keys above it are out
NEED: tl.constexpr = tl.constexpr(4)  # tokens at the limit that are in, the lowest ids first
EXCESS: tl.constexpr = tl.constexpr(5)  # tokens at the limit that are out
PREFIX: tl.constexpr = tl.constexpr(6)  # digits of the limit found so far
WANTED: tl.constexpr = tl.constexpr(7)  # count or mass still to be found below the prefix

INFINITY_KEY: tl.constexpr = tl.constexpr(0x7F800000)
NO_ID: tl.constexpr = tl.constexpr(0x7FFFFFFF)
FIXED_ONE: tl.constexpr = tl.constexpr(float(1 << 40))
NEGATIVE: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def flag(record_ptr, which: tl.constexpr):
    return (tl.load(record_ptr + FLAGS) & which) != 0


@triton.jit
def float_field(record_ptr, word: tl.constexpr):
    return tl.load(record_ptr + word).to(tl.float32, bitcast=True)


@triton.jit
def wide_field(record_ptr, word: tl.constexpr):
    """uint64"""
    low = tl.load(record_ptr + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(record_ptr + word + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def raw_logits(logits_ptr, offsets, mask):
    """float32; NaN never wins."""
    x = tl.load(logits_ptr + offsets, mask=mask, other=NEGATIVE).to(tl.float32)
    return tl.where(x == x, x, NEGATIVE)  # noqa: PLR0124 (false for NaN alone)


@triton.jit
def row_logits(logits_ptr, edits_ptr, offsets, mask, edited):
    """float32, after the edits. ``logits_ptr`` and ``edits_ptr`` point to the row."""
    if edited:  # noqa: SIM108 (a branch, not a select)
        x = tl.load(edits_ptr + offsets, mask=mask, other=NEGATIVE)
    else:
        x = raw_logits(logits_ptr, offsets, mask)
    return x


@triton.jit
def scaled(x, row_max, temperature):
    """z = (x - max) / temperature, rounded as IEEE says: the CPU ranks the very same numbers."""
    return tl.div_rn(x - row_max, temperature)


@triton.jit
def key_of(z):
    """int32, 0 for the best, rising as z <= 0 falls; equal where z is equal."""
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def z_of(key):
    return -(key.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def fixed_mass(z):
    """exp(z) in units of 2^-40, int64: sums are exact, so they depend on no order, tile, split or batch."""
    return (tl.exp(z) * FIXED_ONE).to(tl.int64)


@triton.jit
def rising(x):
    """float32 -> int32 of the same order; zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ends_last(state_ptr):
    """Whether all other programs of the row have ended; their stores and atomics are then seen by ``.cg`` loads.

    The barrier orders all threads of the program before the one that takes the ticket.
    """
    tl.debug_barrier()
    before = tl.atomic_add(state_ptr + TICKET, 1, sem="acq_rel")
    last = before == tl.num_programs(1) - 1
    if last:
        tl.store(state_ptr + TICKET, before * 0)
    return last
