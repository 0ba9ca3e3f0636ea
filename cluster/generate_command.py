"""`biphase generate`: one prompt, its answer streamed to the terminal."""

import argparse
import math
import os
import sys
from typing import Any

from biphase.client import Client, Result
from biphase.client.failures import NOTHING_LISTENS
from biphase.cluster.run_dir import served
from biphase.cluster.status_command import chosen
from biphase.protos.errors import SetupError, Unavailable

_SAMPLES = {"temperature", "top_p", "top_k", "min_p", "seed"}
"""With any of these the server samples as asked; without, `generate` is greedy."""

_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def generate(arguments: argparse.Namespace) -> int:
    """Returns 0, or 130 after Ctrl-C, which ends the request on the server."""
    if arguments.system and arguments.raw:
        raise SetupError("--system is for chat and --raw sends plain text: give one of them")
    if arguments.timeout is not None and not 0 < arguments.timeout < math.inf:
        raise SetupError(f"--timeout is {arguments.timeout:g}: a finite number of seconds above 0 is needed")
    prompt = _prompt(arguments.prompt)
    options = options_of(arguments)
    address = _address(arguments)
    try:
        return _answer(arguments, address, prompt, options)
    except Unavailable as error:
        if address is not None or os.environ.get("BIPHASE_ADDRESS") or NOTHING_LISTENS not in str(error):
            raise
        raise SetupError("no deployment is running; `biphase serve` starts one") from error


def _answer(arguments: argparse.Namespace, address: str | None, prompt: str, options: dict[str, Any]) -> int:
    with Client(address) as client:
        as_chat = arguments.chat or bool(arguments.system)
        if not as_chat and not arguments.raw:
            as_chat = client.model_info().has_chat_template
        if as_chat:
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            messages = [*system, {"role": "user", "content": prompt}]
            generation = client.generate(messages=messages, timeout_s=arguments.timeout, **options)
        else:
            generation = client.generate(prompt, timeout_s=arguments.timeout, **options)
        with generation:
            printed = False
            try:
                for delta in generation:
                    print(delta.text, end="", flush=True)
                    printed = printed or bool(delta.text)
            finally:
                if printed:
                    print(flush=True)
        if arguments.stats:
            _print_stats(generation.result)
    return 0


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask of the server: greedy unless a flag says how to sample."""
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None
    }
    if not _SAMPLES & options.keys():
        options["temperature"] = 0.0  # a small model's first answers read better so
    if arguments.ignore_eos:
        options["ignore_eos"] = True
    return options


def _prompt(given: str) -> str:
    prompt = _read_stdin() if given == "-" else given
    if not prompt.strip():
        raise SetupError("the prompt is empty" + (" (read from standard input)" if given == "-" else ""))
    return prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SetupError(f"standard input is not UTF-8 at byte {error.start}") from error


def _address(arguments: argparse.Namespace) -> str | None:
    """The router meant; None leaves it to the client's default."""
    if arguments.address:
        return str(arguments.address)
    if arguments.name is None and (os.environ.get("BIPHASE_ADDRESS") or not served()):
        return None
    _, record = chosen(arguments.name)
    if not record.router_address:
        raise SetupError(f"deployment {record.name} is not ready yet ({record.state})")
    return record.router_address


def _print_stats(result: Result) -> None:
    """Where the time went, on stderr: the answer alone stays on stdout."""
    from rich.console import Console
    from rich.table import Table

    timeline, usage = result.timeline, result.usage
    rows = [
        ("way", f"{result.decision} ({result.decision_reason})"),
        ("prefilled by", result.prefill_instance),
        ("decoded by", result.decode_instance),
        ("tokens", f"{usage.prompt_tokens} prompt, {usage.output_tokens} output, {usage.cached_tokens} cached"),
        ("ended by", f"{result.finish_reason.value} {result.stop_reason}".strip()),
        ("seed", str(result.seed)),
        ("TTFT", f"{result.ttft_ms:.1f} ms"),
        ("TPOT", f"{result.tpot_ms:.2f} ms"),
        ("queue", f"{timeline.queue_ms:.1f} ms router, {timeline.prefill_queue_ms:.1f} ms instance"),
        ("prefill", f"{timeline.prefill_ms:.1f} ms"),
        ("KV handoff", f"{timeline.transfer_bytes} bytes in {timeline.transfer_ms:.1f} ms"),
        ("of it exposed", f"{timeline.transfer_exposed_ms:.1f} ms"),
        ("decode", f"{timeline.decode_ms:.1f} ms"),
        ("preemptions", str(timeline.preemptions)),
        ("replays", str(result.replays)),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    Console(stderr=True, highlight=False, markup=False).print(table)
