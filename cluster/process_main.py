"""The entry of every process of the process backend: `python -m biphase.cluster.process_main SPEC ANNOUNCE`.

SIGTERM and SIGINT ask for a graceful end. When the supervisor dies, however it dies, so does this process.
"""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.process_runner import run_process
from biphase.protos.process import announce_to_file, leave, set_up_logging

SUPERVISOR_VARIABLE = "BIPHASE_SUPERVISOR_PID"
logger = logging.getLogger("biphase.cluster.process")


def main() -> int:
    spec = ProcessSpec.from_json(Path(sys.argv[1]).read_text())
    set_up_logging(spec.log_file)
    return asyncio.run(_main(spec, Path(sys.argv[2])))


async def _main(spec: ProcessSpec, announce_file: Path) -> int:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _follow_supervisor(spec)
    return await run_process(spec, announce_to_file(announce_file), stop)


def _follow_supervisor(spec: ProcessSpec) -> None:
    """End at once when the supervisor is gone: nobody would restart, watch or stop this process any more."""
    pid = os.environ.get(SUPERVISOR_VARIABLE)
    if not pid:
        return

    def die() -> None:
        logger.error("%s: the supervisor (pid %s) is gone, ending", spec.name, pid)
        os._exit(3)

    try:
        asyncio.get_running_loop().add_reader(os.pidfd_open(int(pid)), die)
    except ProcessLookupError:
        die()


if __name__ == "__main__":
    leave(main())
