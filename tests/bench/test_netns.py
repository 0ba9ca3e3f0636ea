"""Hosts as network namespaces: cuts drop packets, heals bring them back, nothing is left."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import netns
from support.netns import Network, network

LACKING = netns.lacking()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING or "has namespaces")

ECHO = """
import socket
server = socket.create_server(("0.0.0.0", 7))
print("up", flush=True)
while True:
    connection, _ = server.accept()
    connection.close()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    """a and b with something that listens at port 7, and c."""
    with network(["a", "b", "c"]) as made:
        running = []
        for host in ("a", "b"):
            command = made.command(host, [sys.executable, "-c", ECHO])
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert running[-1].stdout is not None and running[-1].stdout.readline() == "up\n"
        yield made
        for process in running:
            process.kill()
            process.communicate()
    assert [name for name in netns.names() if name.startswith(made.namespace(""))] == []
    assert "bpb" not in netns.ip("-o", "link", "show")


def reaches(hosts: Network, source: str, target: str) -> bool:
    code = f"import socket; socket.create_connection(({hosts.address(target)!r}, 7), timeout=0.5)"
    command = hosts.command(source, [sys.executable, "-S", "-c", code])
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def reached(hosts: Network, target: str) -> bool:
    try:
        socket.create_connection((hosts.address(target), 7), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_hosts_reach_each_other_and_this_process_reaches_them(hosts: Network) -> None:
    assert reaches(hosts, "a", "b") and reaches(hosts, "c", "a")
    assert reached(hosts, "a") and reached(hosts, "b")


def test_a_cut_host_is_silent_and_heals(hosts: Network) -> None:
    hosts.cut("a")
    try:
        assert not reached(hosts, "a") and not reaches(hosts, "b", "a") and reached(hosts, "b")
    finally:
        hosts.heal("a")
    assert reached(hosts, "a") and reaches(hosts, "b", "a")


def test_a_cut_pair_still_reaches_everybody_else(hosts: Network) -> None:
    hosts.cut_pair("a", "b")
    try:
        assert not reaches(hosts, "a", "b") and not reaches(hosts, "b", "a")
        assert reaches(hosts, "c", "a") and reaches(hosts, "c", "b") and reached(hosts, "a") and reached(hosts, "b")
    finally:
        hosts.heal_all()
    assert reaches(hosts, "a", "b") and reaches(hosts, "b", "a")


def test_a_cut_sends_no_end_of_connection(hosts: Network) -> None:
    """What a broken cable does: the other end hears nothing, no FIN and no RST."""
    code = "import socket, sys; c = socket.create_connection((%r, %d)); print('up', flush=True); sys.stdin.read()"
    with socket.create_server((hosts.own_address, 0)) as server:
        command = hosts.command("c", [sys.executable, "-c", code % (hosts.own_address, server.getsockname()[1])])
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        connection, _ = server.accept()
        assert peer.stdout is not None and peer.stdout.readline() == b"up\n"
        with connection:
            hosts.cut("c")
            peer.kill()
            peer.communicate()
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        hosts.heal("c")


def test_what_a_killed_process_left_is_swept() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from support.netns import Network\nNetwork(['x', 'y']).make()"
    tests = str(netns.Path(__file__).parents[1])
    dead = subprocess.Popen([sys.executable, "-c", code, tests])
    assert dead.wait(30) == 0
    assert f"bp{dead.pid}-x" in netns.names()
    netns.sweep()
    assert not any(name.startswith(f"bp{dead.pid}-") for name in netns.names())
    assert f"bpv{dead.pid}." not in netns.ip("-o", "link", "show")
