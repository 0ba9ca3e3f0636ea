"""The asynchronous client, on grpc.aio. Use it in one event loop, the one it was made in."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from biphase.client.failures import failure
from biphase.client.replies import ReplyFold, served_model, server_info
from biphase.client.requests import Options, generate_request, resolve_addresses
from biphase.client.routers import Attempts, Question, Routers
from biphase.client.values import Accepted, Delta, Result, ServedModel, ServerInfo
from biphase.protos import router_pb2
from biphase.protos.errors import BiphaseError, Cancelled, RequestNotFound, Unavailable
from biphase.protos.grpc_setup import channel_options
from biphase.protos.router_pb2_grpc import RouterStub


class AsyncGeneration:
    """One request's answer as it comes: iterate over it once with ``async for``, then ask for ``result``.

    Leaving the iteration early (``break``, an exception, the task's cancellation), the ``async with`` block, or calling
    ``close`` cancels the request on the server. A failed request raises the error of its status
    (biphase.protos.errors) out of the iteration.
    """

    def __init__(self, attempts: Attempts[Any]) -> None:
        self._attempts = attempts
        self._fold = ReplyFold(attempts.sent_at_s)
        self._error: BiphaseError | None = None

    @property
    def accepted(self) -> Accepted | None:
        """The router's acceptance, once iteration has begun."""
        return self._fold.accepted

    @property
    def result(self) -> Result:
        """The finished request. Raises RuntimeError before its end."""
        if self._fold.result is None:
            raise RuntimeError("the request has not finished: read the answer to its end first")
        return self._fold.result

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self._error is not None:
            raise self._error
        try:
            while True:
                try:
                    async for reply in self._attempts.call:
                        delta = self._fold.feed(reply, time.perf_counter())
                        if delta is not None:
                            yield delta
                    self._fold.end()
                    self._attempts.worked()
                    return
                except grpc.RpcError as error:
                    self._take_failure(error)
        except asyncio.CancelledError:
            # grpc.aio says CancelledError for a call that close() ended, too; only a cancelled task may hear it.
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self.close()

    def _take_failure(self, error: grpc.RpcError) -> None:
        """Send the request elsewhere where that may be; raises the error that ends it where not."""
        timeout_s = self._attempts.timeout_s
        told = failure(error, self._attempts.address, timeout_s=timeout_s, generating=True)
        closed = self._error is not None
        if closed or not self._attempts.go_on(told, time.perf_counter(), has_tokens=self._fold.has_tokens):
            self._error = told
            raise self._error from None
        self._fold = ReplyFold(self._attempts.sent_at_s)
        if self._error is not None:  # closed meanwhile
            self._attempts.call.cancel()

    async def text(self) -> str:
        """Read the answer to its end and return all of its text."""
        async for _ in self:
            pass
        return self.result.text

    def close(self) -> None:
        """Cancel the request unless it has ended. May be called twice, and by another task of the loop."""
        if self._fold.result is None and self._error is None:
            self._error = Cancelled("the request was cancelled by this client")
        self._attempts.call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Connections to one router or several: ``address`` is HOST:PORT, several with commas between them, or a sequence of
    them (default BIPHASE_ADDRESS, else 127.0.0.1:8700). Requests go round; one that ends UNAVAILABLE before its first token
    is sent to the next router, each is tried once.

    Make it inside a running event loop. Nothing is sent before the first call, so a wrong address shows there, as
    Unavailable.
    """

    def __init__(self, address: str | Sequence[str] | None = None) -> None:
        self._routers = Routers(resolve_addresses(address))
        self.address = ",".join(self._routers.addresses)
        self._channels = [
            grpc.aio.insecure_channel(one, channel_options(of_client=True)) for one in self._routers.addresses
        ]
        self._stubs: list[Any] = [RouterStub(channel) for channel in self._channels]

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGeneration:
        """Send one request: a prompt, chat messages (role and content each) or token ids.

        Options (class Options): max_tokens, temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, min_tokens,
        ignore_eos, request_id, model. ``timeout_s`` bounds the whole request. Raises InvalidRequest at once for what
        no message can hold; what the router refuses is raised by the iteration.
        """
        request = generate_request(prompt, messages, token_ids, options)

        def start(index: int, left_s: float | None) -> Any:
            return self._stubs[index].Generate(request, timeout=left_s)

        sent_at_s = time.perf_counter()
        return AsyncGeneration(Attempts(self._routers, start, sent_at_s=sent_at_s, timeout_s=timeout_s))

    async def abort(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """End a live request by the client's or the server's id. Raises RequestNotFound when none is live under it."""
        request = router_pb2.AbortRequest(request_id=request_id)
        await self._unary("Abort", request, timeout_s, elsewhere=(RequestNotFound, Unavailable))

    async def model_info(self, *, timeout_s: float | None = 10.0) -> ServedModel:
        """The model served."""
        return served_model(await self._unary("GetModelInfo", router_pb2.GetModelInfoRequest(), timeout_s))

    async def server_info(self, *, timeout_s: float | None = 10.0) -> ServerInfo:
        """The router, its instances and its counters."""
        return server_info(await self._unary("GetServerInfo", router_pb2.GetServerInfoRequest(), timeout_s))

    async def close(self) -> None:
        """Close the connection; requests still running on it are cancelled."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _unary(
        self,
        method: str,
        request: Any,
        timeout_s: float | None,
        *,
        elsewhere: tuple[type[BiphaseError], ...] = (Unavailable,),
    ) -> Any:
        """Ask one router after the other until one answers."""
        question = Question(self._routers, elsewhere)
        for index in self._routers.order(time.perf_counter()):
            try:
                reply = await getattr(self._stubs[index], method)(request, timeout=timeout_s)
            except grpc.RpcError as error:
                told = failure(error, self._routers.addresses[index], timeout_s=timeout_s)
                question.failed(index, told, time.perf_counter())
            else:
                self._routers.worked(index)
                return reply
        raise question.said
