"""After warm-up no step and no handoff makes a launch that Triton would compile for: shown without a GPU, by the keys that
Triton compiles under. On a GPU the counter of compilations says the same (test_gpu_engine)."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from support.launch_signatures import Signatures, recording

from biphase.engine.config import EngineConfig
from biphase.engine.gpu.engine import GpuEngine, buckets_up_to
from biphase.engine.gpu.warm_up import row_counts, warm_up_plans
from biphase.engine.plan_limits import PlanLimits
from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.gpu.target import AOT_TARGETS, Target
from biphase.kernels.gpu.tuning import Settings, answering
from biphase.kernels.kv_layout import KvBox
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

H100 = AOT_TARGETS[90]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 70},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=20, seed=4),
    Sampling(temperature=0.9, top_p=0.9, min_p=0.05, seed=2**63 + 1),
)
MAX_ROWS, MAX_SEQS, NUM_BLOCKS = 1100, 41, 80
"""Rows past the bounds where the MoE kernels change (Mixtral's last: 512, Qwen3-MoE's: 1024)."""


@contextmanager
def warmed_up(folder: Path, model: str, **settings: Any) -> Iterator[tuple[GpuEngine, Signatures]]:
    """An engine whose kernels are chosen for an H100 and recorded instead of run, and what warm-up has made."""
    (folder / "config.json").write_text(json.dumps(SIZES | MODELS[model]))
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        block_size=64,
        num_kv_blocks=NUM_BLOCKS,
        max_step_tokens=MAX_ROWS,
        max_step_seqs=MAX_SEQS,
        threads=1,
        dtype="bfloat16",
        device="cuda",
    )
    config = replace(config, **settings).resolved(has_cuda=True)
    object.__setattr__(config, "device", "cpu")  # with the dtypes of a GPU, which a configuration for the CPU refuses
    with recording(H100) as signatures:
        engine = GpuEngine.load(config, lambda detail, done: None, "triton")
        signatures.seal()
        yield engine, signatures


def sequence(random_: random.Random, number: int, count: int, longest: int, *, draws: bool) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(number),
        token_ids=[5] * count,
        start=random_.randint(0, longest - count),
        blocks=[BlockId(block) for block in random_.choices(range(NUM_BLOCKS), k=-(-longest // 16))],
        sampling=random_.choice(SAMPLINGS) if draws else None,
        output_index=random_.randint(0, 99),
        forbid_ids=random_.choice(((), (2,))),
        continues=count == 1 and random_.random() < 0.5,
    )


def step(random_: random.Random, num_decode: int, chunks: list[int], longest: int, *, all_draw: bool) -> StepPlan:
    counts = [1] * num_decode + chunks
    random_.shuffle(counts)
    draws = [all_draw or random_.random() < 0.7 for _ in counts]
    return StepPlan(seqs=tuple(sequence(random_, i, n, longest, draws=draws[i]) for i, n in enumerate(counts)))


def random_steps(engine: GpuEngine, seed: int, count: int) -> Iterator[StepPlan]:
    """Decode batches of every size; then chunks, one and several, beside decode rows or not, up to the largest step."""
    random_, longest = random.Random(seed), engine.model_info.max_model_len
    for size in range(1, MAX_SEQS + 1):
        yield step(random_, size, [], longest, all_draw=True)
        yield step(random_, size, [], longest, all_draw=False)
    largest = min(longest, MAX_ROWS)
    yield step(random_, 0, [largest] * (MAX_ROWS // largest), longest, all_draw=True)
    for _ in range(count):
        num_decode = random_.choice((0, random_.randint(1, MAX_SEQS - 1)))
        num_chunks = random_.choice((1, 1, random_.randint(1, MAX_SEQS - num_decode)))
        room, chunks = MAX_ROWS - num_decode, []
        for left in range(num_chunks - 1, -1, -1):
            most = min(largest, room - 2 * left)
            chunks.append(random_.choice((most, random_.randint(2, most), min(most, random_.randint(2, 40)))))
            room -= chunks[-1]
        yield step(random_, num_decode, chunks, longest, all_draw=random_.random() < 0.4)


def hand_off(engine: GpuEngine, seed: int) -> None:
    """Pieces as transfers cut them, outside of inference mode like the event loop's."""
    random_, layout = random.Random(seed), engine.kv_memory.layout
    for tokens in (1, 16, 100, 700):
        start = random_.randint(0, 40)
        box = KvBox(
            layer_start=random_.choice((0, 1)),
            layer_end=layout.num_layers,
            head_start=0,
            head_end=layout.num_kv_heads,
            token_start=start,
            token_end=start + tokens,
        )
        packed, blocks = bytearray(box.num_bytes(layout)), random_.sample(range(NUM_BLOCKS), 50)
        engine.kv_memory.pack(blocks, box, packed)
        engine.kv_memory.unpack(blocks, box, bytes(packed))


