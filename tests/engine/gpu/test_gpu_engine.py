"""The GPU's step against the CPU's: the same tokens, whatever shares a step, whatever the host has not seen yet.

Without a GPU the whole step runs here all the same, its kernels interpreted; graphs are a GPU's alone.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from biphase.engine.config import EngineConfig
from biphase.engine.cpu_engine import CpuEngine
from biphase.engine.engine import Engine
from biphase.engine.gpu.engine import GpuEngine, buckets_up_to
from biphase.engine.gpu.warm_up import warm_up_handoff
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import InvalidRequest, SetupError
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

GREEDY = Sampling()
DRAWN = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration alone: weights are made up, since a machine with a GPU may have no transformers to write them."""
    folder = tmp_path_factory.mktemp("tiny-paged")
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def config_for(folder: Path, **settings: object) -> EngineConfig:
    return dataclasses.replace(
        EngineConfig(
            model=str(folder),
            load_format="dummy",
            weights_cache=str(folder / "cache"),
            block_size=16,
            num_kv_blocks=12,
            max_step_tokens=24,
            max_step_seqs=4,
            threads=1,
            dtype="float32",
        ),
        **settings,  # type: ignore[arg-type]
    ).resolved(has_cuda=torch.cuda.is_available())


@pytest.fixture(scope="module", params=["triton", "torch"])
def engine(request: pytest.FixtureRequest, model_dir: Path) -> GpuEngine:
    return GpuEngine.load(config_for(model_dir), lambda detail, done: None, request.param)


@pytest.fixture(scope="module")
def cpu(model_dir: Path) -> Engine:
    return CpuEngine.load(dataclasses.replace(config_for(model_dir), device="cpu"), lambda detail, done: None)


def seq(
    number: int,
    tokens: list[int],
    *,
    start: int = 0,
    blocks: list[int],
    sampling: Sampling | None = GREEDY,
    index: int = 0,
    continues: bool = False,
    forbid: tuple[int, ...] = (),
) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(number),
        token_ids=tokens,
        start=start,
        blocks=[BlockId(block) for block in blocks],
        sampling=sampling,
        output_index=index,
        continues=continues,
        forbid_ids=forbid,
    )


def plan(*seqs: SeqStep) -> StepPlan:
    return StepPlan(seqs=seqs)


PROMPT = [3, 17, 60, 9, 44, 21, 5, 80, 33, 12, 71, 8, 15, 90, 2, 41, 7, 29, 55, 10]


def test_prefill_chunks_and_decode_give_the_tokens_of_the_cpu(engine: GpuEngine, cpu: Engine) -> None:
    def tokens_of(run: Engine) -> list[int | None]:
        found = list(run.execute(plan(seq(1, PROMPT[:7], blocks=[3, 5], sampling=None))).tokens)
        found += run.execute(plan(seq(1, PROMPT[7:], start=7, blocks=[3, 5]))).tokens
        for step in range(6):
            last = found[-1]
            assert last is not None
            found += run.execute(plan(seq(1, [last], start=len(PROMPT) + step, blocks=[3, 5], index=1 + step))).tokens
        return found

    expected = tokens_of(cpu)
    assert expected[0] is None and len(set(expected[1:])) >= 3
    assert tokens_of(engine) == expected


def test_a_mixed_step_gives_each_what_it_gets_alone(engine: GpuEngine, cpu: Engine) -> None:
    def run(on: Engine) -> list[tuple[int | None, ...]]:
        results = [on.execute(plan(seq(1, PROMPT, blocks=[0, 1]), seq(2, PROMPT[:4], blocks=[2], sampling=DRAWN)))]
        first, second = results[0].tokens
        assert first is not None and second is not None
        results.append(
            on.execute(
                plan(
                    seq(3, PROMPT[2:14], blocks=[4], sampling=DRAWN, forbid=(2,)),
                    seq(1, [first], start=20, blocks=[0, 1], index=1),
                    seq(4, PROMPT[3:9], blocks=[6], sampling=None),
                    seq(2, [second], start=4, blocks=[2], sampling=DRAWN, index=1),
                )
            )
        )
        results.append(on.execute(plan(seq(4, [11], start=6, blocks=[6], sampling=None), seq(5, [9], blocks=[7]))))
        return [result.tokens for result in results]

    assert run(engine) == run(cpu)


