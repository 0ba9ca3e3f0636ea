"""Makes the process backend of a controller behave as over several hosts, by the bench's plan of hosts.

All processes are of one machine, so that the controller could kill what is cut off from it, and would see its end. Here a
signal to a process on a host that is not reached is lost, its end and its words are seen once the host is reached again, and
a process that was killed and is not seen gone is given up as under Ray.
"""

import asyncio

from host_plan import read_plan

KILL_PATIENCE_S = 2.0
"""As of the Ray backend."""
LOOK_EVERY_S = 0.1


def install(plan_file):
    """In the process of the controller, before it begins."""
    from biphase.cluster.process_backend import ProcessBackend
    from biphase.cluster.process_rank import ProcessRank

    ProcessBackend.kill_patience_s = KILL_PATIENCE_S
    for name, value in distant(ProcessRank, lambda pid: read_plan(plan_file).pid_reached(pid)).items():
        setattr(ProcessRank, name, value)


def distant(rank_type, is_reached):
    """The methods of a rank whose host may be cut off; ``is_reached(pid)`` tells whether it is not."""
    send, set_end, word = rank_type._send, rank_type._set_end, rank_type.word

    def _send(self, number):
        if is_reached(self.pid):
            send(self, number)

    def _set_end(self, reason):
        if is_reached(self.pid):
            set_end(self, reason)
        else:
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._set_end, reason)

    def heard(self):
        return word(self) if is_reached(self.pid) else self._word

    return {"_send": _send, "_set_end": _set_end, "word": heard}


def call_node(host):
    """In any process: announce this name as its host's."""
    import biphase.cluster.process_runner as runner

    runner._node_of = lambda _address: host
