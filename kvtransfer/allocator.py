"""How this process's C allocator treats the memory of messages."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1024 * 1024


def keep_freed_memory() -> None:
    """Have malloc keep the memory of one message for the next, for the whole process. Idempotent.

    A message of 1 MiB is above glibc's first mmap threshold and close to its trim threshold: each goes back to the
    kernel when it is freed, and the next one pays 256 page faults for every copy of it that gRPC makes, most of them
    with the GIL held. At most 128 MiB of freed memory stay. Where the C library is not glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        mallopt(_M_TRIM_THRESHOLD, 128 * _MIB)
        mallopt(_M_TOP_PAD, 16 * _MIB)
