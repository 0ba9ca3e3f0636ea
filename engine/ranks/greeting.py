"""How two ranks of an instance find out that they belong together, before anything else is said.

Both prove that they know the instance's key, neither sends it: each answers the other's fresh challenge with an HMAC of
it. A stranger learns nothing and is closed; one who knows the key but is another rank, plan or version is told why.
Frames are a length (4 bytes, big endian) and as many bytes of msgpack, here of at most 1 KiB.
"""

import asyncio
import hmac
import secrets
import socket
from dataclasses import dataclass
from typing import Any

import msgpack

from biphase.protos.parallel_plan import ParallelPlan

VERSION = 1
TIMEOUT_S = 5.0
_MAX_BYTES = 1024
_NONCE_BYTES = 16


class Stranger(Exception):
    """The other end is not, or does not prove to be, a rank of this instance; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who this process is among the ranks of which instance."""

    instance: str
    plan: ParallelPlan
    rank: int
    key: str

    def proof(self, challenge: bytes, rank: int) -> bytes:
        """That ``rank`` knows the key and was asked ``challenge``."""
        facts = f"{VERSION} {self.instance} {self.plan.tp} {self.plan.pp} {rank} ".encode()
        return hmac.digest(bytes.fromhex(self.key), facts + challenge, "sha256")


async def greet_follower(connection: socket.socket, us: Membership) -> int:
    """Rank 0's part on a fresh connection: the rank at its other end. Raises Stranger, OSError or TimeoutError."""
    async with asyncio.timeout(TIMEOUT_S):
        hello = await _receive(connection)
        rank, theirs = hello.get("rank"), hello.get("challenge")
        if not isinstance(rank, int) or not isinstance(theirs, bytes) or len(theirs) != _NONCE_BYTES:
            raise Stranger("no greeting of a rank")
        refusal = _reason_against(hello, us)
        ours = secrets.token_bytes(_NONCE_BYTES)
        await _send(connection, {"challenge": ours})
        proof = (await _receive(connection)).get("proof")
        if not isinstance(proof, bytes) or not hmac.compare_digest(proof, us.proof(ours, rank)):
            # a rank of another plan proves other facts; it is told, whoever it is: the plan is no secret
            await _send(connection, {"refused": refusal or "the rank keys differ"})
            raise Stranger(refusal or f"rank {rank} does not know the key")
        await _send(connection, {"proof": us.proof(theirs, 0)})
        return rank


async def greet_leader(connection: socket.socket, us: Membership) -> None:
    """A follower's part. Raises Stranger, OSError or TimeoutError."""
    async with asyncio.timeout(TIMEOUT_S):
        ours = secrets.token_bytes(_NONCE_BYTES)
        facts = {"version": VERSION, "instance": us.instance, "tp": us.plan.tp, "pp": us.plan.pp}
        await _send(connection, {"rank": us.rank, "challenge": ours, **facts})
        theirs = (await _receive(connection)).get("challenge")
        if not isinstance(theirs, bytes) or len(theirs) != _NONCE_BYTES:
            raise Stranger("no greeting of a rank 0")
        await _send(connection, {"proof": us.proof(theirs, us.rank)})
        answer = await _receive(connection)
        if "refused" in answer:
            raise Stranger(f"rank 0 refuses: {answer['refused']}")
        proof = answer.get("proof")
        if not isinstance(proof, bytes) or not hmac.compare_digest(proof, us.proof(ours, 0)):
            raise Stranger("rank 0 does not know the key")


def _reason_against(hello: dict[str, Any], us: Membership) -> str:
    """What of the other's facts differs, in one line; empty where nothing does."""
    ours = {"version": VERSION, "instance": us.instance, "tp": us.plan.tp, "pp": us.plan.pp}
    for name, value in ours.items():
        if hello.get(name) != value:
            return f"its {name} is {str(hello.get(name))[:80]!r}, rank 0 has {str(value)!r}"
    return ""


async def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    payload = msgpack.packb(message)
    await asyncio.get_running_loop().sock_sendall(connection, len(payload).to_bytes(4, "big") + payload)


async def _receive(connection: socket.socket) -> dict[str, Any]:
    size = int.from_bytes(await _exactly(connection, 4), "big")
    if size > _MAX_BYTES:
        raise Stranger(f"a greeting of {size} bytes, the limit is {_MAX_BYTES}")
    try:
        message = msgpack.unpackb(await _exactly(connection, size))
    except ValueError as error:
        raise Stranger("bytes that are no greeting") from error
    if not isinstance(message, dict):
        raise Stranger("bytes that are no greeting")
    return message


async def _exactly(connection: socket.socket, size: int) -> bytes:
    loop, parts = asyncio.get_running_loop(), bytearray()
    while len(parts) < size:
        part = await loop.sock_recv(connection, size - len(parts))
        if not part:
            raise Stranger("it closed the connection")
        parts += part
    return bytes(parts)
