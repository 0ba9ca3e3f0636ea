"""What a compiled kernel needs and holds: its binary through the tools that Triton brings, its instructions from the PTX
(where the ones of interest stand as they will run, and in a hundredth of a disassembler's time)."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

INSTRUCTIONS = {
    "load_16": r"ld\.global[\w.:]*\.(?:v4\.[bfus](?:32|64)|v2\.[bfus]64|v8\.[bfus](?:16|32))\b",
    "load_narrow": r"ld\.global[\w.:]*\.(?:[bfus]\d+|v2\.[bfus](?:8|16|32)|v4\.[bfus](?:8|16))\b",
    "store_16": r"st\.global[\w.:]*\.(?:v4\.[bfus](?:32|64)|v2\.[bfus]64|v8\.[bfus](?:16|32))\b",
    "cp_async_16": r"cp\.async\.c[ag]\.shared[\w.:]*\.global[\w.:]* [^;]*?\], (?:0x10|16)\b",
    "tma": r"cp\.async\.bulk\.tensor\.\dd[\w.:]*\.shared::\w+\.global",
    "mma_sync": r"(?<!wg)mma\.sync\.aligned",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
}
"""In PTX: 16-byte global loads into registers, narrower ones, 16-byte stores, cp.async, TMA loads, tensor cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """``spilled_bytes``: stores and loads together, as ptxas says; ``local_bytes``: stack and local memory."""

    registers: int
    spilled_bytes: int
    local_bytes: int
    instructions: dict[str, int]


def read_code(cubin: bytes, ptx: str, ptxas_log: str) -> MachineCode:
    """``ptxas_log``: empty where the kernel was compiled before; then the stack, which holds the spills, speaks for them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says: {usage[:200]}")
    registers, stack, local = map(int, found.groups())
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)]
    return MachineCode(
        registers=registers,
        spilled_bytes=sum(spills) if spills else stack,
        local_bytes=stack + local,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )
