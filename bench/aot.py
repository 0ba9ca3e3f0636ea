"""Compiles every kernel for every architecture without a GPU, and checks the machine code.

    python bench/aot.py [--quick] [--targets 80 89 90 100] [--op OP...] [--jobs 2] [--cache DIR] [--json FILE] [--write]

What is compiled: each variant of each ``kernels/<op>/variants.py``, through the op's launcher with its default settings,
as production specialises it, and each entry of the tuning table on the variants that ask for it. What is checked: 0 bytes
spilled, shared memory within the target's, the variant's traits; that GPUs below a variant's capability are refused; that
another step of the same model compiles nothing. Exit code 1 if anything fails. ``--write`` puts the table under
bench/results/aot/. ``--cache DIR`` keeps what was compiled (Triton's own cache), so that a later run is fast.

Columns: warps; registers of a thread; shared memory of a program; bytes spilled; then instructions in the code, not
executions, empty for none. load_16: 16-byte global loads into registers; load_narrow: narrower ones; store_16: 16-byte
stores; cp_async_16 and tma: loads into shared memory; mma_sync, wgmma and tcgen05: tensor cores. Bounds: spilled is 0,
shared is within the target's. Of the instructions only a variant's traits are asked, of any one of its kernels:
wide_loads (load_16, cp_async_16 or tma above 0), async_loads (cp_async_16 or tma), mma_wide (mma_sync on sm_80 and sm_89,
wgmma on sm_90, tcgen05 on sm_100), mma_sync. Any other count may be what it is: load_narrow takes in single values, such
as a length, an index or a scale, and loads under a mask that the compiler may not widen.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# read when triton is imported, here and in the workers
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import aot_report
from aot_jobs import KERNELS, all_jobs, entries_nobody_asks_for, known_ops, run_jobs

TARGETS = (80, 89, 90, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the variants marked quick")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--op", nargs="+", help="only these folders of kernels/")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="the folder that holds <op>/variants.py")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cache", type=Path, help="Triton's cache folder (default: one that is thrown away)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--write", action="store_true", help="write Markdown and JSON under bench/results/aot/")
    arguments = parser.parse_args()
    known = known_ops(arguments.kernels)
    unknown = [op for op in arguments.op or [] if op not in known]
    if unknown:
        print(f"aot.py: no op {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as throwaway:
        os.environ["TRITON_CACHE_DIR"] = str(arguments.cache or throwaway)
        jobs = all_jobs(arguments.kernels, arguments.targets, ops=arguments.op, quick=arguments.quick)
        outcomes = run_jobs(jobs, arguments.jobs)
    report = aot_report.summary(outcomes, seconds=time.monotonic() - began_s)
    print(aot_report.table(outcomes))
    print("columns, and which of them are asserted: --help")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.write:
        aot_report.write(report, outcomes)
    problems = [f"{outcome.job}: {problem}" for outcome in outcomes for problem in outcome.problems]
    if arguments.op is None and arguments.kernels == KERNELS:
        problems += [f"tuning table: no variant asks for {entry}" for entry in entries_nobody_asks_for(KERNELS)]
    for problem in problems:
        print(f"FAILED {problem}")
    print(
        f"{len(outcomes)} compiled or refused, {len(problems)} problems, {report['seconds']} s, triton {report['triton']}"
    )
    return 1 if problems or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
