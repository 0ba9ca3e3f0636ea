#!/usr/bin/env python3
"""Writes the tuning table of the Triton kernels, kernels/gpu/tuning_table.json.

    python scripts/tune_kernels.py [--op OP...] [--budget-s 60]   on a GPU: measures each op's candidates, writes the best
    python scripts/tune_kernels.py --dry-run [--target 90]        lists what would be measured; needs no GPU
    python scripts/tune_kernels.py --defaults                     the ops' own settings for every architecture; needs no GPU

Ops without settings (embed, linear, ...) are not tuned; --op of another name lists those that are.

A shape class is measured on up to two workloads; its best candidate has the least geometric mean of its times, each
relative to the default's. ``measured`` in the table says of each op how its entries were found. Measured entries belong
to the GPU's name, defaults to its architecture, which is asked second; ``--defaults`` leaves measured ones alone. After
either run ``python bench/aot.py`` (compiles every entry) and the kernel tests.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from gpu_timing import copies_for, median_us
from tune_ops import TunedOp, defaults, recording, trying, tuned_ops, variant_keys
from tune_workloads import Workload, workloads

from biphase.kernels.gpu.launch import launching_instead
from biphase.kernels.gpu.target import AOT_TARGETS, Target, target_of
from biphase.kernels.gpu.tuning import TABLE, Settings

NOT_MEASURED = "not measured: ahead-of-time defaults"
_LEAST_GAIN = 0.99
"""A candidate replaces the default only if it takes less than this of its time: the rest is noise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(tuned_ops())
    parser.add_argument(
        "--op", nargs="+", help=f"only these (default: all that have settings; others are not tuned): {known}"
    )
    parser.add_argument("--budget-s", type=float, default=60, help="seconds for one shape class (default: 60)")
    parser.add_argument("--dry-run", action="store_true", help="list the shape classes and their candidates")
    parser.add_argument("--target", type=int, default=90, choices=AOT_TARGETS, help="of --dry-run without a GPU")
    parser.add_argument("--defaults", action="store_true", help="write the ops' own settings instead of measuring")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file (default: the one in the tree)")
    arguments = parser.parse_args()
    others = [name for name in arguments.op or [] if name not in tuned_ops()]
    if others:
        print(
            f"tune_kernels.py: no settings under the name {', '.join(others)}, and ops without settings are not tuned; "
            f"tuned are: {known}",
            file=sys.stderr,
        )
        return 2
    ops = [op for name, op in tuned_ops().items() if arguments.op is None or name in arguments.op]
    if arguments.defaults:
        before = entries(arguments.table)
        write_defaults(arguments.table, ops)
        print(f"wrote {arguments.table}: {changes(before, entries(arguments.table))}")
        return 0
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.dry_run:
        print(
            "tune_kernels.py: no GPU here, so nothing to measure; --dry-run and --defaults need none", file=sys.stderr
        )
        return 2
    device = torch.device("cuda" if on_gpu else "cpu")
    target = target_of(device) if on_gpu else AOT_TARGETS[arguments.target]
    if arguments.dry_run:
        list_work(ops, target)
        return 0
    before = entries(arguments.table)
    for op in ops:
        cases = [w for w in workloads(device, target.capability) if w.op == op.name]
        for key, users in by_key(op, cases).items():
            best, how = measure(op, target, key, users, arguments.budget_s)
            put(arguments.table, target.name, op.name, {key: best}, how)
    print(f"wrote {arguments.table}: {changes(before, entries(arguments.table))}")
    return 0


def entries(path: Path) -> dict[tuple[str, str, str], Settings]:
    """Of a table: (GPU or sm_NN, op, shape class) -> settings."""
    found = json.loads(path.read_text())["settings"] if path.exists() else {}
    return {(d, op, key): value for d, ops in found.items() for op, keys in ops.items() for key, value in keys.items()}


def changes(before: dict[tuple[str, str, str], Settings], after: dict[tuple[str, str, str], Settings]) -> str:
    new, gone = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    changed = sum(before[entry] != after[entry] for entry in before.keys() & after.keys())
    return f"{len(after)} entries, of which {changed} changed and {new} are new; {gone} removed"


def write_defaults(path: Path, ops: list[TunedOp]) -> None:
    for target in AOT_TARGETS.values():
        found = defaults(target)
        for op in ops:
            put(path, f"sm_{target.capability}", op.name, found[op.name], NOT_MEASURED, replace=True)