def another_for_each_key(op: str, target: Target, key: str) -> Settings | None:
    """A tuning table that has settings of its own for every key that a step's rows decide."""
    digits = int("".join(filter(str.isdigit, key)) or 0)
    if op == "moe_route":
        return {"TILE_ROWS": 16 * digits.bit_length()}
    if op == "sample":
        return {"TILE": 1024, "splits": 4, "num_warps": digits}
    return None


CASES = [
    pytest.param("mixtral", {"max_model_len": 120}),
    pytest.param("qwen3_moe", {"max_model_len": 120, "kv_dtype": "float8_e4m3fn"}),
    pytest.param("llama", {}),
    pytest.param("mistral", {"block_size": 16, "max_model_len": 1200}, marks=pytest.mark.long),
    pytest.param("mixtral", {"dtype": "float32"}, marks=pytest.mark.long),
    pytest.param("qwen3_moe", {}, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("model", "settings"), CASES)
def test_random_steps_launch_nothing_that_warm_up_did_not(model: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with warmed_up(tmp_path, model, **settings) as (engine, signatures):
        for plan in random_steps(engine, 1, 60):
            engine.launch(plan).wait()
        hand_off(engine, 2)
    assert signatures.new == []
    assert {"move_kernel", "prefill_attention_kernel", "split_kernel", "draw_kernel"} <= {n for n, _ in signatures.made}


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3_moe"])
def test_no_number_of_rows_needs_a_kernel_of_its_own(model: str, tmp_path: Path) -> None:
    """Whatever a tuning table says for each class of row counts."""
    random_ = random.Random(5)
    with answering(another_for_each_key), warmed_up(tmp_path, model, max_model_len=200) as (engine, signatures):
        for count in range(1, MAX_ROWS + 1):
            chunks = [200] * (count // 200) + [count % 200] * bool(count % 200)
            engine.launch(step(random_, 0, chunks, 200, all_draw=False)).wait()
    assert signatures.new == []


@pytest.mark.parametrize("missing", ["several chunks", "handoff"])
def test_what_warm_up_leaves_out_is_found(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "handoff":
        monkeypatch.setattr("biphase.engine.gpu.engine.warm_up_handoff", lambda memory: None)
    else:
        monkeypatch.setattr("biphase.engine.gpu.warm_up.row_counts", lambda most: [2, min(most, 100)])
    with warmed_up(tmp_path, "mixtral", max_model_len=120) as (engine, signatures):
        engine.launch(step(random.Random(6), 0, [120] * 9, 120, all_draw=True)).wait()
        hand_off(engine, 3)
    found = {name for name, _ in signatures.new}
    expected = {"move_kernel"} if missing == "handoff" else {"choose_kernel", "lay_out_kernel", "place_kernel"}
    assert found - {"grouped_product_kernel"} == expected


def test_row_counts_miss_nothing_between_bounds_twice_as_far_apart() -> None:
    for most in (1, 2, 3, 24, 100, 1100):
        counts = row_counts(most)
        assert counts[0] == 1 and counts[-1] == most
        for unit in range(1, 60):
            bounds = {unit * 2**k // 7 for k in range(14)} | {1, 16, 512, most}
            ordered = sorted(bound for bound in bounds if 0 < bound <= most)
            for low, high in zip([0, *ordered], ordered, strict=False):
                assert any(low < count <= high for count in counts), (most, low, high)


def test_plans_are_within_every_limit() -> None:
    for max_rows, max_seqs, max_model_len, num_blocks in product(
        (1, 2, 3, 24, 513), (1, 2, 5), (1, 2, 40, 4096), (1, 200)
    ):
        limits = PlanLimits(block_size=16, num_blocks=num_blocks, vocab_size=9, max_model_len=max_model_len)
        plans = list(warm_up_plans(limits, max_rows=max_rows, max_seqs=max_seqs, buckets=buckets_up_to(max_seqs)))
        for plan in plans:
            limits.check(plan)
            assert plan.num_tokens <= max_rows and len(plan.seqs) <= max_seqs
            assert all(seq.start + len(seq.token_ids) <= 16 * num_blocks for seq in plan.seqs)
        assert max(plan.num_tokens for plan in plans) == min(max_rows, max_seqs * min(max_model_len, 16 * num_blocks))