def test_a_step_continues_what_the_host_has_not_seen(engine: GpuEngine, cpu: Engine) -> None:
    expected: list[int | None] = list(
        cpu.execute(plan(seq(1, PROMPT, blocks=[0, 1]), seq(2, [4, 6], blocks=[2]))).tokens
    )
    one, two = expected
    for step in range(3):
        assert one is not None and two is not None
        one, two = cpu.execute(
            plan(
                seq(1, [one], start=20 + step, blocks=[0, 1], index=1 + step),
                seq(2, [two], start=2 + step, blocks=[2], index=1 + step),
            )
        ).tokens
        expected += [one, two]

    pending = [engine.launch(plan(seq(1, PROMPT, blocks=[0, 1]), seq(2, [4, 6], blocks=[2])))]
    for step in range(3):
        ahead = [
            seq(1, [0], start=20 + step, blocks=[0, 1], index=1 + step, continues=True),
            seq(2, [0], start=2 + step, blocks=[2], index=1 + step, continues=True),
        ]
        pending.append(engine.launch(plan(*(ahead if step % 2 else ahead[::-1]))))
    found: list[int | None] = []
    for step, launched in enumerate(pending):
        tokens = launched.wait().tokens
        found += tokens if step in (0, 2) else tokens[::-1]
    assert found == expected


def test_more_steps_in_flight_than_buffers_lose_nothing(engine: GpuEngine) -> None:
    pending = [engine.launch(plan(seq(i, [i + 3, i + 4], blocks=[i % 8]))) for i in range(9)]
    late = [launched.wait().tokens for launched in pending]
    assert late == [engine.execute(plan(seq(i, [i + 3, i + 4], blocks=[i % 8]))).tokens for i in range(9)]


def test_padding_writes_nothing(engine: GpuEngine) -> None:
    """A batch of three runs as four: the fourth row may touch neither the pool nor anybody's draw."""
    before = engine._model._pool.clone()
    engine.execute(plan(*(seq(i, [5 + i], blocks=[i + 1]) for i in range(3))))
    changed = (engine._model._pool != before).flatten(2).any(-1).any(0)
    assert changed.nonzero().flatten().tolist() in ([1, 2, 3], [])


def test_what_cannot_be_computed_is_refused_before_anything_is_launched(engine: GpuEngine) -> None:
    with pytest.raises(InvalidRequest, match="the step has 25 tokens, this engine was made for 24"):
        engine.launch(plan(seq(1, [4] * 25, blocks=[0, 1])))
    with pytest.raises(InvalidRequest, match="the step has 5 sequences, this engine was made for 4"):
        engine.launch(plan(*(seq(i, [4], blocks=[i]) for i in range(5))))
    assert engine.execute(plan(seq(1, PROMPT, blocks=[0, 1]))).tokens[0] is not None


def changed(model_dir: Path, folder: Path, **fields: object) -> Path:
    """The model's configuration with other fields."""
    (folder / "config.json").write_text(json.dumps(json.loads((model_dir / "config.json").read_text()) | fields))
    return folder


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_vocabulary_may_have_any_size(model_dir: Path, tmp_path: Path, kernels: str) -> None:
    config = config_for(changed(model_dir, tmp_path, vocab_size=101))
    odd = GpuEngine.load(config, lambda detail, done: None, kernels)
    steps = plan(seq(1, PROMPT, blocks=[0, 1]), seq(2, PROMPT[:3], blocks=[2], sampling=DRAWN))
    on_cpu = CpuEngine.load(dataclasses.replace(config, device="cpu"), lambda detail, done: None)
    assert odd.execute(steps).tokens == on_cpu.execute(steps).tokens


def test_what_the_kernels_cannot_do_is_a_mistake_in_the_set_up(model_dir: Path, tmp_path: Path) -> None:
    config = config_for(changed(model_dir, tmp_path, head_dim=80))
    with pytest.raises(SetupError, match="head_dim is 80"):
        GpuEngine.load(config, lambda detail, done: None, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is compiled here")
def test_nothing_is_compiled_once_it_serves(model_dir: Path) -> None:
    from biphase.kernels.gpu.compile_count import num_since_sealed

    engine = GpuEngine.load(config_for(model_dir), lambda detail, done: None, "triton")
    engine.warm_up(lambda done: None)
    for length in range(1, len(PROMPT) + 1):
        engine.execute(plan(seq(1, PROMPT[:length], blocks=[2, 3], sampling=DRAWN if length % 3 else GREEDY)))
        decoding = [seq(2 + i, [7 + i], start=length, blocks=[4, 5], sampling=DRAWN) for i in range(length % 4)]
        engine.execute(plan(*decoding, seq(9, PROMPT[: 21 - length], blocks=[6, 7], sampling=None)))
        if decoding:
            engine.execute(plan(*decoding))
    warm_up_handoff(engine.kv_memory)  # outside of inference mode here, as in the event loop
    assert num_since_sealed() == 0


def test_buckets_waste_less_than_eight_rows() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert buckets_up_to(13) == (1, 2, 4, 8, 13)