def list_work(ops: list[TunedOp], target: Target) -> None:
    """Names only: laying out the buffers would take the GPU's memory."""
    total = 0
    for op in ops:
        print(f"{op.name} on {target.name}")
        for key in sorted(variant_keys(op, target)):
            count = len(op.candidates(target, key))
            total += count
            print(f"  {key}: {count} candidates, default {op.default(target, key)}")
    names = [f"  {w.op}: {w.name}" for w in workloads(torch.device("cpu"), target.capability) if w.op in _names(ops)]
    print("measured on the shape classes of\n" + "\n".join(names))
    print(f"{total} candidates in all; a shape class without a workload keeps its default")


def by_key(op: TunedOp, cases: list[Workload]) -> dict[str, list[Workload]]:
    """The workloads of each shape class, as the launcher names it."""
    found: dict[str, list[Workload]] = defaultdict(list)
    for case in cases:
        keys: set[str] = set()
        with recording(op.name, keys), launching_instead(lambda *_: None):
            case.make()()
        for key in keys:
            found[key].append(case)
    return found


def measure(op: TunedOp, target: Target, key: str, users: list[Workload], budget_s: float) -> tuple[Settings, str]:
    """The best settings, and how they were found, in words. What does not compile or run is passed over."""
    default = op.default(target, key)
    others = [c for c in op.candidates(target, key) if c != default]
    random.Random(0).shuffle(others)  # where the budget ends early, what was measured is spread over all
    candidates = [default, *others]
    until_s, relative = time.monotonic() + budget_s, dict[int, float]()
    reference = times(op, key, default, users)
    for index, settings in enumerate(candidates):
        if index and time.monotonic() > until_s:
            break
        try:
            taken = reference if index == 0 else times(op, key, settings, users)
        except Exception as error:  # noqa: BLE001 - too much shared memory, too many registers: one candidate less
            print(f"{op.name} {key}: {settings} left out, {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        ratios = [one / before for one, before in zip(taken, reference, strict=True)]
        relative[index] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    best = min(relative, key=lambda index: relative[index])
    if relative[best] > _LEAST_GAIN:
        best = 0
    how = f"measured: {len(relative)} of {len(candidates)} candidates"
    print(f"{op.name} {key}: {candidates[best]}, {relative[best]:.3f} of the default's time; {how}", flush=True)
    return candidates[best], how


def times(op: TunedOp, key: str, settings: Settings, users: list[Workload]) -> list[float]:
    """Microseconds on each workload, from a cold cache."""
    found = []
    with trying(op.name, key, settings):
        for case in users:
            calls = [case.make() for _ in range(copies_for(case.num_bytes))]
            found.append(median_us(calls))
            del calls
            torch.cuda.empty_cache()
    return found


def put(path: Path, device: str, op: str, entries: dict[str, Settings], how: str, *, replace: bool = False) -> None:
    """Into the table, at once: a run that is cut short keeps what it has found."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": {}, "measured": {}}
    before = {} if replace else table["settings"].get(device, {}).get(op, {})
    table["settings"].setdefault(device, {})[op] = dict(sorted((before | entries).items()))
    how = how if how == NOT_MEASURED else f"{how}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
    table["measured"].setdefault(device, {})[op] = how
    ordered = {part: _sorted(table[part]) for part in ("measured", "settings")}
    path.write_text(_text({"about": _ABOUT, **ordered}))


_ABOUT = (
    "Launch settings by GPU (or sm_NN), op and shape class. measured: how each was found. See scripts/tune_kernels.py."
)


def _sorted(by_device: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {device: dict(sorted(ops.items())) for device, ops in sorted(by_device.items())}


def _text(table: dict[str, Any]) -> str:
    """JSON with one line for each set of settings."""
    lines = json.dumps(table, indent=1).split("\n")
    joined, deepest = "", 5
    for line in lines:
        depth = len(line) - len(line.lstrip())
        joined += (
            f" {line.strip()}" if depth >= deepest or depth == deepest - 1 and line.strip()[0] == "}" else f"\n{line}"
        )
    return joined.strip() + "\n"


def _names(ops: list[TunedOp]) -> set[str]:
    return {op.name for op in ops}


if __name__ == "__main__":
    sys.exit(main())
