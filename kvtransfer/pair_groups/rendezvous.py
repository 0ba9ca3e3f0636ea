"""Where the two ends of a pair group find each other: a store of our own, listening on the given host only."""

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


class Rendezvous:
    """This process's store, where groups that it sends on are built, and the way to other processes' stores."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timeout = timedelta(seconds=timeout_s)
        # torch would listen on every address of the machine: it gets a socket that is bound already
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, 0), family=family) as listener:
            self.address = (host, int(listener.getsockname()[1]))
            self._store = TCPStore(
                *self.address,
                is_master=True,
                wait_for_workers=False,
                timeout=self._timeout,
                master_listen_fd=listener.detach(),
            )

    def ours(self, key: str) -> Store:
        """By a client of its own: one that waits for a reader holds up every other use of the same client."""
        return self.theirs(self.address, key)

    def theirs(self, address: tuple[str, int], key: str) -> Store:
        """Blocks; raises OSError or RuntimeError where nobody listens."""
        socket.create_connection(address, self._timeout_s).close()  # torch would print its stack first
        client = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=self._timeout)
        return PrefixStore(key, client)

    def forget(self, key: str) -> None:
        """The group is built, or will not be: what its ends wrote is of no more use."""
        for name in self._store.list_keys():
            if name.startswith(f"{key}/"):
                self._store.delete_key(name)
