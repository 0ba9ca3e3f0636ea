"""The engine's speed on a GPU, against ceilings of the same run: prefill steps, decode steps, launches, host gap.

    python bench/engine_gpu.py [--model FILE] [--num-layers N] [--kv-dtype D] [--json FILE] [--check] [--smoke]

Weights are made up on the device (--load-format dummy) for any configuration, so that nothing need be downloaded. A
step's time is the device's own, from its first copy to its last. Floors: a prefill's products and attention at the
matrix rate; a decode step's weights (without the input embedding) and KV at the copy bandwidth.
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import report
import torch
from gpu_timing import Ceilings
from gpu_worker_load import host_gap
from smoke import enter_smoke

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.model_config import ModelConfig
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

DEFAULT_MODEL = Path(__file__).parent / "configs" / "llama-3-8b.json"
ROUNDS = 9
PREFILLS = {8192: 0.65, 512: 0.45}
"""Tokens of a prefill step: share of the matrix rate that it is to reach."""
DECODES = {(1, 1024): 1.25, (64, 2048): 1.35}
"""(sequences, context): how many times its floor a step may take."""
GAPS = {64: 0.05, 1: 0.08}
"""Requests at once: share of the time without a kernel."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="config.json of the model whose shape is measured")
    parser.add_argument("--num-layers", type=int, help="only so many layers of it")
    parser.add_argument("--kv-dtype", default="auto", help="auto or float8_e4m3fn")
    parser.add_argument("--kv-memory-gib", type=float, default=24.0)
    parser.add_argument("--steps", type=int, default=300, help="steps over which the host gap is taken")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the profiler's trace of the host gap there")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, anywhere: tests this program, measures nothing"
    )
    report.add_arguments(parser)
    return parser.parse_args()


def shrunk(model: str, folder: Path, num_layers: int | None, *, smoke: bool) -> str:
    """The configuration with fewer layers (or tiny all over), as a file."""
    fields = json.loads(Path(model).read_text())
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    if smoke:
        fields |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 160}
        fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def matrix_weights(config: ModelConfig) -> int:
    """Elements of the matrices that one token is multiplied with in all layers; of experts, those it takes."""
    dim, hidden = config.head_dim, config.hidden_size
    attention = hidden * dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    if config.num_experts:
        experts = config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size
        return config.num_layers * (attention + experts + hidden * config.num_experts)
    return config.num_layers * (attention + 3 * hidden * config.intermediate_size)


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Products of all layers, causal attention (half of 4 S^2 D H), the head for the one row that draws."""
    attention = config.num_layers * 4 * tokens**2 * config.head_dim * config.num_heads / 2
    return 2.0 * matrix_weights(config) * tokens + attention + 2.0 * config.hidden_size * config.vocab_size


def decode_bytes(config: ModelConfig, engine: Engine, batch: int, context: int) -> float:
    """Weights that are read (of experts at most all, at least those of one token) and the KV of all sequences."""
    itemsize = getattr(torch, engine.config.dtype).itemsize
    weights = matrix_weights(config) + config.hidden_size * config.vocab_size
    if config.num_experts:
        each = 3 * config.hidden_size * config.moe_intermediate_size * config.num_layers
        share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch  # expected under even routing
        weights += each * (config.num_experts * share - config.num_experts_per_tok)
    return weights * itemsize + batch * context * engine.layout.token_bytes


def step_ms(engine: Engine, plan: StepPlan) -> float:
    engine.execute(plan)
    return statistics.median(engine.execute(plan).step_ms for _ in range(ROUNDS))


def sequence(number: int, engine: Engine, tokens: int, start: int, first_block: int) -> SeqStep:
    count = engine.layout.blocks_for(start + tokens)
    vocab = engine.model_info.vocab_size
    return SeqStep(
        seq_id=SeqId(number),
        token_ids=[(7919 * (number + position)) % vocab for position in range(tokens)],
        start=start,
        blocks=[BlockId(first_block + i) for i in range(count)],
        sampling=Sampling(),
    )


def prefill_plan(engine: Engine, tokens: int) -> StepPlan:
    return StepPlan(seqs=(sequence(0, engine, tokens, 0, 0),))


def decode_plan(engine: Engine, batch: int, context: int) -> StepPlan:
    each = engine.layout.blocks_for(context)
    return StepPlan(seqs=tuple(sequence(i, engine, 1, context - 1, i * each) for i in range(batch)))


def measure(engine: Engine, ceilings: Ceilings, out: report.Report, *, smoke: bool) -> None:
    config = engine.model_config
    for tokens, bound in {32: 0.0, 8: 0.0}.items() if smoke else PREFILLS.items():
        ms = step_ms(engine, prefill_plan(engine, tokens))
        share = prefill_flops(config, tokens) / (ms / 1e3) / ceilings.matrix
        out.row(f"prefill step of {tokens}", ms, "ms", f"{share:.3f} of the matrix rate")
        if not smoke:
            out.goal(f"prefill-{tokens}-of-matrix-rate", share, bound, at_least=True)
    for (batch, context), bound in {(1, 20): 0.0, (3, 40): 0.0}.items() if smoke else DECODES.items():
        ms = step_ms(engine, decode_plan(engine, batch, context))
        times = ms / 1e3 / (decode_bytes(config, engine, batch, context) / ceilings.copy)
        out.row(f"decode step, {batch} x {context}", ms, "ms", f"{times:.3f} times its bytes at copy bandwidth")
        if not smoke:
            out.goal(f"decode-{batch}x{context}-times-floor", times, bound)
    launches = launches_per_layer(engine)
    if launches is not None:
        out.row("launches per layer of a decode step", launches, "", "about 10 are planned")


def launches_per_layer(engine: Engine) -> float | None:
    """Kernels of one decode step / layers, by the profiler; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    plan = decode_plan(engine, 1, 64)
    engine.execute(plan)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.execute(plan)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels) / engine.model_config.num_layers


