"""The figures of kernels compiled ahead of time, as JSON and as tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from aot_code import INSTRUCTIONS
from aot_jobs import Outcome

RESULTS = Path(__file__).resolve().parent / "results" / "aot"

_HEAD = ["variant", "kernel", "sm", "warps", "regs", "shared KiB", "spilled", *INSTRUCTIONS, ""]

ASSERTED = """
Asserted: 0 bytes spilled, shared memory within the GPU's, and, where the variant asks for it, that one of its kernels
loads 16 bytes at a time, loads asynchronously, uses the architecture's tensor cores. The other counts are for reading:
load_narrow counts lengths, indices and masked loads, and an empty load_16 is a failure only where a variant asks for it.
""".strip()

_ABOUT = """
`python bench/aot.py --write`: the machine code of every launch as production makes it, compiled without a GPU. Counts
are of instructions in the code, not of executions. `load_16`: 16-byte global loads into registers; `load_narrow`: others;
`cp_async_16`, `tma`: loads into shared memory; `mma_sync`, `wgmma`, `tcgen05`: tensor cores.
""".strip().splitlines()


def summary(outcomes: Sequence[Outcome], *, seconds: float) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "seconds": round(seconds, 1),
        "problems": sum(len(outcome.problems) for outcome in outcomes),
        "compiled": [row for outcome in outcomes for row in _records(outcome)],
        "refused": [
            {"variant": o.job.variant, "sm": o.job.capability, "message": o.refused} for o in outcomes if o.refused
        ],
    }


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [_HEAD, *(row for outcome in outcomes for row in _rows(outcome))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write(report: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "report.json").write_text(_one_row_a_line(report))
    lines = [
        "# Kernels compiled ahead of time",
        "",
        *_ABOUT,
        "",
        f"triton {report['triton']}; {_problems(report)}.",
        "",
    ]
    for op in dict.fromkeys(outcome.job.op for outcome in outcomes):
        rows = [row for outcome in outcomes if outcome.job.op == op for row in _rows(outcome)]
        lines += [f"## {op}", "", _markdown(_HEAD), _markdown(["---"] * len(_HEAD)), *map(_markdown, rows), ""]
    lines += [*ASSERTED.splitlines(), ""]
    (RESULTS / "README.md").write_text("\n".join(lines))


def _records(outcome: Outcome) -> list[dict[str, Any]]:
    job = outcome.job
    return [
        {
            "op": job.op,
            "variant": job.variant,
            "kernel": kernel.name,
            "sm": job.capability,
            "tuning": f"{job.device} {job.entry[0]} {job.entry[1]}" if job.entry else "default",
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "registers": kernel.code.registers,
            "shared_bytes": kernel.shared_bytes,
            "spilled_bytes": kernel.code.spilled_bytes,
            **kernel.code.instructions,
        }
        for kernel in outcome.kernels
    ]


def _rows(outcome: Outcome) -> list[list[str]]:
    job = outcome.job
    name, sm = (
        job.variant + (f" ({job.device} {job.entry[0]} {job.entry[1]})" if job.entry else ""),
        str(job.capability),
    )
    remark = "; ".join(outcome.problems) or ("refused" if outcome.refused else "")
    if not outcome.kernels:
        return [[name, "", sm, *[""] * (len(_HEAD) - 4), remark]]
    return [
        [
            name,
            kernel.name,
            sm,
            str(kernel.num_warps),
            str(kernel.code.registers),
            f"{kernel.shared_bytes / 1024:.1f}",
            str(kernel.code.spilled_bytes),
            *(str(count) if count else "" for count in kernel.code.instructions.values()),
            remark,
        ]
        for kernel in outcome.kernels
    ]


def _problems(report: dict[str, Any]) -> str:
    return f"{report['problems']} problems" if report["problems"] else "no spills, no other problem"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _one_row_a_line(report: dict[str, Any]) -> str:
    """A later report then differs by line."""
    head = {key: value for key, value in report.items() if not isinstance(value, list)}
    parts = [json.dumps(head, indent=1)[:-2]]
    for key, rows in ((key, value) for key, value in report.items() if isinstance(value, list)):
        parts.append(f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]")
    return ",\n".join(parts) + "\n}\n"
