"""Cases of the experts' grouped products and of sampling."""

from collections.abc import Iterator

from gpu_timing import Ceilings, device_of, median_us
from kernel_case import Result, Sizes, check

from biphase.kernels.moe.routing import RoutingWorkspace
from biphase.kernels.moe.triton_gpu import combine, grouped_down, grouped_gate_up, route
from biphase.kernels.sample import DrawRow
from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace
from biphase.kernels.sample.params import SampleParams
from biphase.kernels.sample.triton_gpu import sample

PREFILL_TOKENS, DECODE_TOKENS = 8192, 64


def expert_cases(sizes: Sizes, ceilings: Ceilings) -> Iterator[Result]:
    """Mixtral-8x7B's layer under random routing."""
    gate_up = sizes.randn(sizes.experts, 2 * sizes.intermediate, sizes.hidden).mul_(0.02)
    down = sizes.randn(sizes.experts, sizes.hidden, sizes.intermediate).mul_(0.02)
    weights = (gate_up.numel() + down.numel()) / sizes.experts
    for tokens in (PREFILL_TOKENS, DECODE_TOKENS):
        count = sizes.tokens(tokens)
        pairs = count * sizes.taken
        workspace = RoutingWorkspace(
            max_tokens=count, num_experts=sizes.experts, num_taken=sizes.taken, dtype=sizes.dtype, device=device_of()
        )
        logits, x = sizes.randn(count, max(8, sizes.experts))[:, : sizes.experts], sizes.randn(count, sizes.hidden)
        inner, rows = sizes.empty(pairs, sizes.intermediate), sizes.empty(pairs, sizes.hidden)
        out = sizes.empty(count, sizes.hidden)
        routing = route(logits, workspace, renormalize=True)
        touched = len(set(routing.expert_ids.flatten().tolist()))

        def products() -> None:
            grouped_gate_up(x, gate_up, routing, inner)  # noqa: B023 -- called in this round only
            grouped_down(inner, down, routing, rows)  # noqa: B023

        us = median_us([products])
        check("grouped products", inner, rows)
        if tokens == PREFILL_TOKENS:
            yield Result.multiplied(f"grouped products {tokens}", us, 2 * pairs * weights, ceilings, 0.55)
        else:
            note = f"weights of {touched} experts"
            num_bytes = touched * weights * sizes.itemsize
            yield Result.moved(f"grouped products {tokens}", us, num_bytes, ceilings, 0.70, note)
        us = median_us([lambda: route(logits, workspace, renormalize=True)])  # noqa: B023
        yield Result.timed(f"route {tokens}", us)
        us = median_us([lambda: combine(rows, routing, out)])  # noqa: B023
        yield Result.moved(f"combine {tokens}", us, (pairs + count) * sizes.hidden * sizes.itemsize, ceilings)


def sample_cases(sizes: Sizes, ceilings: Ceilings) -> Iterator[Result]:
    for name, bound in (("mixed", 150.0), ("greedy", None), ("plain", None)):
        count = sizes.sequences(64)
        params = SampleParams(max_rows=count, vocab_size=sizes.vocab, device=device_of())
        params.fill([_row(name, i) for i in range(count)])
        out = SampleOut.allocate(count, device_of())
        workspace = SampleWorkspace(max_rows=count, vocab_size=sizes.vocab, device=device_of())
        sets = [sizes.randn(count, sizes.vocab).mul_(3) for _ in range(1 if sizes.smoke else 8)]
        us = median_us([lambda logits=logits: sample(logits, params, out, workspace) for logits in sets])  # noqa: B023
        check("sample", out.logprobs)
        yield Result.timed(f"sample {name} 64", us, bound, "top-20 log-probabilities" if name == "mixed" else "")


def _row(name: str, i: int) -> DrawRow:
    if name == "greedy":
        return DrawRow()
    if name == "plain":
        return DrawRow(temperature=1.0, seed=i)
    history = list(range(i, i + 200))
    options = (
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": ((i, 2.0), (i + 7, -3.0))},
        {"temperature": 0.9, "top_k": 200, "top_p": 0.9, "repetition_penalty": 1.1, "output_ids": history},
        {"temperature": 0.9, "frequency_penalty": 0.3, "presence_penalty": 0.2, "output_ids": history},
        {"temperature": 1.2, "top_p": 0.5, "forbid_ids": (0, 1)},
        {"temperature": 1.0},
    )
    return DrawRow(seed=i, position=i, logprobs=20, **options[i % len(options)])  # type: ignore[arg-type]
