"""The channel between rank 0 of an instance and its other ranks: one TCP connection each, messages, and who is lost.

Any thread may send. A loss, at whichever end, is told once by the future ``lost``, from a thread of the channel: whoever
ends the process for it needs neither the loop nor the engine thread, which may hang in a collective.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from biphase.engine.ranks.connection import BEAT_S, Connection, Message
from biphase.engine.ranks.dispatch import Dispatch
from biphase.engine.ranks.greeting import Membership, Stranger, greet_follower, greet_leader
from biphase.engine.ranks.sockets import connected, listening
from biphase.protos.errors import SetupError, one_line

_log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0
"""How long rank 0 waits for the others to close after it told them to stop."""
FindLeader = Callable[[], Awaitable[str]]
"""Where rank 0 of the instance listens for the others, ``host:port``; waits until that is known."""

_RETRY_S = 0.1
_MAX_GREETINGS = 64


class _Beats:
    """The thread that beats on every connection, and calls ``on_beat`` as often."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.on_beat: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank beats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            for connection in tuple(self.connections):
                connection.beat()
            self.on_beat()


class LeaderChannel:
    """Rank 0's end. Owns its listener and its connections. Make it in the loop that runs the handlers."""

    def __init__(self, us: Membership, host: str, port: int = 0) -> None:
        """Listens at once. Raises SetupError where it cannot."""
        self.us = us
        self.lost: Future[str] = Future()
        self._dispatch = Dispatch(asyncio.get_running_loop(), self.lose)
        self._connections: dict[int, Connection] = {}
        self._complete = asyncio.Event()
        self._listener = listening(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._beats = _Beats()

    @property
    def followers(self) -> range:
        """The ranks at the other ends."""
        return range(1, self.us.plan.num_ranks)

    async def gather(self, within_s: float, on_joined: Callable[[int], None] = lambda num: None) -> None:
        """Wait until every rank is connected; ``on_joined`` hears how many of all are there. Raises SetupError in time."""
        loop, greetings = asyncio.get_running_loop(), set[asyncio.Task[None]]()

        async def accept() -> None:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # it was gone again, or there are too many open files for now
                    _log.warning("rank 0 could not take a connection: %s", error.strerror or one_line(error))
                    await asyncio.sleep(_RETRY_S)
                    continue
                if len(greetings) >= _MAX_GREETINGS:
                    connection.close()
                    continue
                greetings.add(task := asyncio.create_task(self._greet(connection, on_joined)))
                task.add_done_callback(greetings.discard)

        on_joined(1)
        accepting = asyncio.create_task(accept())
        try:
            async with asyncio.timeout(within_s):
                await self._complete.wait()
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in self.followers if rank not in self._connections)
            raise SetupError(f"rank {missing} of {self.us.instance} did not join within {within_s:g} s") from None
        finally:
            tasks = {accepting, *greetings}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._listener.close()

    async def _greet(self, connection: socket.socket, on_joined: Callable[[int], None]) -> None:
        peer = "an address that is gone"
        try:
            connection.setblocking(False)
            peer = "{}:{}".format(*connection.getpeername()[:2])
            rank = await greet_follower(connection, self.us)
            if rank not in self.followers or rank in self._connections:
                raise Stranger(f"it is rank {rank}, wanted are ranks 1 to {self.followers[-1]}, each once")
        except (Stranger, OSError, TimeoutError) as error:
            _log.warning("no rank of ours at %s: %s", peer, one_line(error))
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        joined = Connection(connection, f"rank {rank}", lambda message: self._dispatch(message, rank), self.lose)
        self._connections[rank] = joined
        self._beats.connections.append(joined)
        joined.start()
        on_joined(1 + len(self._connections))
        if len(self._connections) == len(self.followers):
            self._complete.set()

    def send(self, rank: int, message: Message) -> None:
        self._connections[rank].send(message)

    def broadcast(self, message: Message) -> None:
        for connection in self._connections.values():
            connection.send(message)

    def subscribe(self, kind: str, handler: Callable[[int, Message], None], *, direct: bool = False) -> None:
        """``handler(rank, message)`` for every message of ``kind``, in the loop; ``direct``: in a thread of the channel,
        where it must not wait. A handler that raises ends the instance."""
        self._dispatch.subscribe(kind, handler, direct=direct)

    def unsubscribe(self, kind: str, *, keep: bool = False) -> None:
        """As Dispatch.unsubscribe."""
        self._dispatch.unsubscribe(kind, keep=keep)

    def on_beat(self, call: Callable[[], None]) -> None:
        """Call it every BEAT_S, in the channel's thread."""
        self._beats.on_beat = call

    def excuse(self, rank: int) -> None:
        """That rank's end is expected from now on."""
        self._connections[rank].excused = True

    def expect_steady_beats(self) -> None:
        """All have loaded: who is silent now is lost soon."""
        for connection in self._connections.values():
            connection.expect_steady_beats()

    def lose(self, reason: str) -> None:
        """The instance is lost; the first reason counts."""
        with contextlib.suppress(Exception):
            self.lost.set_result(reason)

    async def stop(self) -> None:
        """Tell the others to stop, wait until they have closed, then close."""
        for connection in self._connections.values():
            connection.excused = True
        self.broadcast({"kind": "stop"})
        loop = asyncio.get_running_loop()
        until_s = loop.time() + STOP_WITHIN_S
        for connection in self._connections.values():
            remaining_s = max(0.0, until_s - loop.time())
            if not await asyncio.to_thread(connection.ended.wait, remaining_s):
                _log.warning("%s has not closed within %g s", connection.peer, STOP_WITHIN_S)
        self.close()

    def close(self) -> None:
        """Close every connection; the others take it as a loss unless they were told to stop. Idempotent."""
        self._beats.stop()
        for connection in self._connections.values():
            connection.close()
        self._listener.close()


