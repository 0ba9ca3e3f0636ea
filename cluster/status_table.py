"""A deployment's status as people read it: a headline, a table of its processes, transports, decisions, warnings."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from biphase.cluster.events_command import line_of

COLUMNS = (
    *("process", "role", "state", "health", "plan", "node", "load", "pid", "incarnation", "device", "threads"),
    *("KV memory", "restarts", "generation", "address", "log"),
)
LEFT_OUT = ("log", "threads", "restarts", "KV memory", "device", "generation", "address", "pid")
"""What a narrow terminal does not show, in this order."""
GAP = 2


def print_status(console: Any, seen: Any, supervisor_pid: int | None, run_dir: Path | None) -> None:
    """``console``: rich's; ``seen``: a ClusterStatus."""
    from rich.table import Table

    for line in headlines(seen, supervisor_pid):
        console.print(line, markup=False)
    rows = [row_of(process, run_dir) for process in seen.processes]
    shown = columns_within(console.width, rows)
    table = Table(box=None, pad_edge=False)
    for index in shown:
        table.add_column(COLUMNS[index], overflow="fold")
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    console.print(table)
    if len(shown) < len(COLUMNS):
        missing = ", ".join(name for index, name in enumerate(COLUMNS) if index not in shown)
        console.print(f"no room for {missing}: `--json`, or a wider terminal", markup=False)
    for line in tail_lines(seen, run_dir):
        console.print(line, markup=False)


def columns_within(width: int, rows: Sequence[Sequence[str]]) -> list[int]:
    """Which columns are shown so that no cell is folded: all but as many of LEFT_OUT as there must be."""
    widths = [max(len(cell) for cell in column) for column in zip(COLUMNS, *rows, strict=True)]
    shown = list(range(len(COLUMNS)))
    for name in LEFT_OUT:
        if sum(widths[index] for index in shown) + GAP * (len(shown) - 1) <= width:
            break
        shown.remove(COLUMNS.index(name))
    return shown


def headlines(seen: Any, supervisor_pid: int | None) -> Iterator[str]:
    routers = ", ".join(seen.router_addresses) or "no router yet"
    supervisor = f", supervisor pid {supervisor_pid}" if supervisor_pid is not None else ""
    yield (
        f"{seen.deployment}: {seen.state}, {seen.model} at {routers} ({seen.backend}, mode {seen.mode}, "
        f"up {seen.uptime_s:.0f} s{supervisor})"
    )
    if seen.detail:
        yield seen.detail
    wanted = [seen.ratio] if seen.ratio else []
    wanted += [f"pinned: {seen.pinned}"] if seen.pinned else []
    wanted += [f"policy: {seen.policy}"] if seen.policy else []
    if wanted:
        yield "; ".join(wanted)


def row_of(process: Any, run_dir: Path | None) -> list[str]:
    state = process.state
    if state == "loading":
        state = f"loading {process.progress:.0%} {process.detail}"
    elif process.state == "draining" and process.legs and process.grace_left_s:
        state = f"draining, {process.grace_left_s:.0f} s left"
    is_instance = bool(process.role)
    log = process.log_file
    return [
        process.name,
        process.kind if is_instance else "-",
        state,
        process.health or "-",
        process.plan.replace(" x ", ", ") or "-",
        process.node or "-",
        load_of(process) if is_instance else "-",
        " ".join(map(str, process.rank_pids)) or str(process.pid or "-"),
        str(process.incarnation),
        process.device or "-",
        str(process.threads or "-"),
        f"{process.kv_bytes / 2**20:.0f} MiB" if process.kv_bytes else "-",
        str(process.restarts),
        process.generation or "-",
        process.address or "-",
        (os.path.relpath(log, run_dir) if run_dir is not None else log) if log else "-",
    ]


def load_of(process: Any) -> str:
    """ "5 aboard, 3 running, 512 tokens queued, 80 % full", of blocks; "idle". Prompts that wait to be pulled are aboard."""
    words = [f"{process.legs} aboard"] if process.legs > process.running else []
    words += [f"{process.running} running"] if process.running else []
    words += [f"{process.queued_tokens} tokens queued"] if process.queued_tokens else []
    if process.num_blocks and process.free_blocks < process.num_blocks:
        words.append(f"{1 - process.free_blocks / process.num_blocks:.0%} full")
    return ", ".join(words) or "idle"


def tail_lines(seen: Any, run_dir: Path | None) -> Iterator[str]:
    prefill = {process.name for process in seen.processes if process.kind == "prefill"}
    for process in seen.processes:
        yield from transport_lines(process.name, process.transports, prefill)
    untried = pairs_without_kv(seen.processes)
    if untried:
        yield f"no KV has moved yet, so nothing is chosen: {'; '.join(untried)}"
    for node in seen.cordoned_nodes:
        yield f"cordoned: {node}"
    if seen.decisions:
        yield "last decisions:"
        for event in seen.decisions:
            yield f"  {line_of(event)}"
    for warning in seen.warnings:
        yield f"warning: {warning}"
    if run_dir is not None:
        yield f"logs below {run_dir}"


def pairs_without_kv(processes: Iterable[Any]) -> list[str]:
    """ "prefill-0, prefill-2 to decode-1" for those that could work together and have not. Who did not answer is left out."""
    processes = [process for process in processes if process.state == "ready"]
    found: list[str] = []
    for decode in processes:
        if decode.kind != "decode" or not decode.counters:
            continue
        pulled = {pair.rpartition(" of ")[2] for pair in decode.transports}
        could = [it for it in processes if it.kind == "prefill" and it.generation == decode.generation]
        untried = [prefill.name for prefill in could if prefill.name not in pulled]
        found += [f"{', '.join(untried)} to {decode.name}"] if untried else []
    return found


def transport_lines(name: str, transports: Mapping[str, str], prefill: Collection[str]) -> list[str]:
    """What KV of each instance of ``prefill`` comes by: one line where all pairs of ranks agree, else one for each that
    differs."""
    pairs: dict[str, dict[str, list[str]]] = {}
    for pair, transport in transports.items():
        ranks, _, peer = pair.rpartition(" of ")
        if peer in prefill:  # and not one that has turned or ended since
            pairs.setdefault(peer, {}).setdefault(transport, []).append(ranks)
    lines = []
    for peer, by_transport in sorted(pairs.items()):
        for transport, which_ranks in sorted(by_transport.items()):
            which = f" ({', '.join(sorted(which_ranks))})" if len(by_transport) > 1 else ""
            lines.append(f"{name} takes KV of {peer}{which} by {transport}")
    return lines
