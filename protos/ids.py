"""Ids as types, so that a leg's id cannot pass for a request's."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""The router's own id of one user request."""

LegId = NewType("LegId", int)
"""One request's work on one instance; unique per router, 64 bits."""

SeqId = NewType("SeqId", int)
"""One sequence inside an instance; unique in that instance's life."""

BlockId = NewType("BlockId", int)
"""Index of a block of block_size tokens in an instance's KV pool."""

InstanceName = NewType("InstanceName", str)
"""Stable name of an instance, e.g. prefill-0; its lives are told apart by the incarnation."""

Incarnation = NewType("Incarnation", int)
"""Which life of an instance; counts up."""

TicketId = NewType("TicketId", bytes)
"""16 random bytes: the right to pull one request's KV."""
