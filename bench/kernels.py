"""Every kernel's speed on a GPU, as a share of what the same run finds the device to do at best.

    python bench/kernels.py [--only WORD...] [--block-size TOKENS] [--json FILE] [--check] [--smoke]

Memory-bound kernels: bytes (each input and output once) over the copy bandwidth, buffers rotated past the cache.
Attention of prompts and experts: flops over the rate of an 8192^3 product. Small batches: microseconds in a graph.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import kernel_attention
import kernel_products
import kernel_streams
import report
import torch
from gpu_report import GpuReport
from gpu_timing import Ceilings
from kernel_case import Result, Sizes
from smoke import enter_smoke

Cases = Callable[[Sizes, Ceilings], Iterator[Result]]

GROUPS: dict[str, Cases] = {
    "streams": kernel_streams.cases,
    "decode": kernel_attention.decode_cases,
    "prefill": kernel_attention.prefill_cases,
    "experts": kernel_products.expert_cases,
    "sample": kernel_products.sample_cases,
}
UNITS = {"copy": "of copy", "matrix": "of matrix rate", "us": "us", "ratio": "x"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*GROUPS], default=[*GROUPS], help="groups of kernels")
    parser.add_argument("--block-size", type=int, choices=(16, 32, 64, 128), default=64, help="tokens per KV block")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, anywhere: tests this program, measures nothing"
    )
    report.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.smoke:
        enter_smoke()
    if not arguments.smoke and not torch.cuda.is_available():
        print("bench/kernels.py measures a GPU and torch finds none here (--smoke tests the program)", file=sys.stderr)
        return 2
    out = GpuReport(bench="kernels", columns=("kernel", "us", "value", "unit", "note"))
    ceilings = Ceilings.measure()
    for name, value, unit in ceilings.as_rows():
        out.row(name, "", value, unit, "ceiling")
    sizes = Sizes.tiny() if arguments.smoke else Sizes(block_size=arguments.block_size)
    groups = {name: partial(measure, GROUPS[name], sizes, ceilings, out) for name in arguments.only}
    out.run_groups(groups, arguments)
    return out.finish(arguments)


def measure(cases: Cases, sizes: Sizes, ceilings: Ceilings, out: GpuReport) -> None:
    for result in cases(sizes, ceilings):
        out.row(result.name, result.us, result.value, UNITS[result.kind], result.note)
        print(f"{result.name}: {result.value:.3f} {UNITS[result.kind]}", file=sys.stderr, flush=True)
        if result.bound is not None and not sizes.smoke:
            name = result.name.replace(" ", "-").replace(",", "")
            out.goal(name, result.value, result.bound, at_least=result.kind != "us")


if __name__ == "__main__":
    report.run(main)
