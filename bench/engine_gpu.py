"""The engine's speed on a GPU, against ceilings of the same run: prefill steps, decode steps, launches, host gap.

    python bench/engine_gpu.py [--model FILE] [--num-layers N] [--kv-dtype D] [--only GROUP...] [--json FILE] [--check]
                               [--smoke]

Weights are made up on the device (--load-format dummy) for any configuration, so that nothing need be downloaded. A
step's time is the device's own, from its first copy to its last. Floors: a prefill's products and attention at the
matrix rate; a decode step's weights (without the input embedding) and KV at the copy bandwidth. Goals are those of
Llama-3-8B; other models' figures are shown beside none.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import report
import torch
from gpu_profile import keep_profiler, profiled_kernels, triton_launches
from gpu_report import GpuReport
from gpu_timing import Ceilings
from gpu_worker_load import Gap, Load, host_gaps
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
GAPS = {
    Load(requests=64, prompt_len=64): 0.05,
    Load(requests=1, prompt_len=64): 0.08,
    Load(requests=64, prompt_len=1): None,
}
"""Share of the time without a kernel; a prompt of 64 is computed by the decode worker, the harder of both."""
GROUPS = ("prefill", "decode", "launches", "gaps")
_SMOKE = {
    "num_kv_blocks": 16,
    "block_size": 16,
    "max_step_tokens": 17,
    "max_step_seqs": 2,
    "max_model_len": 32,
    "dtype": "float32",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="config.json of the model whose shape is measured")
    parser.add_argument("--num-layers", type=int, help="only so many layers of it")
    parser.add_argument("--kv-dtype", default="auto", help="auto or float8_e4m3fn")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of figures")
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
        fields |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 96}
        fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 128}
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
    rounds = ROUNDS if torch.cuda.is_available() else 1
    return statistics.median(engine.execute(plan).step_ms for _ in range(rounds))


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


def prefill(engine: Engine, ceilings: Ceilings, out: GpuReport, *, smoke: bool, goals: bool) -> None:
    for tokens, bound in ({16: 0.0} if smoke else PREFILLS).items():
        ms = step_ms(engine, prefill_plan(engine, tokens))
        share = prefill_flops(engine.model_config, tokens) / (ms / 1e3) / ceilings.matrix
        out.row(f"prefill step of {tokens}", ms, "ms", f"{share:.3f} of the matrix rate")
        if goals:
            out.goal(f"prefill-{tokens}-of-matrix-rate", share, bound, at_least=True)


def decode(engine: Engine, ceilings: Ceilings, out: GpuReport, *, smoke: bool, goals: bool) -> None:
    for (batch, context), bound in ({(2, 20): 0.0} if smoke else DECODES).items():
        ms = step_ms(engine, decode_plan(engine, batch, context))
        times = ms / 1e3 / (decode_bytes(engine.model_config, engine, batch, context) / ceilings.copy)
        out.row(f"decode step, {batch} x {context}", ms, "ms", f"{times:.3f} times its bytes at copy bandwidth")
        if goals:
            out.goal(f"decode-{batch}x{context}-times-floor", times, bound)


def launches(engine: Engine, out: GpuReport) -> None:
    """Kernels of one decode step / layers, by the profiler; without a GPU what is counted are calls of ``launch``."""
    plan = decode_plan(engine, 1, 16)
    engine.execute(plan)
    if torch.cuda.is_available():
        kernels = profiled_kernels(lambda: engine.execute(plan))
        what = "kernels on the GPU"
    else:
        kernels, what = triton_launches(lambda: engine.execute(plan)), "Triton kernels; products are not among them"
    layers = engine.model_config.num_layers
    out.row("launches of a decode step", len(kernels), "", what)
    out.row("launches per layer of a decode step", len(kernels) / layers, "", "about 10 are planned")
    out.extra["decode_step_kernels"] = dict(Counter(kernels).most_common())


def gaps(config: EngineConfig, arguments: argparse.Namespace, out: GpuReport, *, goals: bool) -> None:
    smoke = arguments.smoke

    def found(gap: Gap) -> None:
        note = f"{gap.steps} steps, {gap.tokens} tokens, {gap.superfluous} superfluous"
        out.row(f"host gap, {gap.load}", "-" if gap.share is None else gap.share, "", note)
        bound = GAPS.get(gap.load)
        if goals and gap.share is not None and bound is not None:
            out.goal(f"host-gap-{gap.load.requests}", gap.share, bound)
        out.write(arguments)

    loads = [Load(requests=2, prompt_len=8)] if smoke else list(GAPS)
    steps = 4 if smoke else arguments.steps
    asyncio.run(host_gaps(config, loads, steps=steps, trace=arguments.trace, found=found, small=smoke))


def config_of(arguments: argparse.Namespace, model: str) -> EngineConfig:
    sizes = _SMOKE if arguments.smoke else {"max_step_tokens": 8192 + 64, "max_model_len": 8192}
    if not arguments.smoke:
        sizes["kv_memory_bytes"] = int(arguments.kv_memory_gib * 2**30)
    return EngineConfig(
        model=model,
        served_name=Path(arguments.model).stem,
        load_format="dummy",
        kv_dtype=arguments.kv_dtype,
        **sizes,  # type: ignore[arg-type]
    )


def main() -> int:
    arguments = parse()
    keep_profiler()
    if arguments.smoke:
        enter_smoke()
    if not arguments.smoke and not torch.cuda.is_available():
        print(
            "bench/engine_gpu.py measures a GPU and torch finds none here (--smoke tests the program)", file=sys.stderr
        )
        return 2
    out = GpuReport(bench="engine_gpu", columns=("measure", "value", "unit", "note"))
    goals = not arguments.smoke and arguments.num_layers is None and Path(arguments.model).resolve() == DEFAULT_MODEL
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            arguments, shrunk(arguments.model, Path(folder), arguments.num_layers, smoke=arguments.smoke)
        )
        ceilings = Ceilings.measure()
        for name, value, unit in ceilings.as_rows():
            out.row(name, value, unit, "ceiling")
        loaded: list[Engine] = []

        def engine() -> Engine:
            if not loaded:
                began_s = time.monotonic()
                loaded.append(Engine.load(config, lambda detail, done: None))
                out.row("load and warm-up", time.monotonic() - began_s, "s", "weights made up, kernels, graphs")
            return loaded[0]

        def of_worker() -> None:
            loaded.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # both engines together would not fit
            load = dataclasses.replace(config, kv_memory_bytes=None if arguments.smoke else 4 << 30)
            gaps(load, arguments, out, goals=goals)

        options = {"smoke": arguments.smoke, "goals": goals}
        groups: dict[str, Callable[[], object]] = {
            "prefill": lambda: prefill(engine(), ceilings, out, **options),
            "decode": lambda: decode(engine(), ceilings, out, **options),
            "launches": lambda: launches(engine(), out),
            "gaps": of_worker,
        }
        out.extra["model"] = {"config": Path(arguments.model).name, "num_layers": arguments.num_layers or "all"}
        out.run_groups({name: run for name, run in groups.items() if name in arguments.only}, arguments)
    return out.finish(arguments)


if __name__ == "__main__":
    report.run(main)
