"""One variant compiled under a driver that only names its GPU: what Triton made of it, and whether that is as it must be."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from aot_code import MachineCode, read_code
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from biphase.kernels.gpu.launch import compiling_only, launching_instead
from biphase.kernels.gpu.target import Target, compiling_for
from biphase.kernels.gpu.tuning import Settings, answering
from biphase.kernels.gpu.variant import Variant

Key = tuple[str, str]
"""In the tuning table: an op's name and a shape class of it."""

LAUNCHERS = "BIPHASE_AOT_LAUNCHERS"
"""In the environment: build launchers as well, for a cache that a GPU of this machine will use."""

_FIXED_BY_MODEL = ("_stride", "_size")
"""Endings of arguments that may be specialised."""

_WIDE_MMA = {80: "mma_sync", 89: "mma_sync", 90: "wgmma", 100: "tcgen05"}
TRAITS = frozenset({"wide_loads", "async_loads", "mma_wide", "mma_sync"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCode:
    """One kernel of a variant, compiled. ``shared_bytes``: static and dynamic, of one program."""

    name: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    code: MachineCode


class NamedGpu:
    """A driver for compiling alone. The device is another for each capability, or a kernel compiled for one were another's."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def for_target(target: Target, settings: dict[Key, Settings]) -> Iterator[None]:
    """``settings`` speak for the tuning table; where they have nothing, the ops' defaults do."""
    driver.set_active(NamedGpu(target.capability))
    with compiling_for(target), answering(lambda op, _, key: settings.get((op, key))):
        yield


def compile_variant(variant: Variant) -> list[KernelCode]:
    """Each kernel that the variant launches, once."""
    triton.knobs.nvidia.dump_ptxas_log = True  # printed where it really compiles, not where the cache has it
    found: dict[str, KernelCode] = {}
    log = io.StringIO()

    def on_compiled(kernel: Any, compiled: Any) -> None:
        if compiled.hash not in found:
            found[compiled.hash] = _kernel_code(compiled, log.getvalue())
            if os.environ.get(LAUNCHERS) == "1":
                build_launcher(compiled)
        log.truncate(0)

    with contextlib.redirect_stdout(log), compiling_only(on_compiled):
        variant.run()
    return list(found.values())


def build_launcher(compiled: Any) -> None:
    """What hands a kernel's arguments over is C, in the oldest supported triton compiled for each signature: a second or
    so at a kernel's first launch, unless Triton's cache has it. It is built against the GPU's driver library."""
    from triton.backends.nvidia import driver as of_nvidia

    if hasattr(of_nvidia, "make_launcher"):
        of_nvidia.CudaLauncher(compiled.src, compiled.metadata)


def check_code(variant: Variant, target: Target, kernels: list[KernelCode]) -> list[str]:
    problems = []
    if not kernels:
        problems.append("launches no kernel")
    for kernel in kernels:
        if kernel.code.spilled_bytes or kernel.code.local_bytes:
            spilled = f"{kernel.code.spilled_bytes} bytes spilled, {kernel.code.local_bytes} of local memory"
            problems.append(f"{kernel.name}: {spilled}")
        if kernel.shared_bytes > target.shared_bytes:
            problems.append(
                f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}"
            )
    for trait in sorted(variant.traits):
        if not any(_has(trait, target.capability, kernel.code) for kernel in kernels):
            problems.append(f"no kernel shows {trait}")
    return problems


def _has(trait: str, capability: int, code: MachineCode) -> bool:
    count = code.instructions
    wide = count["load_16"] + count["cp_async_16"] + count["tma"] > 0
    match trait:
        case "wide_loads":
            return wide
        case "async_loads":
            return wide and count["cp_async_16"] + count["tma"] > 0
        case "mma_wide":
            return count[_WIDE_MMA[capability]] > 0
        case "mma_sync":
            return count["mma_sync"] > 0
    raise ValueError(f"trait {trait!r} is not one of {', '.join(sorted(TRAITS))}")


def check_one_version(variant: Variant) -> list[str]:
    """Another step of the same model must find its kernels compiled: integers that a model does not fix are not among
    what Triton tells versions apart by (it asks of each whether it is 1 or a multiple of 16)."""
    before, specialised = _versions(variant.run)
    problems = [
        f"{kernel}: {name} is specialised; name it in do_not_specialize, or ...{' or ...'.join(_FIXED_BY_MODEL)} if the "
        "model fixes it"
        for kernel, name in sorted(specialised)
        if not name.endswith(_FIXED_BY_MODEL)
    ]
    if variant.other_step is not None:
        after, _ = _versions(variant.other_step)
        problems += [f"another step compiles anew: {kernel} {what}" for kernel, what in sorted(after - before)]
    return problems


def _versions(run: Callable[[], None]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Of each launch: (kernel, what tells its compiled versions apart), and (kernel, integer argument that does)."""
    versions: set[tuple[str, str]] = set()
    integers: set[tuple[str, str]] = set()

    def record(kernel: Any, grid: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        *_, binder = kernel.device_caches[driver.active.get_current_device()]
        bound, specialization, options = binder(*args, debug=False, **settings)
        versions.add((kernel.__name__, f"{specialization} {options}"))
        for parameter in kernel.params:
            if type(bound[parameter.name]) is int and not (parameter.is_constexpr or parameter.do_not_specialize):
                integers.add((kernel.__name__, parameter.name))

    with launching_instead(record):
        run()
    return versions, integers


def keys_asked(variant: Variant, target: Target) -> set[Key]:
    """What the variant's launchers look up in the tuning table."""
    keys: set[Key] = set()
    if target.capability >= variant.min_capability:
        with (
            compiling_for(target),
            answering(lambda op, _, key: keys.add((op, key))),
            launching_instead(lambda *_: None),
        ):
            variant.run()
    return keys


def settings_launched(variant: Variant, target: Target, settings: dict[Key, Settings]) -> list[str]:
    """Constexprs and options of each launch: where they are the default's, so is the code."""
    launched: list[str] = []
    with for_target(target, settings), launching_instead(lambda kernel, _, __, given: launched.append(f"{given}")):
        variant.run()
    return launched


def _kernel_code(compiled: Any, log: str) -> KernelCode:
    metadata = compiled.metadata
    return KernelCode(
        name=metadata.name,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        code=read_code(compiled.asm["cubin"], compiled.asm["ptx"], log),
    )
