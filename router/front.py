"""The front door's inside: admits requests, keeps the table of the live ones, and answers questions about itself."""

import asyncio
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

from biphase.protos import controller_pb2
from biphase.protos.errors import (
    BiphaseError,
    Cancelled,
    DeadlinePassed,
    InvalidRequest,
    Overloaded,
    RequestExists,
    RequestNotFound,
    Unavailable,
)
from biphase.protos.ids import RequestId
from biphase.router.config import RouterConfig
from biphase.router.counters import Counters, process_counters
from biphase.router.deadline import has_run_out
from biphase.router.dispatcher import Dispatcher
from biphase.router.effects import Replay
from biphase.router.fleet import Fleet
from biphase.router.links import LegRequest
from biphase.router.observe import ending_of, num_chars, seen_by
from biphase.router.output import Output, TextMaker
from biphase.router.report import LoadReport
from biphase.router.report_wire import report_to_proto
from biphase.router.request import Request
from biphase.router.validate import Asked, Capacity, check_asked, resolve
from biphase.router.view import InstanceKey, Pair, Rules

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

INLINE_PROMPT_CHARS = 2048
"""Longer prompts are tokenized in a thread: the loop has other streams to serve."""


class PromptTokenizer(Protocol):
    """What the front door needs of a tokenizer (biphase.router.tokenizer)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def longest_token(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def generation_defaults(self) -> dict[str, float]: ...

    @property
    def name(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]: ...

    def detokenizer(self) -> TextMaker: ...


class Front:
    """Owns the requests from admission to the end of their last leg. Everything runs in one loop.

    ``async with`` it: leaving ends what still lives and closes every link.
    """

    def __init__(self, config: RouterConfig, tokenizer: PromptTokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.counters = Counters("accepted", "finished", "cancelled", "tokens")
        self.fleet = Fleet(config.name, config.waits, self._fleet_changed)
        self._load = LoadReport()
        self.requests: dict[RequestId, Request] = {}
        """Live ones: some client waits, or some leg has not ended."""
        self.is_draining = False
        self.started_s = asyncio.get_running_loop().time()
        rules = Rules(
            mode=config.mode,
            colocated=config.is_colocated,
            local_prefill_max_tokens=config.local_prefill_max_tokens,
            no_prefill_s=config.waits.no_prefill_s,
            no_decode_s=config.waits.no_decode_s,
            no_generation_s=config.waits.no_generation_s,
        )
        self._loop = asyncio.get_running_loop()
        self._dispatcher = Dispatcher(self.fleet, rules, config.limits, self.counters, config.replay_share)
        self._client_ids: dict[str, RequestId] = {}
        self._sequence = itertools.count()
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._tokenizing.submit(int).result()  # the thread is there from the start: no count of threads moves later
        self._num_tokenizing = 0
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End what still lives, wait a moment for its legs, close every link. May be called twice."""
        self.is_draining = True
        for request in list(self.requests.values()):
            request.end(Unavailable(f"{request.id}: the router is shutting down"))
        await self._until_idle(self.config.waits.stats_s + 0.5)
        self._dispatcher.close()
        await self.fleet.close()
        self._tokenizing.shutdown(wait=False)

    @property
    def served_name(self) -> str:
        """What clients may call the model."""
        info = self.fleet.any_info()
        return self.config.served_model_name or (info.model.name if info else "") or self.tokenizer.name

    def capacity(self) -> Capacity:
        return self.fleet.capacity(vocab_size=self.tokenizer.vocab_size, max_context=self.tokenizer.max_context)

    # ---- in

    async def admit(self, asked: Asked, *, time_left_s: float | None) -> Request:
        """Check a request, tokenize it and put it into the queue. Raises the BiphaseError that the client gets."""
        arrived_s = self._loop.time()
        deadline_s = None if time_left_s is None else arrived_s + time_left_s
        request_id = RequestId(f"req-{secrets.token_hex(8)}")
        reserved = was_read = False
        try:
            if self.is_draining:
                raise Unavailable("the router is shutting down and takes no new request")
            limits = self.config.limits
            check_asked(
                asked,
                served_name=self.served_name,
                limits=limits,
                has_chat_template=self.tokenizer.has_chat_template,
            )
            self._reserve(asked.request_id, request_id)
            reserved = True
            self._dispatcher.check_requests(self._num_tokenizing)
            self._num_tokenizing += 1
            try:
                prompt_ids = await self._tokenize(asked)
            finally:
                self._num_tokenizing -= 1
            self._load.offered(len(prompt_ids), prompt_chars=num_chars(asked))
            was_read = True
            if deadline_s is not None and self._loop.time() >= deadline_s:
                raise DeadlinePassed("the client's deadline passed before its request was read")
            sampling = resolve(
                asked.sampling,
                prompt_ids,
                capacity=self.capacity(),
                limits=limits,
                model_defaults=self.tokenizer.generation_defaults,
                drawn_seed=secrets.randbits(63),
            )
            self._dispatcher.check_requests()
            self._dispatcher.check_tokens(len(prompt_ids))
        except BaseException as error:
            if reserved:
                self._client_ids.pop(asked.request_id, None)
            gone = isinstance(error, asyncio.CancelledError)
            if gone and has_run_out(self._loop.time(), arrived_s=arrived_s, deadline_s=deadline_s):
                late = DeadlinePassed("the client's deadline passed while its request was read")
                self._report_refusal(asked, late, was_read=was_read)
            else:
                self._report_refusal(asked, error, was_read=was_read)
            if isinstance(error, BiphaseError):
                self.counters.add(f"refused_{error.code.name.lower()}")
                logger.info("%s refused: %s %s", request_id, error.code.name, error)
            raise
        output = Output(self.tokenizer.detokenizer(), asked.sampling.stop, min_tokens=sampling.min_tokens)
        request = Request(
            asked=LegRequest(
                request_id=request_id, token_ids=prompt_ids, num_prompt_tokens=len(prompt_ids), sampling=sampling
            ),
            client_request_id=asked.request_id,
            output=output,
            host=self,
            limits=limits,
            waits=self.config.waits,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            sequence=next(self._sequence),
            max_replays=self.config.max_replays,
        )
        self.requests[request_id] = request
        self.counters.add("accepted")
        logger.info(
            "%s accepted: client id %r, %d prompt tokens, max_tokens %d",
            request_id,
            asked.request_id,
            len(prompt_ids),
            sampling.max_tokens,
        )
        self._dispatcher.submit(request)
        return request

    def _report_refusal(self, asked: Asked, error: BaseException, *, was_read: bool) -> None:
        """Load that was turned away is load; a mistake of the user's, or a client that went before it was read, is none."""
        if not was_read:
            if not isinstance(error, Overloaded | Unavailable | DeadlinePassed):
                return
            if asked.token_ids is not None:
                self._load.offered(len(asked.token_ids))
            else:
                self._load.offered_unread(num_chars(asked))
        self._load.ended(ending_of(error), output_tokens=0, ttft_ms=None, tpot_ms=None)

    def _reserve(self, client_id: str, request_id: RequestId) -> None:
        if not client_id:
            return
        if client_id in self._client_ids or RequestId(client_id) in self.requests:
            raise RequestExists(f"request id {client_id!r} belongs to a live request")
        self._client_ids[client_id] = request_id

    async def _tokenize(self, asked: Asked) -> list[int]:
        if asked.token_ids is not None:
            return list(asked.token_ids)
        if asked.text is not None:
            return await self._encode(len(asked.text), self.tokenizer.encode, asked.text)
        assert asked.chat is not None
        length = sum(len(content) for _, content in asked.chat)
        return await self._encode(length, self.tokenizer.encode_chat, asked.chat)

    async def _encode(self, length: int, encode: Callable[[_T], list[int]], prompt: _T) -> list[int]:
        context, longest = self.capacity().max_model_len, self.tokenizer.longest_token
        if length > context * longest:  # long before it is tokenized: that would take seconds
            raise InvalidRequest(
                f"the prompt has {length} characters, more than a context of {context} tokens can hold "
                f"(at most {context * longest})"
            )
        if length <= INLINE_PROMPT_CHARS:
            return encode(prompt)
        return await self._loop.run_in_executor(self._tokenizing, encode, prompt)

    def abort(self, either_id: str) -> None:
        """End a live request by its own or its client's id. Raises RequestNotFound."""
        request_id = self._client_ids.get(either_id, RequestId(either_id))
        request = self.requests.get(request_id)
        if request is None or request.is_over:
            raise RequestNotFound(f"no live request has the id {either_id[:128]!r}")
        request.end(Cancelled(f"{request.id} was aborted"))

    # ---- what requests ask for (RequestHost)

    def requeue(self, request: Request) -> None:
        self._dispatcher.forget(request)
        request.promised_decode = None
        self._dispatcher.submit(request)

    def seek_decode(self, request: Request) -> None:
        self._dispatcher.seek_decode(request)

    def can_pull_again(self, request: Request, gone: InstanceKey | None) -> bool:
        return self._dispatcher.can_pull(request, but=gone)

    def pulls_again(self, request: Request) -> None:
        self.counters.add("pulls_again")

    def replay(self, request: Request, effect: Replay, pair: Pair | None) -> None:
        self.counters.add("replays")
        self.counters.add(f"replays_{effect.cause}")
        if effect.blames_pair and pair is not None:
            self.fleet.pairs.failed(pair, effect.detail, self._loop.time())
        self.requeue(request)

    def went_on(self, request: Request) -> None:
        self._dispatcher.went_on(request)

    def handed_off(self, request: Request, pair: Pair) -> None:
        self.fleet.pairs.worked(pair)

    def decided(self, request: Request) -> None:
        self.counters.add(f"decisions_{request.record.decision}_{request.record.decision_reason}")

    def over(self, request: Request, error: BiphaseError | None) -> None:
        self._dispatcher.forget(request)
        if request.client_request_id:
            self._client_ids.pop(request.client_request_id, None)
        self.counters.add("tokens", request.num_output_tokens)
        seen = seen_by(request, self._loop.time())
        ttft_ms = seen.ttft_ms if seen.output_tokens else None
        ending = "cancelled" if isinstance(error, Overloaded) else ending_of(error)  # it read too slowly
        self._load.ended(ending, output_tokens=seen.output_tokens, ttft_ms=ttft_ms, tpot_ms=seen.tpot_ms)
        self._log_end(request, error)
        if error is None:
            self.counters.add("finished")
        elif isinstance(error, Cancelled):
            self.counters.add("cancelled")
            self.counters.add(f"cancelled_in_{request.record.ended_in}")
        else:
            self.counters.add(f"failed_{error.code.name.lower()}")

    def closed(self, request: Request) -> None:
        self.requests.pop(request.id, None)
        self._changed.set()

    def _log_end(self, request: Request, error: BiphaseError | None) -> None:
        record = request.record
        reason = request.finish_reason
        if error is not None:
            how = f"ended {error.code.name}: {error}"
        else:
            how = f"finished {reason.value if reason is not None else ''}"
        logger.info(
            "%s %s; %d output tokens in %.0f ms, %s %s, prefill %s, decode %s",
            request.id,
            how,
            request.num_output_tokens,
            (self._loop.time() - record.arrived_s) * 1000,
            record.decision or "not placed",
            record.decision_reason,
            record.instances.get("prefill", "-"),
            record.instances.get("decode", "-"),
        )

    # ---- what it reports

    def report(self) -> controller_pb2.RouterReport:
        """What the controller hears from this router about once a second."""
        now_s = self._loop.time()
        live = [request for request in self.requests.values() if not request.is_over]
        return report_to_proto(
            self._load.snapshot(seen_by(request, now_s) for request in live),
            broken_pairs=self.fleet.pairs.troubles(),
            name=self.config.name,
            incarnation=self.config.incarnation,
            pid=os.getpid(),
            uptime_s=now_s - self.started_s,
            membership_epoch=self.fleet.membership_epoch,
            queued_requests=self._dispatcher.queued_requests,
            queued_tokens=self._dispatcher.queued_tokens,
            running_requests=sum(1 for request in live if request.open_legs),
            replays=self.counters.get("replays"),
        )

    # ---- the whole

    async def drain(self, within_s: float) -> bool:
        """Take nothing new and let live requests end; whether all did in time."""
        self.is_draining = True
        return await self._until_idle(within_s)

    async def _until_idle(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while self.requests:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _fleet_changed(self) -> None:
        self._dispatcher.schedule()

    def snapshot(self) -> dict[str, int]:
        """Every counter by name."""
        return {
            **self.counters.snapshot(),
            "live_requests": len(self.requests),
            "queued_requests": self._dispatcher.queued_requests,
            "queued_tokens": self._dispatcher.queued_tokens,
            "legs": self.fleet.num_legs,
            **process_counters(),
        }

    def __repr__(self) -> str:
        return f"<Front [{len(self.requests)} live, {self._dispatcher!r}]>"
