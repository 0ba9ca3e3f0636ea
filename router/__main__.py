"""The command line of a router process: flags to a RouterConfig, signals to a graceful stop, errors to one line."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announcement, Announcer, announce_to_file, set_up_logging
from biphase.router.config import RequestLimits, RouterConfig, Waits
from biphase.router.serve import serve

logger = logging.getLogger("biphase.router")


def make_parser() -> argparse.ArgumentParser:
    """All flags. Those left out take the defaults of RouterConfig, RequestLimits and Waits."""
    parser = argparse.ArgumentParser(
        prog="python -m biphase.router",
        description="One router of biphase: the front door of a deployment.",
        argument_default=argparse.SUPPRESS,
    )
    process = parser.add_argument_group("process")
    process.add_argument("--name", help="the router's name (default router-0)")
    process.add_argument("--incarnation", type=int, help="which life of the router")
    process.add_argument("--host", help="address to listen on")
    process.add_argument("--advertise-host", help="address that others connect to (default: --host)")
    process.add_argument("--port", type=int, help="0: any free one")
    process.add_argument("--announce", metavar="FILE", help="keep this process's state in FILE, as JSON")
    process.add_argument("--log-file", help="log here instead of to stderr")
    process.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])

    model = parser.add_argument_group("model and instances")
    model.add_argument("--model", required=True, help="GGUF file, Hugging Face directory, or hub name (its tokenizer)")
    model.add_argument("--served-model-name", help="what requests call the model (default: as the instances say)")
    model.add_argument("--controller", metavar="ADDRESS", help="whose membership to follow")
    model.add_argument("--prefill", action="append", metavar="ADDRESS", help="a prefill instance; may be repeated")
    model.add_argument("--decode", action="append", metavar="ADDRESS", help="a decode instance; may be repeated")
    model.add_argument("--mode", choices=["auto", "strict"], help="strict: decode instances never prefill")
    model.add_argument("--colocated", action="store_true", help="there is no prefill instance by design")
    model.add_argument("--local-prefill-max-tokens", type=int, help="auto: shorter prompts stay on the decode instance")

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-replays", type=int, help="a request that went down with more instances than this ends INTERNAL"
    )
    limits.add_argument(
        "--replay-share", type=float, help="of what the prefilling instances queue: for prompts prefilled again (0.5)"
    )
    limits.add_argument("--max-queued-requests", type=int)
    limits.add_argument("--max-queued-tokens", type=int)
    limits.add_argument("--default-max-tokens", type=int)
    limits.add_argument("--max-message-bytes", type=int)
    limits.add_argument("--max-buffered-tokens", type=int)
    limits.add_argument("--write-timeout-s", type=float, help="a client that takes nothing for this long is cut")

    waits = parser.add_argument_group("waits, in seconds")
    waits.add_argument(
        "--no-prefill-s", type=float, help="strict: from the last prefill instance's loss to UNAVAILABLE"
    )
    waits.add_argument(
        "--no-decode-s", type=float, help="how long a request without a deadline waits for a decode instance"
    )
    waits.add_argument("--silence-s", type=float, help="an instance that owes a token and says nothing is given up")
    waits.add_argument("--drain-s", type=float, help="how long live requests may go on after a stop")
    return parser


def parse(arguments: Sequence[str]) -> tuple[RouterConfig, argparse.Namespace]:
    """Flags as a config. Raises SetupError for values out of range; argparse exits for what it does not know."""
    flags = make_parser().parse_args(arguments)
    given = vars(flags)
    limits = {name: given[name] for name in RequestLimits.__dataclass_fields__ if name in given}
    waits = {name: given[name] for name in Waits.__dataclass_fields__ if name in given}
    names = RouterConfig.__dataclass_fields__.keys() - {"limits", "waits"}
    values = {name: given[name] for name in names if name in given}
    for name in ("prefill", "decode"):
        values[name] = tuple(values.get(name, ()))
    return RouterConfig(limits=RequestLimits(**limits), waits=Waits(**waits), **values), flags


def main(arguments: Sequence[str] | None = None) -> int:
    """A router process from flags to exit code: 0 stopped, 1 broken, 2 a set-up that cannot work (one line told)."""
    try:
        config, flags = parse(sys.argv[1:] if arguments is None else arguments)
        set_up_logging(Path(config.log_file) if config.log_file else None, getattr(flags, "log_level", "INFO"))
        first = Announcement(
            name=config.name,
            kind="router",
            incarnation=config.incarnation,
            pid=os.getpid(),
            log_file=config.log_file,
        )
        file = getattr(flags, "announce", None)
        announcer = Announcer(first, announce_to_file(Path(file)) if file else lambda announcement: None)
    except (SetupError, OSError) as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve_until_signal(config, announcer))
    except SetupError as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        logger.error("%s", one_line(error))
        announcer.update(state="failed", detail=one_line(error))
        return 2
    except Exception as error:
        logger.exception("%s broke", config.name)
        announcer.update(state="failed", detail=one_line(error))
        return 1
    return 0


async def _serve_until_signal(config: RouterConfig, announcer: Announcer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, announcer, stop)


if __name__ == "__main__":
    sys.exit(main())
