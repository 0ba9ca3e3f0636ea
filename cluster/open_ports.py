"""Ports that others of the network reach. All of them are unprotected: there is no TLS yet. Pure."""

from collections.abc import Iterable

from biphase.cluster.router_places import RouterPlace


def open_ports(said: Iterable[tuple[str, str]], places: Iterable[RouterPlace]) -> list[str]:
    """ "NAME at HOST:PORT" for those that are not on loopback. ``said``: names and the addresses that others are told, which
    of a router need not be where it listens: that is its place's host."""
    listens = {place.name: place for place in places}
    found: list[str] = []
    for name, address in said:
        place = listens.pop(name, None)
        host, _, port = address.rpartition(":")
        host = place.host if place is not None else host
        if address and not _is_loopback(host):
            found.append(f"{name} at {host}:{port}")
    return found + [
        f"{place.name} at {place.host}:{place.port}" for place in listens.values() if not _is_loopback(place.host)
    ]


def _is_loopback(host: str) -> bool:
    host = host.strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
