"""An instance signs what its engine is, the same on either side of a handoff."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from support.kv import LAYOUT, SummingMemory

from biphase.kernels.kv_layout import KvLayout, uniform_scales
from biphase.kernels.kv_pack import CpuKvMemory, KvMemory
from biphase.kvtransfer.signature import BYTES_DIGEST, SUM_DIGEST, KvSignatureValue, RankEndpoint, mismatch
from biphase.protos.parallel_plan import ParallelPlan


@dataclass
class Model:
    model_hash: bytes = b"m" * 16


def memory_of(layout: KvLayout, kind: Any = CpuKvMemory) -> Any:
    return kind(np.zeros(layout.pool_shape(1), np.float32), layout)


@dataclass
class Engine:
    """Rank 0 of two: its own memory is half of the model's."""

    full_layout: KvLayout = LAYOUT
    plan: ParallelPlan = field(default_factory=lambda: ParallelPlan(tp=2))
    rope_signature: str = "theta 10000.0"
    model_info: Model = field(default_factory=Model)
    kv_memory: KvMemory = field(default_factory=lambda: memory_of(LAYOUT))


def test_an_engine_signs_for_the_whole_instance() -> None:
    ends = (RankEndpoint(grpc="a:1"), RankEndpoint(grpc="a:2", rdma=True))
    made = KvSignatureValue.of_engine(Engine(), instance="prefill-0", incarnation=3, kv_codec="int8", ranks=ends)
    assert (made.instance, made.incarnation, made.model_hash) == ("prefill-0", 3, b"m" * 16)
    assert (made.num_layers, made.num_kv_heads) == (LAYOUT.num_layers, LAYOUT.num_kv_heads)
    assert (made.rope, made.plan, made.ranks) == ("theta 10000.0", ParallelPlan(tp=2), ends)
    assert (made.codecs, made.digests) == (("int8", "raw"), (BYTES_DIGEST,))
    assert KvSignatureValue.from_proto(made.to_proto()) == made


def test_engines_of_one_model_agree_and_others_do_not() -> None:
    source = KvSignatureValue.of_engine(Engine(plan=ParallelPlan()), instance="prefill-0", incarnation=1)
    target = KvSignatureValue.of_engine(Engine(), instance="decode-0", incarnation=2, kv_codec="auto")
    assert mismatch(target, source) is None
    other = KvSignatureValue.of_engine(Engine(rope_signature="theta 5.0"), instance="decode-0", incarnation=2)
    assert mismatch(other, source) == (
        "prefill-0 cannot hand KV over to decode-0: rope theta 10000.0 against theta 5.0"
    )


def test_a_memory_that_sums_offers_the_sum_first() -> None:
    engine = Engine(kv_memory=memory_of(LAYOUT, SummingMemory))
    made = KvSignatureValue.of_engine(engine, instance="prefill-0", incarnation=1)
    assert made.digests == (SUM_DIGEST, BYTES_DIGEST)


@pytest.mark.parametrize("wanted", ["raw", "auto", "int4"])
def test_an_fp8_pool_offers_raw_only(wanted: str) -> None:
    scales = uniform_scales(1, 1)
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="float8_e4m3fn", kv_scales=scales)
    made = KvSignatureValue.of_engine(Engine(full_layout=layout), instance="x", incarnation=1, kv_codec=wanted)
    assert made.codecs == ("raw",)
    assert made.kv_scales
