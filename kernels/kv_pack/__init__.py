"""Gathering a box of one request's KV into contiguous bytes, and scattering such bytes back into blocks."""

from biphase.kernels.kv_pack.cpu import CpuKvMemory
from biphase.kernels.kv_pack.memory import KvMemory
from biphase.kernels.kv_pack.reference import pack_reference, unpack_reference

__all__ = ["CpuKvMemory", "KvMemory", "pack_reference", "unpack_reference"]
