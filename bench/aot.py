"""Compiles every kernel for every architecture without a GPU, and checks the machine code.

    python bench/aot.py [--quick] [--targets 80 89 90 100] [--op OP...] [--jobs 2] [--cache DIR] [--json FILE] [--write]

What is compiled: each variant of each ``kernels/<op>/variants.py``, through the op's launcher with its default settings,
as production specialises it, and each entry of the tuning table on the variants that ask for it. What is checked: 0 bytes
spilled, shared memory within the target's, the variant's traits; that GPUs below a variant's capability are refused; that
another step of the same model compiles nothing. Exit code 1 if anything fails. ``--write`` puts the table under
bench/results/aot/. ``--cache DIR`` keeps what was compiled (Triton's own cache), so that a later run is fast.
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
from aot_jobs import KERNELS, all_jobs, entries_nobody_asks_for, run_jobs

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
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as throwaway:
        os.environ["TRITON_CACHE_DIR"] = str(arguments.cache or throwaway)
        jobs = all_jobs(arguments.kernels, arguments.targets, ops=arguments.op, quick=arguments.quick)
        outcomes = run_jobs(jobs, arguments.jobs)
    report = aot_report.summary(outcomes, seconds=time.monotonic() - began_s)
    print(aot_report.table(outcomes))
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
