"""Arms that a handoff is measured against: the same bytes in messages of the same sizes, and nothing done with them.

Each has a sending end, run in the source's process, and a receiving end that drops what comes. ``send_*`` and ``receive_*``
block; both are given the sizes of the messages. A sender calls ``begin`` when the receiver is there, before its first send.

    tcp    a socket: sendall of one buffer, recv_into of another
    grpc   a stream of raw messages
    gloo   sends and receives of torch.distributed over a process group of two
    ring   memory of both processes, in slots: the sender copies a message in from where it lies, the receiver copies it
           out into a buffer of its own, the same for all; each waits for the other by an eventfd. "ring, kept": out to
           memory of its own for all messages, as one who wants the bytes does
"""

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

RING_SLOTS = 4
_SKEW_BYTES = 128  # as kvtransfer/shm: copies between equal offsets in a page can be slow


def send_tcp(listener: socket.socket, sizes: Sequence[int], data: memoryview, begin: Callable[[], None]) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1)
        begin()
        for size in sizes:
            connection.sendall(data[:size])


def receive_tcp(port: int, sizes: Sequence[int]) -> None:
    buffer = memoryview(bytearray(max(sizes)))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.send(b"!")
        for size in sizes:
            if connection.recv_into(buffer[:size], 0, socket.MSG_WAITALL) != size:
                raise RuntimeError("the bare socket broke")


@dataclass
class Ring:
    """Inherited by both processes."""

    memory: int
    free: int
    full: int
    go: int
    slot_bytes: int

    @staticmethod
    def made(slot_bytes: int) -> "Ring":
        memory = os.memfd_create("biphase-bench", 0)
        slot_bytes = -(-(slot_bytes + _SKEW_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(memory, RING_SLOTS * slot_bytes)
        free, full, go = (os.eventfd(count, os.EFD_SEMAPHORE) for count in (RING_SLOTS, 0, 0))
        return Ring(memory, free, full, go, slot_bytes)

    @property
    def fds(self) -> tuple[int, int, int, int]:
        return self.memory, self.free, self.full, self.go

    def mapped(self) -> np.ndarray[Any, Any]:
        size = RING_SLOTS * self.slot_bytes
        slots = np.frombuffer(mmap.mmap(self.memory, size), np.uint8).reshape(RING_SLOTS, self.slot_bytes)
        return slots[:, _SKEW_BYTES:]


def send_ring(
    ring: Ring,
    slots: np.ndarray[Any, Any],
    sizes: Sequence[int],
    data: np.ndarray[Any, Any],
    begin: Callable[[], None],
) -> None:
    os.eventfd_read(ring.go)
    begin()
    at = 0
    for number, size in enumerate(sizes):
        os.eventfd_read(ring.free)
        slots[number % RING_SLOTS, :size] = data[at : at + size]
        os.eventfd_write(ring.full, 1)
        at += size


def receive_ring(
    ring: Ring, slots: np.ndarray[Any, Any], sizes: Sequence[int], into: np.ndarray[Any, Any], keep: bool = False
) -> None:
    """``keep``: one after the other into memory for all, where the one buffer is meant otherwise."""
    os.eventfd_write(ring.go, 1)
    at = 0
    for number, size in enumerate(sizes):
        os.eventfd_read(ring.full)
        into[at : at + size] = slots[number % RING_SLOTS, :size]
        os.eventfd_write(ring.free, 1)
        if keep:
            at += size


class Gloo:
    """One end of a process group of two: rank 0 sends."""

    def __init__(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 1, wait_for_workers=False)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=60)
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._store = store

    def send(self, sizes: Sequence[int], data: np.ndarray[Any, Any], begin: Callable[[], None]) -> None:
        import torch

        begin()
        whole = torch.from_numpy(data)
        for size in sizes:
            self._group.send([whole[:size]], 1, 0).wait()

    def receive(self, sizes: Sequence[int], buffer: np.ndarray[Any, Any]) -> None:
        import torch

        whole = torch.from_numpy(buffer)
        for size in sizes:
            self._group.recv([whole[:size]], 0, 0).wait()
