"""One rank's pulls: whatever rank 0 gives out is run here, into this rank's blocks, over this rank's wires.

Lives in the worker's loop and writes there too: a piece takes some 0.2 ms per MiB, and fresh from the wire it is still
in the cache. While the instance decodes, the pull leaves the loop, and with it the GIL, to the decode most of the time.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer.allocator import keep_freed_memory
from biphase.kvtransfer.pace import Pace
from biphase.kvtransfer.peers import Peers
from biphase.kvtransfer.pull_job import PartsPulled, PullJob, PullPart
from biphase.kvtransfer.pull_run import PullRun
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.wire import PullOrder, Transport


class RankPuller:
    """Pulls into one rank's blocks. Owns the wires' sources. ``decoding``: whether a decode wants the loop's
    time; where nobody here knows, what rank 0 knew."""

    def __init__(
        self,
        memory: KvMemory | RankMemory,
        transports: Sequence[Transport],
        decoding: Callable[[], bool] | None = None,
    ) -> None:
        keep_freed_memory()
        self.memory = RankMemory.whole(memory)
        self.peers = Peers(transports)
        self._decoding = decoding
        self._pace = Pace()
        self._open_pulls = 0
        self._totals = {"bad_pieces": 0, "fallbacks": 0}
        self._bytes: Counter[str] = Counter()

    async def pull(self, job: PullJob) -> PartsPulled:
        """Pull all parts of a job at once. Raises SourceUnreachable or SourceRefused.

        Whatever the outcome, cancellation included, nothing writes into its blocks once this has returned or raised.
        """
        await self.peers.make_ready([(part.routes[0], _order(job, part)) for part in job.parts if part.routes])
        run = PullRun(job, self.memory, self.peers, self._pace, self._decoding or (lambda: job.beside_decode))
        self._open_pulls += 1
        try:
            return await run.to_its_end()
        finally:
            self._open_pulls -= 1
            self._totals["bad_pieces"] += run.handoff.num_bad
            self._totals["fallbacks"] += run.fallbacks
            self._bytes.update(run.bytes_by_transport)

    async def close(self) -> None:
        """Close every connection. Pulls must have ended."""
        await self.peers.close()

    def counters(self) -> dict[str, int]:
        by_transport = {f"bytes_by_{name}": num_bytes for name, num_bytes in self._bytes.items()}
        return {**self._totals, "open_pulls": self._open_pulls, "peers": len(self.peers), **by_transport}


def _order(job: PullJob, part: PullPart) -> PullOrder:
    """What lets us come to the source of a part."""
    return PullOrder(ticket=job.ticket, epoch=job.epoch, incarnation=job.incarnation, box=part.box)
