"""What two instances must agree on before KV moves between them. Pure."""

from dataclasses import dataclass, fields

from biphase.kernels.kv_layout import KvLayout
from biphase.protos import kv_pb2
from biphase.protos.ids import Incarnation, InstanceName

PROTOCOL = 1
DIGEST = "xxh3-bytes"
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
    "rope",
    "block_size",
    "digest",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSignatureValue:
    """One instance's KV as the handshake compares it. ``rope`` is any text that differs where rotations differ."""

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
    digest: str = DIGEST
    codecs: tuple[str, ...] = ("raw",)
    max_message_bytes: int = MAX_FRAME_BYTES

    @staticmethod
    def of(layout: KvLayout, *, instance: str, incarnation: int, model_hash: bytes, rope: str) -> "KvSignatureValue":
        """The signature of an instance whose pool has this layout."""
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
        )

    def to_proto(self) -> kv_pb2.KvSignature:
        return kv_pb2.KvSignature(**{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def from_proto(message: kv_pb2.KvSignature) -> "KvSignatureValue":
        values = {field.name: getattr(message, field.name) for field in fields(KvSignatureValue)}
        return KvSignatureValue(**{**values, "codecs": tuple(message.codecs)})


def mismatch(target: KvSignatureValue, source: KvSignatureValue) -> str | None:
    """Why ``target`` cannot take KV from ``source``: one line that names both sides, or None where it can."""
    reasons = []
    for name in _MUST_EQUAL:
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs != ours:
            reasons.append(f"{name} {_shown(theirs)} against {_shown(ours)}")
    if common_codec(target, source) is None:
        reasons.append(f"codecs {','.join(source.codecs)} against {','.join(target.codecs)}")
    for side in (source, target):
        if side.max_message_bytes < _LEAST_FRAME_BYTES:
            reasons.append(f"max_message_bytes {side.max_message_bytes} of {side.instance} under {_LEAST_FRAME_BYTES}")
    if not reasons:
        return None
    return f"{source.instance} cannot hand KV over to {target.instance}: {'; '.join(reasons)}"


def common_codec(target: KvSignatureValue, source: KvSignatureValue) -> str | None:
    """The first codec of the target that the source speaks too."""
    return next((codec for codec in target.codecs if codec in source.codecs), None)


def _shown(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)