class FollowerChannel:
    """The end of any other rank. Made by ``join``; owns its connection."""

    def __init__(self, us: Membership, connection: socket.socket) -> None:
        self.us = us
        self.lost: Future[str] = Future()
        self._dispatch = Dispatch(asyncio.get_running_loop(), self.lose)
        self._connection = Connection(connection, "rank 0", self._dispatch, self.lose)
        self._connection.start()
        self._beats = _Beats()
        self._beats.connections.append(self._connection)

    @staticmethod
    async def join(us: Membership, find_leader: FindLeader, within_s: float) -> "FollowerChannel":
        """Connect to rank 0, which may not be there yet: it is looked for again as long as nobody of ours answers. Raises
        SetupError in time, or when it refuses us."""
        address, reason = "", "nobody says where it is"
        try:
            async with asyncio.timeout(within_s):
                while True:
                    address = await find_leader()
                    host, _, port = address.rpartition(":")
                    try:
                        connection = await connected(host.strip("[]"), int(port))
                    except OSError as error:
                        reason = error.strerror or one_line(error)
                        await asyncio.sleep(_RETRY_S)
                        continue
                    try:
                        await greet_leader(connection, us)
                        return FollowerChannel(us, connection)
                    except BaseException as error:
                        connection.close()
                        if not isinstance(error, (Stranger, OSError)):
                            raise
                        reason = one_line(error)
                        if "refuses" in reason:
                            break
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            pass
        except ValueError:
            reason = "no host:port"
        raise SetupError(f"rank {us.rank} of {us.instance} cannot join rank 0 at {address or '?'}: {reason}")

    def send(self, message: Message) -> None:
        self._connection.send(message)

    def subscribe(self, kind: str, handler: Callable[[Message], None], *, direct: bool = False) -> None:
        """As LeaderChannel.subscribe, for messages of rank 0."""
        self._dispatch.subscribe(kind, handler, direct=direct)

    def unsubscribe(self, kind: str, *, keep: bool = False) -> None:
        """As Dispatch.unsubscribe."""
        self._dispatch.unsubscribe(kind, keep=keep)

    def excuse(self) -> None:
        """Rank 0's end is expected from now on."""
        self._connection.excused = True

    def expect_steady_beats(self) -> None:
        self._connection.expect_steady_beats()

    def lose(self, reason: str) -> None:
        """This rank, or rank 0, is lost; the first reason counts."""
        with contextlib.suppress(Exception):
            self.lost.set_result(reason)

    def close(self) -> None:
        """Idempotent."""
        self._beats.stop()
        self._connection.close()
