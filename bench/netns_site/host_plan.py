"""The plan of hosts of a bench: which there are, which are cut off, who lives where. Pure, but for reading and writing its file.

The file is JSON: {"hosts": {HOST: {"address", "namespace"}}, "fixed": {PROCESS: HOST}, "lives": [[HOST, PROCESS, INCARNATION,
PID, TICKS]], "cut": [HOST], "spare": [HOST]}. Hosts in "spare" are used by nobody. The controller's host is that of "fixed".
"""

import contextlib
import fcntl
import json

CONTROLLER = "controller"


class HostPlan:
    """What the file says. ``is_alive(pid, ticks)`` tells whether that process, started at ``ticks``, still runs."""

    def __init__(self, values):
        self.hosts, self.fixed = values["hosts"], values["fixed"]
        self.lives, self.cut = values.get("lives", []), values.get("cut", [])
        self.spare = values.get("spare", [])

    def values(self):
        return {
            "hosts": self.hosts,
            "fixed": self.fixed,
            "lives": self.lives,
            "cut": self.cut,
            "spare": self.spare,
        }

    def reached(self, host):
        """Whether the controller's host and ``host`` reach each other; a host always reaches itself."""
        home = self.fixed[CONTROLLER]
        return host == home or not {host, home} & set(self.cut)

    def host_of(self, pid):
        """Where the newest life of that pid is; None when it has no host yet."""
        return next((life[0] for life in reversed(self.lives) if life[3] == pid), None)

    def pid_reached(self, pid):
        """Whether the controller reaches the process. One without a host is on its way, on the controller's."""
        host = self.host_of(pid)
        return host is None or self.reached(host)

    def choose(self, name, avoid, is_alive):
        """The host for a new life: its own, or the first free one; None while there is none that can be reached."""
        if name in self.fixed:
            return self.fixed[name] if self.reached(self.fixed[name]) else None
        taken = {life[0] for life in self.lives if is_alive(life[3], life[4])}
        shunned = taken | set(self.fixed.values()) | set(self.spare) | set(avoid)
        return next((host for host in self.hosts if host not in shunned and self.reached(host)), None)

    def settle(self, host, name, incarnation, pid, ticks, is_alive):
        """A life begins there. Those that have ended are forgotten, unless nobody can know of their end yet."""
        self.lives = [life for life in self.lives if is_alive(life[3], life[4]) or not self.reached(life[0])]
        self.lives.append([host, name, incarnation, pid, ticks])

    def newest(self, is_alive):
        """{name: (host, incarnation, pid)} of the newest living life of every process."""
        found = {}
        for host, name, incarnation, pid, ticks in self.lives:
            if is_alive(pid, ticks) and (name not in found or found[name][1] < incarnation):
                found[name] = (host, incarnation, pid)
        return found

    def former(self, is_alive):
        """The lives that still run though a newer one of their name does: ["NAME#INCARNATION on HOST"]."""
        newest = self.newest(is_alive)
        return [
            f"{name}#{incarnation} on {host}"
            for host, name, incarnation, pid, ticks in self.lives
            if is_alive(pid, ticks) and incarnation < newest[name][1]
        ]

    def note_cut(self, host, is_cut):
        self.cut = [other for other in self.cut if other != host] + ([host] if is_cut else [])


def read_plan(path):
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return HostPlan(json.load(file))


def write_plan(path, plan):
    """For the first time; whoever changes it later uses ``changing_plan``."""
    with open(path, "w") as file:
        json.dump(plan.values(), file)


@contextlib.contextmanager
def changing_plan(path):
    """The plan to be changed, by nobody else meanwhile; written at the end."""
    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        plan = HostPlan(json.load(file))
        yield plan
        file.seek(0)
        file.truncate()
        json.dump(plan.values(), file)


def started_ticks(pid):
    """As biphase.cluster.run_dir.started_ticks, which a process that has not begun must not import."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid, ticks):
    return started_ticks(pid) == ticks
