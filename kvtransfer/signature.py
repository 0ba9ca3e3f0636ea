"""What two instances must agree on before KV moves between them. Pure."""

import struct
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

import xxhash

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack.codec import CODECS
from biphase.protos import kv_pb2
from biphase.protos.ids import Incarnation, InstanceName
from biphase.protos.parallel_plan import ParallelPlan

PROTOCOL = 2
BYTES_DIGEST = "xxh3-bytes"
"""A piece's digest is over its bytes: every instance can."""

SUM_DIGEST = "xxh3-sum64"
"""It is over the position-weighted sum of its bytes (kernels.kv_pack.checksum), which the kernel that packs takes."""

HEADER_DIGEST = "xxh3-header"
"""It is over header and ticket alone: for benches, never offered unless asked for."""

MAX_FRAME_BYTES = 1024 * 1024
"""Largest frame we send by default: header and payload of one piece."""

_LEAST_FRAME_BYTES = 64 * 1024
_MUST_EQUAL = (
    "protocol",
    "model_hash",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "dtype",
    "kv_scales",
    "rope",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEndpoint:
    """Where one rank of an instance can be reached (``host:port``), and what decides over which transport.

    ``host_id`` is equal where memory can be shared, empty where nothing is known; ``device`` is ``cpu`` or torch's name;
    ``rdma``: whether it has an RDMA port that is in use.
    """

    grpc: str = ""
    tcp: str = ""
    host_id: str = ""
    device: str = "cpu"
    transports: tuple[str, ...] = ("grpc",)
    rdma: bool = False

    def to_proto(self) -> kv_pb2.RankEndpoint:
        return kv_pb2.RankEndpoint(**asdict(self))

    @staticmethod
    def from_proto(message: kv_pb2.RankEndpoint) -> "RankEndpoint":
        return RankEndpoint(
            grpc=message.grpc,
            tcp=message.tcp,
            host_id=message.host_id,
            device=message.device,
            transports=tuple(message.transports),
            rdma=message.rdma,
        )


class _Model(Protocol):
    @property
    def model_hash(self) -> bytes: ...


class _Memory(Protocol):
    @property
    def content_digest(self) -> str: ...


class SignedEngine(Protocol):
    """What a signature says of an engine, which this folder does not know; ``full_layout``: of the whole model."""

    full_layout: KvLayout
    plan: ParallelPlan
    rope_signature: str

    @property
    def model_info(self) -> _Model: ...

    @property
    def kv_memory(self) -> _Memory: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSignatureValue:
    """One instance's KV as the handshake compares it.

    ``rope`` is any text that differs where rotations differ, ``kv_scales`` a digest of an fp8 pool's scales.
    ``digests`` and ``codecs`` are in order of preference. ``block_size`` and ``plan`` need not agree. ``ranks``: by rank;
    empty where the one rank is where it was reached.
    """

    instance: InstanceName
    incarnation: Incarnation
    model_hash: bytes
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rope: str
    block_size: int
    protocol: int = PROTOCOL
    kv_scales: bytes = b""
    digests: tuple[str, ...] = (BYTES_DIGEST,)
    codecs: tuple[str, ...] = ("raw",)
    max_message_bytes: int = MAX_FRAME_BYTES
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    ranks: tuple[RankEndpoint, ...] = ()

    @staticmethod
    def of(
        layout: KvLayout,
        *,
        instance: str,
        incarnation: int,
        model_hash: bytes,
        rope: str,
        content_digest: str = "bytes",
        plan: ParallelPlan | None = None,
        ranks: tuple[RankEndpoint, ...] = (),
        codecs: tuple[str, ...] = ("raw",),
    ) -> "KvSignatureValue":
        """The signature of an instance whose ranks' pools make up this layout; ``content_digest`` as its KvMemory says."""
        return KvSignatureValue(
            instance=InstanceName(instance),
            incarnation=Incarnation(incarnation),
            model_hash=model_hash,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
            rope=rope,
            block_size=layout.block_size,
            kv_scales=_scales_digest(layout),
            digests=(SUM_DIGEST, BYTES_DIGEST) if content_digest == "sum64" else (BYTES_DIGEST,),
            codecs=codecs,
            plan=plan or ParallelPlan(),
            ranks=ranks,
        )

    @staticmethod
    def of_engine(
        engine: SignedEngine,
        *,
        instance: str,
        incarnation: int,
        kv_codec: str = "raw",
        ranks: tuple[RankEndpoint, ...] = (),
    ) -> "KvSignatureValue":
        """The signature of the instance that runs this engine, on whichever rank; ``kv_codec``: as offered_codecs takes it."""
        return KvSignatureValue.of(
            engine.full_layout,
            instance=instance,
            incarnation=incarnation,
            model_hash=engine.model_info.model_hash,
            rope=engine.rope_signature,
            content_digest=engine.kv_memory.content_digest,
            plan=engine.plan,
            ranks=ranks,
            codecs=offered_codecs(kv_codec, engine.full_layout.dtype),
        )

    def to_proto(self) -> kv_pb2.KvSignature:
        return kv_pb2.KvSignature(
            **{name: getattr(self, name) for name in _PLAIN},
            tensor_parallel_size=self.plan.tp,
            pipeline_parallel_size=self.plan.pp,
            ranks=[rank.to_proto() for rank in self.ranks],
        )

    @staticmethod
    def from_proto(message: kv_pb2.KvSignature) -> "KvSignatureValue":
        """Raises ValueError, one line, for a message that no instance of ours sends."""
        values = {name: getattr(message, name) for name in _PLAIN}
        plan = ParallelPlan(tp=message.tensor_parallel_size or 1, pp=message.pipeline_parallel_size or 1)
        if len(message.ranks) not in (0, plan.num_ranks):
            raise ValueError(f"{message.instance} names {len(message.ranks)} ranks, {plan} has {plan.num_ranks}")
        return KvSignatureValue(
            **{**values, "codecs": tuple(message.codecs), "digests": tuple(message.digests)},
            plan=plan,
            ranks=tuple(RankEndpoint.from_proto(rank) for rank in message.ranks),
        )


_PLAIN = tuple(each.name for each in fields(KvSignatureValue) if each.name not in ("plan", "ranks"))


def mismatch(target: KvSignatureValue, source: KvSignatureValue) -> str | None:
    """Why ``target`` cannot take KV from ``source``: one line that names both sides, or None where it can."""
    reasons = []
    for name in _MUST_EQUAL:
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs != ours:
            reasons.append(f"{name} {_shown(theirs)} against {_shown(ours)}")
    if not common_codecs(target, source):
        reasons.append(f"codecs {','.join(source.codecs)} against {','.join(target.codecs)}")
    if common_digest(target, source) is None:
        reasons.append(f"digests {','.join(source.digests)} against {','.join(target.digests)}")
    for side in (source, target):
        if side.max_message_bytes < _LEAST_FRAME_BYTES:
            reasons.append(f"max_message_bytes {side.max_message_bytes} of {side.instance} under {_LEAST_FRAME_BYTES}")
    if not reasons:
        return None
    return f"{source.instance} cannot hand KV over to {target.instance}: {'; '.join(reasons)}"


def offered_codecs(wanted: str, dtype: str) -> tuple[str, ...]:
    """The codecs of an instance that is to use ``wanted``, raw always being one of them; auto: all that its pool takes."""
    known = ("raw",) if dtype == "float8_e4m3fn" else ("raw", *CODECS)
    if wanted == "auto":
        return known
    return ("raw",) if wanted not in known or wanted == "raw" else (wanted, "raw")


def common_codecs(target: KvSignatureValue, source: KvSignatureValue) -> tuple[str, ...]:
    """The codecs of the target that the source speaks too, in its order."""
    return tuple(codec for codec in target.codecs if codec in source.codecs)


def common_digest(target: KvSignatureValue, source: KvSignatureValue) -> str | None:
    """The first digest of the target that the source speaks too."""
    return next((digest for digest in target.digests if digest in source.digests), None)


def _scales_digest(layout: KvLayout) -> bytes:
    """Over float32, as the kernels have them; in the layout's order."""
    if layout.kv_scales is None:
        return b""
    scales = [scale for layer in layout.kv_scales for heads in layer for scale in heads]
    return bytes(xxhash.xxh3_128(struct.pack(f"<{len(scales)}f", *scales)).digest())


def _shown(value: object) -> str:
    return (value.hex()[:16] or "none") if isinstance(value, bytes) else str(value)
