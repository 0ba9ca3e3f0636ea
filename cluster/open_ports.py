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


def open_inner_ports(instances: Iterable[tuple[str, str, str]], *, only_grpc: bool) -> list[str]:
    """Where instances listen for each other. ``instances``: names, with what rank 0 says: its ports for the gRPC wire and for
    its other ranks. Those of the other wires and ranks are free ones of the same hosts. ``only_grpc``: no other wire is used.
    """
    found: list[str] = []
    for name, kv_address, rank_address in instances:
        if kv_address and not _is_loopback(kv_address.rpartition(":")[0]):
            alone = only_grpc and not rank_address
            found.append(f"KV of {name} at {kv_address}{'' if alone else ' and free ports'}")
        if rank_address and not _is_loopback(rank_address.rpartition(":")[0]):
            found.append(f"ranks of {name} at {rank_address}")
    return found


def _is_loopback(host: str) -> bool:
    host = host.strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
