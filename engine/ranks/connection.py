"""One TCP connection between two ranks: messages in both directions, and the news that the other end is lost.

A message is a length (4 bytes, big endian) and that many bytes of msgpack; a length of 0 is a beat. Beats come from a
thread of the channel, so that a rank that is stopped goes silent, and one that computes does not. Silence is counted in
our own beats: a process that was stopped itself, or a machine that slept, blames nobody for it.
"""

import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import msgpack

from biphase.protos.errors import one_line

BEAT_S = 0.25
SILENCE_S = 1.5
"""Of a rank that serves."""
LOADING_SILENCE_S = 15.0
"""Of one that loads: importing, compiling and reading may keep all of its threads for a while."""

MAX_MESSAGE_BYTES = 64 << 20
_BEAT = (0).to_bytes(4, "big")
_SEND_TIMEOUT = struct.pack("ll", 1, 500_000)

Message = dict[str, Any]
"""What ranks tell each other; ``kind`` says what it is."""


class Connection:
    """Owns the socket, which is blocking, and the thread that reads it. ``on_message`` and ``on_lost`` run there, or in
    the thread whose send failed; ``on_lost`` is called once."""

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None],
    ) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        self.peer = peer
        self.excused = False
        """Whether its end is expected: it is no loss then."""
        self._socket = connection
        self._on_message = on_message
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._over = False
        self._silent_beats = 0
        self._max_silent_beats = round(LOADING_SILENCE_S / BEAT_S)
        self.ended = threading.Event()
        """The other end has closed, or was given up."""
        self._reader = threading.Thread(target=self._read, name=f"from {peer}", daemon=True)

    def start(self) -> None:
        self._reader.start()

    def send(self, message: Message) -> None:
        """Any thread. Never raises: who takes no message is lost."""
        payload = msgpack.packb(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes to {self.peer}, the limit is {MAX_MESSAGE_BYTES}")
        try:
            with self._sending:
                self._socket.sendall(len(payload).to_bytes(4, "big") + payload)
        except BlockingIOError:
            self._end(f"{self.peer} takes no messages any more")
        except OSError as error:
            self._end(f"{self.peer} is gone: {error.strerror or one_line(error)}")

    def beat(self) -> None:
        """Once every BEAT_S: tell the other end that we live, and count its silence. Never waits."""
        self._silent_beats += 1
        if self._silent_beats > self._max_silent_beats:
            self._end(f"{self.peer} has been silent for {self._max_silent_beats * BEAT_S:g} s")
            return
        if not self._sending.acquire(blocking=False):
            return  # a message is on its way, which tells as much
        try:
            sent = self._socket.send(_BEAT, socket.MSG_DONTWAIT)
            if sent < len(_BEAT):
                self._socket.sendall(_BEAT[sent:])
        except BlockingIOError:
            pass  # its buffer is full of what will tell as much
        except OSError as error:
            self._end(f"{self.peer} is gone: {error.strerror or one_line(error)}")
        finally:
            self._sending.release()

    def expect_steady_beats(self) -> None:
        """From now on SILENCE_S is too long."""
        self._silent_beats = 0
        self._max_silent_beats = round(SILENCE_S / BEAT_S)

    def close(self) -> None:
        """No more messages either way, no loss told. Idempotent; not from the reader's own thread."""
        with self._ending:
            self._over = True
        self._shut_down()
        if self._reader.ident is not None and self._reader is not threading.current_thread():
            self._reader.join()
        self._socket.close()

    def _shut_down(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster

    def _end(self, reason: str) -> None:
        with self._ending:
            first, self._over = not self._over, True
        self.ended.set()
        self._shut_down()
        if first and not self.excused:
            self._on_lost(reason)

    def _read(self) -> None:
        try:
            while True:
                head = self._exactly(4)
                self._silent_beats = 0
                size = int.from_bytes(head, "big")
                if not size:
                    continue
                if size > MAX_MESSAGE_BYTES:
                    raise ConnectionError(f"sent a message of {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
                self._on_message(msgpack.unpackb(self._exactly(size)))
        except OSError as error:
            self._end(f"{self.peer} {error.strerror or one_line(error)}")
        except Exception as error:  # noqa: BLE001 -- whatever it did not understand, it cannot follow any more
            self._end(f"{self.peer} sent what could not be followed: {type(error).__name__}: {one_line(error)}")

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        while filled < size:
            received = self._socket.recv_into(view[filled:])
            if not received:
                raise ConnectionError("has closed its connection")
            self._silent_beats = 0
            filled += received
        return buffer
