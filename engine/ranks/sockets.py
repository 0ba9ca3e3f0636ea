"""The sockets of ranks before they know each other: rank 0's listener, another rank's first connection."""

import asyncio
import socket

from biphase.protos.errors import SetupError


def listening(host: str, port: int) -> socket.socket:
    """Non-blocking. Raises SetupError when the address cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SetupError(f"rank 0 cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


async def connected(host: str, port: int) -> socket.socket:
    """Non-blocking. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
