"""The Python client of a biphase router, sync and async. Needs grpcio and protobuf; no torch, no Ray, no pydantic.

with Client("127.0.0.1:8700") as client:
    for delta in client.generate("Once upon a time", max_tokens=64):
        print(delta.text, end="", flush=True)
"""

from biphase.client.async_client import AsyncClient, AsyncGeneration
from biphase.client.sync_client import Client, Generation
from biphase.client.values import Accepted, Delta, Instance, Result, ServedModel, ServerInfo, Timeline, Usage
from biphase.protos.errors import (
    Aborted,
    BiphaseError,
    Cancelled,
    DeadlinePassed,
    HandoffFailed,
    Internal,
    InvalidRequest,
    Overloaded,
    RequestExists,
    RequestNotFound,
    Unavailable,
    UnknownModel,
)

__all__ = [
    "Aborted",
    "Accepted",
    "AsyncClient",
    "AsyncGeneration",
    "BiphaseError",
    "Cancelled",
    "Client",
    "DeadlinePassed",
    "Delta",
    "Generation",
    "HandoffFailed",
    "Instance",
    "Internal",
    "InvalidRequest",
    "Overloaded",
    "RequestExists",
    "RequestNotFound",
    "Result",
    "ServedModel",
    "ServerInfo",
    "Timeline",
    "Unavailable",
    "UnknownModel",
    "Usage",
]
