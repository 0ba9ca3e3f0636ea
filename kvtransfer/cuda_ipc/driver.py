"""What the plane asks of a GPU: memory that other processes can open, views of it, and copies that tell when they are over.

By the driver's own functions: torch's caching allocator cuts its memory in ways that change, and what it offers for
sharing counts references through files. Handles are 64 bytes, sent as they are.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class Driver(Protocol):
    device: torch.device

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, never freed: readers may have it open until this process ends."""
        ...

    def handle(self, address: int) -> bytes:
        """What another process opens it by."""
        ...

    def open(self, handle: bytes) -> int:
        """Another process's memory, seen from our GPU. Raises ConnectionError."""
        ...

    def close(self, address: int) -> None: ...

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """Bytes there, not copied."""
        ...

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """New memory for the target of a copy."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], bool]:
        """Begin a copy; the function tells whether it is over."""
        ...


class CudaDriver:
    """One GPU's, by torch's context of it."""

    def __init__(self, device: str) -> None:
        """Raises ConnectionError where there is none."""
        if not torch.cuda.is_available():
            raise ConnectionError("no cuda_ipc without a CUDA GPU")
        self.device = torch.device(device)
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes the context that the driver's calls below go by
            self._stream = torch.cuda.Stream(self.device, priority=-1)

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def handle(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        if len(handle) != HANDLE_BYTES:
            raise ConnectionError(f"a CUDA handle of {len(handle)} bytes, not {HANDLE_BYTES}")
        address = ctypes.c_uint64()
        theirs = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(_Bytes(address, num_bytes), device=self.device)

    def buffer(self, num_bytes: int) -> torch.Tensor:
        # of the copies' own stream: used again there only, behind a copy that was given up
        with torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], bool]:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            over = torch.cuda.Event()
            over.record()
        return over.query

    def _call(self, name: str, *args: Any) -> None:
        with torch.cuda.device(self.device):
            code = getattr(_library(), name)(*args)
        if code:
            text = ctypes.c_char_p()
            _library().cuGetErrorString(code, ctypes.byref(text))
            raise ConnectionError(f"{name} failed: {(text.value or b'?').decode()} ({code})")


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which goes by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _Bytes:
    """Memory of others as torch takes it over: without a copy, and without ever freeing it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConnectionError(f"no CUDA driver: {error}") from None
