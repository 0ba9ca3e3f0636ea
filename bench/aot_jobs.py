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

from aot_compile import KernelCode, check_code, check_same_kernels, compile_variant, for_target, keys_asked

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
    """One variant for one architecture; ``entry`` (key, settings) for settings other than the op's default."""

    kernels: Path
    op: str
    variant: str
    capability: int
    entry: tuple[str, tuple[tuple[str, int], ...]] | None = None
    device: str = ""

    def __str__(self) -> str:
        tuned = f" with the tuning table's {self.device} {self.entry[0]}" if self.entry else ""
        return f"{self.variant} on sm_{self.capability}{tuned}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``kernels``: what the variant launches; empty where it was refused, as it must be (``refused`` says how)."""

    job: Job
    kernels: tuple[KernelCode, ...] = ()
    refused: str = ""
    problems: tuple[str, ...] = field(default=())


def all_jobs(kernels: Path, capabilities: Sequence[int], *, ops: Iterable[str] | None, quick: bool) -> list[Job]:
    """Every variant with its op's defaults, then (unless ``quick``) every entry of the tuning table where it is asked for."""
    found = sorted(path.parent.name for path in kernels.glob("*/variants.py"))
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
        settings = {job.entry[0]: dict(job.entry[1])} if job.entry else {}
        with for_target(target, job.op, settings):
            kernels = compile_variant(variant)
            problems = [*check_code(variant, target, kernels), *check_same_kernels(variant)]
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
        with for_target(AOT_TARGETS[job.capability], job.op, {}):
            compile_variant(variant)
    except ValueError as error:
        said = str(error)
        wrong = () if needed in said and "\n" not in said else (f"refused without naming {needed} in one line: {said}",)
        return Outcome(job=job, refused=said, problems=wrong)
    return Outcome(job=job, problems=(f"not refused, though it needs {needed}",))


def _entry_jobs(kernels: Path, ops: Sequence[str], capabilities: Sequence[int]) -> list[Job]:
    jobs = []
    for device, by_op in table().items():
        capability = _capability(device)
        for op in (op for op in ops if op in by_op and capability in capabilities):
            asked = {v.name: keys_asked(v, AOT_TARGETS[capability], op) for v in load(kernels, op).variants()}
            for key, settings in by_op[op].items():
                users = [name for name, keys in asked.items() if key in keys]
                if not users:
                    raise SystemExit(f"tuning table, {device}, {op}: no variant asks for {key!r}")
                jobs += [_entry_job(kernels, op, name, capability, key, settings, device) for name in users]
    return jobs


def _entry_job(kernels: Path, op: str, variant: str, capability: int, key: str, settings: Settings, device: str) -> Job:
    entry = (key, tuple(settings.items()))
    return Job(kernels=kernels, op=op, variant=variant, capability=capability, entry=entry, device=device)


def _capability(device: str) -> int:
    if device.startswith("sm_"):
        return int(device.removeprefix("sm_"))
    for name, capability in _CAPABILITIES.items():
        if name in device:
            return capability
    raise SystemExit(f"tuning table: the capability of {device!r} is not known to bench/aot_jobs.py")


def _pool(num_processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
