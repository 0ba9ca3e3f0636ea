"""What is to be compiled ahead of time, and a pool of processes that compiles it."""

import contextlib
import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from aot_compile import (
    KernelCode,
    Key,
    check_code,
    check_one_version,
    compile_variant,
    for_target,
    keys_asked,
    settings_launched,
)

from biphase.kernels.gpu.target import AOT_TARGETS
from biphase.kernels.gpu.tuning import Settings, table
from biphase.kernels.gpu.variant import Variant

KERNELS = Path(__file__).resolve().parents[1] / "kernels"

_CAPABILITIES = {
    "A100": 80,
    "A800": 80,
    "L40": 89,
    "L4": 89,
    "H100": 90,
    "H200": 90,
    "H800": 90,
    "H20": 90,
    "B200": 100,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One variant for one architecture; ``entry``: in the tuning table, (op, key), for settings other than the default."""

    kernels: Path
    op: str
    variant: str
    capability: int
    entry: Key | None = None
    device: str = ""

    @property
    def settings(self) -> dict[Key, Settings]:
        return {self.entry: table()[self.device][self.entry[0]][self.entry[1]]} if self.entry else {}

    def __str__(self) -> str:
        tuned = f" with the tuning table's {self.device} {self.entry[0]} {self.entry[1]}" if self.entry else ""
        return f"{self.variant} on sm_{self.capability}{tuned}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``kernels``: what the variant launches; empty where it was refused, as it must be (``refused`` says how)."""

    job: Job
    kernels: tuple[KernelCode, ...] = ()
    refused: str = ""
    problems: tuple[str, ...] = field(default=())


def known_ops(kernels: Path) -> list[str]:
    """Its folders with variants."""
    return sorted(path.parent.name for path in kernels.glob("*/variants.py"))


def all_jobs(kernels: Path, capabilities: Sequence[int], *, ops: Iterable[str] | None, quick: bool) -> list[Job]:
    """Every variant with its op's defaults, then (unless ``quick``) every entry of the tuning table where it is asked for."""
    found = known_ops(kernels)
    jobs: list[Job] = []
    for op in found if ops is None else ops:
        for variant in load(kernels, op).variants():
            if variant.quick or not quick:
                jobs += [Job(kernels=kernels, op=op, variant=variant.name, capability=c) for c in capabilities]
    if not quick:
        jobs += _entry_jobs(kernels, [op for op in found if ops is None or op in ops], capabilities)
    return jobs


def run_jobs(jobs: Sequence[Job], num_processes: int) -> list[Outcome]:
    """In the order of ``jobs``. One that kills its process is named, and the others go on."""
    outcomes: dict[Job, Outcome] = {}
    with _pool(num_processes) as pool:
        futures = {job: pool.submit(run_job, job) for job in jobs}
        for job, future in futures.items():
            with contextlib.suppress(BrokenProcessPool):
                outcomes[job] = future.result()
    for job in jobs:
        if job not in outcomes:
            with _pool(1) as pool:
                try:
                    outcomes[job] = pool.submit(run_job, job).result()
                except BrokenProcessPool:
                    outcomes[job] = Outcome(job=job, problems=("the compiler died",))
    return [outcomes[job] for job in jobs]


def run_job(job: Job) -> Outcome:
    try:
        variant = _variant(job)
        target = AOT_TARGETS[job.capability]
        if job.capability < variant.min_capability:
            return _refusal(job, variant)
        with for_target(target, job.settings):
            kernels = compile_variant(variant)
            problems = [*check_code(variant, target, kernels), *check_one_version(variant)]
        return Outcome(job=job, kernels=tuple(kernels), problems=tuple(problems))
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile is one row of the report
        return Outcome(job=job, problems=(f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}",))


def load(kernels: Path, op: str) -> ModuleType:
    """``kernels/<op>/variants.py``, by its package where it is biphase's own."""
    if kernels == KERNELS:
        return importlib.import_module(f"biphase.kernels.{op}.variants")
    name = f"aot_{op}_variants"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, kernels / op / "variants.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _variant(job: Job) -> Variant:
    return next(v for v in load(job.kernels, job.op).variants() if v.name == job.variant)


def _refusal(job: Job, variant: Variant) -> Outcome:
    needed = "{}.{}".format(*divmod(variant.min_capability, 10))
    try:
        with for_target(AOT_TARGETS[job.capability], {}):
            compile_variant(variant)
    except ValueError as error:
        said = str(error)
        wrong = () if needed in said and "\n" not in said else (f"refused without naming {needed} in one line: {said}",)
        return Outcome(job=job, refused=said, problems=wrong)
    return Outcome(job=job, problems=(f"not refused, though it needs {needed}",))


def _entry_jobs(kernels: Path, folders: Sequence[str], capabilities: Sequence[int]) -> list[Job]:
    """Entries that give a launch what its op's default would have given need no job of their own."""
    variants = [(folder, variant) for folder in folders for variant in load(kernels, folder).variants()]
    jobs = []
    for device in (name for name in table() if _capability(name) in capabilities):
        target = AOT_TARGETS[_capability(device)]
        for folder, variant in variants:
            for entry in sorted(keys_asked(variant, target)):
                if entry[1] in table()[device].get(entry[0], {}):
                    job = Job(
                        kernels=kernels,
                        op=folder,
                        variant=variant.name,
                        capability=target.capability,
                        entry=entry,
                        device=device,
                    )
                    if settings_launched(variant, target, job.settings) != settings_launched(variant, target, {}):
                        jobs.append(job)
    return jobs


def entries_nobody_asks_for(kernels: Path) -> list[str]:
    """Of the tuning table: keys that no variant of an op looks up, so that they are never compiled ahead of time."""
    variants = [variant for op in known_ops(kernels) for variant in load(kernels, op).variants()]
    wrong = []
    for device, by_op in table().items():
        target = AOT_TARGETS[_capability(device)]
        asked = set().union(*(keys_asked(variant, target) for variant in variants))
        wrong += [f"{device} {op} {key}" for op, keys in by_op.items() for key in keys if (op, key) not in asked]
    return wrong


def _capability(device: str) -> int:
    if device.startswith("sm_"):
        return int(device.removeprefix("sm_"))
    for name, capability in _CAPABILITIES.items():
        if name in device:
            return capability
    raise SystemExit(f"tuning table: the capability of {device!r} is not known to bench/aot_jobs.py")


def _pool(num_processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
