"""The meeting place of an instance's ranks: torch's key-value store, listening on one address and nowhere else.

Ranks meet here when they join and when they have loaded; in between nothing is exchanged but groups' addresses.
"""

import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from biphase.protos.errors import SetupError, one_line

JOIN_TIMEOUT_S = 600.0
"""How long ranks wait for each other to start and to load; a rank that has died is noticed by others than this."""

_FIRST_LOOK_S, _LOOK_EVERY_S = 0.005, 0.1
"""Ranks are looked for, not waited for: each wait that ends in vain is two lines of torch's on stderr."""


def open_store(host: str, *, port: int = 0, timeout_s: float = JOIN_TIMEOUT_S) -> tuple[Store, int]:
    """Rank 0's: a store that listens on ``host``, and its port. Raises SetupError when that address cannot be bound."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise SetupError(f"no store for the ranks on {host}:{port} ({error.strerror})") from error
    bound: int = listener.getsockname()[1]
    # given a socket, torch does not open one of its own, which would listen on every address
    store = TCPStore(
        host,
        bound,
        is_master=True,
        master_listen_fd=listener.detach(),
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return store, bound


def join_store(host: str, port: int, *, timeout_s: float = JOIN_TIMEOUT_S) -> Store:
    """Another rank's, connected. Raises SetupError when nobody listens there."""
    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise SetupError(f"no store of rank 0 at {host}:{port}: {one_line(error)}") from error


def meet(
    store: Store,
    name: str,
    rank: int,
    num_ranks: int,
    timeout_s: float,
    on_wait: Callable[[str], None] = lambda line: None,
) -> None:
    """Return when every rank has come here under ``name``, a past participle; ``on_wait`` hears for whom we wait. Raises
    SetupError naming those who have not come in time."""
    until_s = time.monotonic() + timeout_s
    mine = PrefixStore(f"meet/{name}", store)
    missing, look_s = list(range(num_ranks)), _FIRST_LOOK_S
    try:
        mine.set(str(rank), "here")
        while missing := [other for other in missing if not mine.check([str(other)])]:
            on_wait(waiting_line(name, missing, num_ranks))
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise SetupError(late_line(name, missing, num_ranks, timeout_s))
            time.sleep(min(left_s, look_s))
            look_s = min(2 * look_s, _LOOK_EVERY_S)
    except RuntimeError as error:
        raise SetupError(f"the store of rank 0 is gone before all ranks have {name}: {one_line(error)}") from error


def waiting_line(done: str, missing: Iterable[int], num_ranks: int) -> str:
    """For people who watch: how many ranks have ``done`` it, and who has not."""
    late = list(missing)
    return f"{num_ranks - len(late)} of {num_ranks} ranks have {done}, waiting for rank {_list(late)}"


def late_line(done: str, missing: Iterable[int], num_ranks: int, timeout_s: float) -> str:
    return f"not all of {num_ranks} ranks have {done} within {timeout_s:g} s: missing is rank {_list(missing)}"


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