def main() -> int:
    arguments = parse()
    if arguments.smoke:
        enter_smoke()
    out = report.Report(bench="engine_gpu", columns=("measure", "value", "unit", "note"))
    with tempfile.TemporaryDirectory() as folder:
        model = shrunk(arguments.model, Path(folder), arguments.num_layers, smoke=arguments.smoke)
        smoke_sizes = {"num_kv_blocks": 64, "block_size": 16, "max_step_tokens": 64, "max_step_seqs": 4}
        sizes = {"kv_memory_bytes": int(arguments.kv_memory_gib * 2**30), "max_step_tokens": 8192 + 64}
        config = EngineConfig(
            model=model,
            served_name=Path(arguments.model).stem,
            load_format="dummy",
            kv_dtype=arguments.kv_dtype,
            max_model_len=256 if arguments.smoke else 8192,
            **(smoke_sizes if arguments.smoke else sizes),
        )
        ceilings = Ceilings.measure()
        for name, value, unit in ceilings.as_rows():
            out.row(name, value, unit, "ceiling")
        engine = Engine.load(config, lambda detail, done: None)
        out.extra["model"] = {"config": arguments.model, "num_layers": engine.model_config.num_layers}
        out.extra["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        measure(engine, ceilings, out, smoke=arguments.smoke)
        del engine
        load = dataclasses.replace(config, max_step_tokens=1024)
        for requests, bound in {2: 0.0}.items() if arguments.smoke else GAPS.items():
            gap = asyncio.run(
                host_gap(
                    load,
                    requests=requests,
                    prompt_len=8 if arguments.smoke else 64,
                    steps=6 if arguments.smoke else arguments.steps,
                    trace=arguments.trace,
                )
            )
            note = f"{gap.steps} steps, {gap.tokens} tokens, {gap.superfluous} superfluous"
            out.row(f"host gap, {requests} requests", "-" if gap.share is None else gap.share, "", note)
            if gap.share is not None:
                out.goal(f"host-gap-{requests}", gap.share, bound)
    return out.finish(arguments)


if __name__ == "__main__":
    report.run(main)
