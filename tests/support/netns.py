"""Hosts of one machine: network namespaces on a bridge, each with an address of its own, that can be cut off and healed.

Needs root and `ip netns`. All names carry the pid of whoever made them; what a killed one has left is swept by the next.
A cut drops packets silently, as a dead switch port does: neither end sees its link go down, and nobody gets a RST.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_HOSTS = 32
_NAME = re.compile(r"bp(\d+)-(\w+)")
_NETNS = Path("/run/netns")
_UP_S = 5.0
_NOWHERE = "02:00:00:00:00:01"
"""A hardware address that nobody on the bridge has."""


def lacking() -> str:
    """What this machine lacks for network namespaces; empty where it has all."""
    if os.geteuid() != 0:
        return "not root"
    for tool in ("ip", "bridge"):
        if shutil.which(tool) is None:
            return f"no `{tool}` command (package iproute2)"
    probe = f"bp{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True, text=True)
    if made.returncode:
        return f"`ip netns add` is refused: {made.stderr.strip()}"
    try:
        link = [*("ip", "link", "add", f"bpp{os.getpid()}", "type", "veth", "peer", "name", "eth0"), "netns", probe]
        paired = subprocess.run(link, check=False, capture_output=True, text=True)
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False, capture_output=True)
    return f"`ip link add ... type veth` is refused: {paired.stderr.strip()}" if paired.returncode else ""


def ip(*arguments: str) -> str:
    """Run `ip`; RuntimeError with its line when it fails."""
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """``hosts`` on a bridge of this process's own. This process is on the bridge, too, at ``own_address``.

    ``made`` until ``remove``: namespaces ``bp<pid>-<host>``, the bridge ``bpb<pid>``, one end of a pair of devices each.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        if not 1 <= len(hosts) <= MOST_HOSTS:
            raise ValueError(f"{len(hosts)} hosts, of 1 to {MOST_HOSTS}")
        self.hosts = tuple(hosts)
        self._pid = os.getpid()
        self._bridge = f"bpb{self._pid}"
        self._subnet = _free_subnet()
        self.own_address = f"{self._subnet}.1"
        self._cut: set[str] = set()
        self._cut_pairs: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        return f"<Network {self._subnet}.0/24 [{len(self.hosts)} hosts, {len(self._cut)} cut off]>"

    def make(self) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self.own_address}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        for host in self.hosts:
            namespace, device = self.namespace(host), self._device(host)
            ip("netns", "add", namespace)
            ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("link", "set", device, "master", self._bridge, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            self._forward(host)  # at once, with no time to learn

    def remove(self) -> None:
        """Whatever of it is there. Processes in it lose their network; ending them is for whoever started them."""
        for host in self.hosts:
            # by name as well: the kernel takes a namespace away some time after its name
            _quietly("ip", "link", "del", self._device(host))
            _quietly("ip", "netns", "del", self.namespace(host))
        _quietly("ip", "link", "del", self._bridge)

    def namespace(self, host: str) -> str:
        return f"bp{self._pid}-{host}"

    def address(self, host: str) -> str:
        return f"{self._subnet}.{10 + self.hosts.index(host)}"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """``command`` as it runs on ``host``: the process keeps its pid."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def cut(self, host: str) -> None:
        """From now on no packet of ``host`` reaches anybody, nor one of anybody's the host."""
        self._cut.add(host)
        _run("bridge", "link", "set", "dev", self._device(host), "state", "0")

    def heal(self, host: str) -> None:
        self._forward(host)
        self._cut.discard(host)

    def cut_pair(self, one: str, other: str) -> None:
        """From now on no packet goes between the two; both still reach everybody else."""
        self._cut_pairs.add((one, other))
        for here, there in ((one, other), (other, one)):
            to = (self.address(there), "lladdr", _NOWHERE, "nud", "permanent", "dev", "eth0")
            ip("-n", self.namespace(here), "neigh", "replace", *to)

    def heal_pair(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            ip("-n", self.namespace(here), "neigh", "del", self.address(there), "dev", "eth0")
        self._cut_pairs.discard((one, other))

    def heal_all(self) -> None:
        for host in tuple(self._cut):
            self.heal(host)
        for pair in tuple(self._cut_pairs):
            self.heal_pair(*pair)

    def is_cut(self, host: str) -> bool:
        return host in self._cut

    def _forward(self, host: str) -> None:
        """The kernel sees a little later that both ends of a pair are up, and refuses until then."""
        deadline = time.monotonic() + _UP_S
        while True:
            try:
                _run("bridge", "link", "set", "dev", self._device(host), "state", "3")
                return
            except RuntimeError as error:
                if "Network is down" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _device(self, host: str) -> str:
        return f"bpv{self._pid}.{self.hosts.index(host)}"


@contextlib.contextmanager
def network(hosts: Sequence[str]) -> Iterator[Network]:
    """A network for a while; what killed ones have left is swept first."""
    sweep()
    made = Network(hosts)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def sweep() -> None:
    """Take away the networks of processes that are gone."""
    pids = {int(match[1]) for name in names() if (match := _NAME.fullmatch(name))}
    links = ip("-o", "link", "show")
    pids |= {int(pid) for pid in re.findall(r"\bbp[bv](\d+)", links)}
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            continue
        for name in names():
            if name.startswith(f"bp{pid}-"):
                _quietly("ip", "netns", "del", name)
        for device in re.findall(rf"\b(bp[bv]{pid}(?:\.\d+)?)\b", links):
            _quietly("ip", "link", "del", device)


def names() -> list[str]:
    """Of every network namespace that has one."""
    return sorted(path.name for path in _NETNS.iterdir()) if _NETNS.is_dir() else []


def _free_subnet() -> str:
    taken = ip("-4", "route", "show")
    turns = (100 + (os.getpid() + turn) % 100 for turn in range(100))  # two that look at once find different ones
    return next(subnet for k in turns if f"{(subnet := f'10.213.{k}')}.0/24" not in taken)


def _quietly(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)
