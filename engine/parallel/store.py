"""The meeting place of an instance's ranks: torch's key-value store, listening on one address and nowhere else.

Ranks meet here when they join and when they have loaded; in between nothing is exchanged but groups' addresses.
"""

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from biphase.protos.errors import SetupError, one_line

JOIN_TIMEOUT_S = 600.0
"""How long ranks wait for each other to start and to load; a rank that has died is noticed by others than this."""


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


def meet(store: Store, name: str, rank: int, num_ranks: int, timeout_s: float) -> None:
    """Return when every rank has come here under ``name``. Raises SetupError naming those who have not."""
    mine = PrefixStore(f"meet/{name}", store)
    mine.set(str(rank), "here")
    try:
        mine.wait([str(other) for other in range(num_ranks)], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise SetupError(f"{name}: not all of {num_ranks} ranks came within {timeout_s:g} s") from error
