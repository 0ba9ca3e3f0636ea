"""Where a deployment's routers listen: the entries of its key ``routers``, what they leave out, what they contradict. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RAY_WORKER_PORTS = range(10002, 20000)
"""Ray gives these to its workers unless told otherwise: a router there may find its port taken at any start."""
RESERVED = ("prefill", "decode", "controller")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlace:
    """One router: what it is called, where it listens, on which node it runs (empty: the head)."""

    name: str
    host: str
    port: int
    node: str = ""


def places_of(entries: Iterable[RouterPlace], host: str, port: int) -> tuple[RouterPlace, ...]:
    """All routers of a deployment: the entries as they are, or the single one that there is by default."""
    return tuple(entries) or (RouterPlace(name="router-0", host=host, port=port),)


def reason_against(places: Sequence[RouterPlace], backend: str) -> str | None:
    """What is wrong with the entries together, as one line that names the key; None when nothing is."""
    for index, place in enumerate(places):
        if place.name.partition("-")[0] in RESERVED:
            return f"routers.{index}.name is {place.name!r}: {', '.join(RESERVED)} begin the names of other processes"
        if place.node and backend == "process":
            return (
                f"routers.{index}.node is {place.node!r} with backend process: it has this host alone, leave node out"
            )
        if backend == "ray" and place.port in RAY_WORKER_PORTS:
            first, last = RAY_WORKER_PORTS[0], RAY_WORKER_PORTS[-1]
            return f"routers.{index}.port is {place.port}: Ray gives {first} to {last} to its workers, take one outside"
    name, count = Counter(place.name for place in places).most_common(1)[0]
    if count > 1:
        return f"routers: {count} are called {name!r}, each needs a name of its own"
    doors = Counter((place.node, place.port) for place in places if place.port)
    for (node, port), shared in doors.items():
        if shared > 1:
            return f"routers: {shared} listen at port {port} of {node or 'the head'}, give each another port or node"
    return None
