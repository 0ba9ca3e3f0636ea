"""Who of a decode instance pulls what of a ticket, from whom, by which wires and codec: the plan of one handoff."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack.codec import packed_bytes
from biphase.kvtransfer.codec_choice import RAW, CodecChoice, CodecChooser
from biphase.kvtransfer.pull_job import PartsPulled, PullJob, PullPart, Route
from biphase.kvtransfer.reshard import KvShape, moves
from biphase.kvtransfer.signature import BYTES_DIGEST, KvSignatureValue, RankEndpoint, common_codecs, common_digest
from biphase.protos.ids import BlockId, Incarnation, InstanceName
from biphase.protos.values import KvTicket

_log = logging.getLogger(__name__)

_MOST_CHOSEN = 4096


class Choice(Protocol):
    """A transport for a pair of ranks, and why it."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...


Choose = Callable[[RankEndpoint, RankEndpoint], Sequence[Choice]]
"""From our rank's and the source rank's endpoint: the transports to try, the best first; only those of both."""


class JobMaker:
    """Owned by the puller. ``layout``: of the whole model. ``chosen``: what pulls go by, by pair, and why: the first
    choice until one has come, then what brought the last."""

    def __init__(
        self, signature: KvSignatureValue, layout: KvLayout, choose: Choose | None, codecs: CodecChooser | None
    ) -> None:
        self.chosen: dict[str, str] = {}
        self._first_choice: dict[str, str] = {}
        self._signature = signature
        self._layout = layout
        self._choose = choose
        self._codecs = codecs or CodecChooser(wanted=signature.codecs[0])
        self._codec_choices: dict[str, CodecChoice] = {}
        """The last of each source, but for raw as configured."""
        self._lives: dict[InstanceName, Incarnation] = {}
        """The incarnation of each source that the chooser knows."""

    def jobs(
        self,
        ticket: KvTicket,
        epoch: int,
        blocks: Sequence[BlockId],
        source: KvSignatureValue,
        *,
        timeout_s: float,
        beside_decode: bool,
    ) -> list[PullJob]:
        """By rank of ours. Rank 0 takes the trailer, from the source's rank 0."""
        ours, theirs = shape_of(self._signature), shape_of(source)
        found = moves(theirs, ours, ticket.num_tokens, turn=int.from_bytes(ticket.id[:4], "little"))
        job = PullJob(
            ticket=ticket.id,
            epoch=epoch,
            instance=ticket.instance,
            incarnation=ticket.incarnation,
            blocks=tuple(blocks),
            group_size=source.block_size,
            codec=self._codec(ticket, source),
            digest=common_digest(self._signature, source) or BYTES_DIGEST,
            timeout_s=timeout_s,
            beside_decode=beside_decode,
            parts=(),
        )
        jobs = []
        for rank in range(ours.plan.num_ranks):
            parts = [
                PullPart(
                    source_rank=move.source_rank,
                    box=move.box,
                    with_trailer=rank == 0 and move.source_rank == 0,
                    routes=self._routes(ticket, source, rank, move.source_rank),
                )
                for move in found
                if move.target_rank == rank
            ]
            if rank == 0 and not any(part.with_trailer for part in parts):
                nothing = replace(theirs.box(0, ticket.num_tokens), token_start=ticket.num_tokens)
                routes = (Route(transport="grpc", address=ticket.kv_address),)
                parts.append(PullPart(source_rank=0, box=nothing, with_trailer=True, routes=routes))
            jobs.append(replace(job, parts=tuple(parts)))
        return jobs

    def described(self) -> dict[str, str]:
        """``chosen``, with the codec of the last pull and why where another than raw was asked for."""
        found = {}
        for pair, text in self.chosen.items():
            codec = self._codec_choices.get(pair.rpartition(" of ")[2])
            found[pair] = text if codec is None else f"{text}; KV as {codec.codec}: {codec.reason}"
        return found

    def observe(self, ticket: KvTicket, jobs: Sequence[PullJob], pulled: Sequence[PartsPulled]) -> None:
        """Which wires a pull came by, and what it has shown of them where the KV waited for them and not they for it."""
        for rank, (job, of_rank) in enumerate(zip(jobs, pulled, strict=True)):
            for part, name, why in zip(job.parts, of_rank.carried_by, of_rank.instead, strict=True):
                pair = _pair(rank, part.source_rank, ticket)
                if pair in self._first_choice:
                    self._note(pair, f"{name}: {why}" if why else self._first_choice[pair])
        self._codecs.observe(
            ticket.instance,
            jobs[0].codec,
            raw_bytes=sum(part.tail_raw_bytes for part in pulled),
            wire_bytes=sum(part.tail_wire_bytes for part in pulled),
            seconds=max(part.tail_s for part in pulled),
        )

    def _codec(self, ticket: KvTicket, source: KvSignatureValue) -> str:
        if self._lives.get(ticket.instance) != ticket.incarnation:
            self._codecs.forget(ticket.instance)
            self._lives[ticket.instance] = ticket.incarnation
        packed_by = replace(self._layout, block_size=source.block_size)
        whole = self._layout.box(ticket.num_tokens)
        sizes = {codec: packed_bytes(packed_by, whole, codec) for codec in common_codecs(self._signature, source)}
        choice = self._codecs.choose(ticket.instance, sizes)
        if (choice.codec, self._codecs.wanted) != (RAW, RAW):
            self._codec_choices[ticket.instance] = choice
        return choice.codec

    def _routes(self, ticket: KvTicket, source: KvSignatureValue, rank: int, source_rank: int) -> tuple[Route, ...]:
        ours = self._signature.ranks[rank] if self._signature.ranks else RankEndpoint()
        theirs = source.ranks[source_rank] if source.ranks else RankEndpoint()
        grpc = ticket.kv_address if source_rank == 0 else theirs.grpc  # rank 0 is where the router found it
        routes: list[Route] = []
        for choice in self._choose(ours, theirs) if self._choose is not None else ():
            address = grpc if choice.name == "grpc" else theirs.tcp
            if address:
                if not routes:
                    self._choose_first(_pair(rank, source_rank, ticket), f"{choice.name}: {choice.reason}")
                routes.append(Route(transport=choice.name, address=address))
        return tuple(routes) or (Route(transport="grpc", address=grpc),)

    def _choose_first(self, pair: str, text: str) -> None:
        if self._first_choice.get(pair) != text:
            if len(self._first_choice) >= _MOST_CHOSEN:
                self._first_choice.clear()
                self.chosen.clear()
            self._first_choice[pair] = text
            self._note(pair, text)

    def _note(self, pair: str, text: str) -> None:
        """Say what it is and why, once per pair and change."""
        if self.chosen.get(pair) != text:
            self.chosen[pair] = text
            _log.info("%s pulls by %s", pair, text)


def _pair(rank: int, source_rank: int, ticket: KvTicket) -> str:
    return f"rank {rank} from rank {source_rank} of {ticket.instance}"


def shape_of(signature: KvSignatureValue) -> KvShape:
    return KvShape(
        plan=signature.plan,
        num_layers=signature.num_layers,
        num_kv_heads=signature.num_kv_heads,
        block_size=signature.block_size,
    )
