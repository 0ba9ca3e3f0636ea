"""The synchronous client. It starts no thread of its own; one client may be used from several threads."""

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from biphase.client.failures import failure
from biphase.client.replies import ReplyFold, served_model, server_info
from biphase.client.requests import Options, generate_request, resolve_address
from biphase.client.values import Accepted, Delta, Result, ServedModel, ServerInfo
from biphase.protos import router_pb2
from biphase.protos.errors import BiphaseError, Cancelled
from biphase.protos.grpc_setup import channel_options
from biphase.protos.router_pb2_grpc import RouterStub


class Generation:
    """One request's answer as it comes: iterate over it once, then ask for ``result``.

    Leaving the iteration early (``break``, an exception), the ``with`` block, or calling ``close`` cancels the request on
    the server. A failed request raises the error of its status (biphase.protos.errors) out of the iteration.
    """

    def __init__(self, call: Any, address: str, sent_at_s: float, timeout_s: float | None) -> None:
        self._call = call
        self._address = address
        self._timeout_s = timeout_s
        self._fold = ReplyFold(sent_at_s)
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

    def __iter__(self) -> Iterator[Delta]:
        if self._error is not None:
            raise self._error
        try:
            for reply in self._call:
                delta = self._fold.feed(reply, time.perf_counter())
                if delta is not None:
                    yield delta
            self._fold.end()
        except grpc.RpcError as error:
            self._error = failure(error, self._address, timeout_s=self._timeout_s, generating=True)
            raise self._error from None
        finally:
            self.close()

    def text(self) -> str:
        """Read the answer to its end and return all of its text."""
        for _ in self:
            pass
        return self.result.text

    def close(self) -> None:
        """Cancel the request unless it has ended. May be called twice, and from another thread."""
        if self._fold.result is None and self._error is None:
            self._error = Cancelled("the request was cancelled by this client")
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to a router at ``address`` (HOST:PORT; default BIPHASE_ADDRESS, else 127.0.0.1:8700).

    Nothing is sent before the first call, so a wrong address shows there, as Unavailable.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = resolve_address(address)
        self._channel = grpc.insecure_channel(self.address, channel_options())
        self._stub = RouterStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Send one request: a prompt, chat messages (role and content each) or token ids.

        Options (class Options): max_tokens, temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, min_tokens,
        ignore_eos, request_id, model. ``timeout_s`` bounds the whole request. Raises InvalidRequest at once for what
        no message can hold; what the router refuses is raised by the iteration.
        """
        request = generate_request(prompt, messages, token_ids, options)
        sent_at_s = time.perf_counter()
        return Generation(self._stub.Generate(request, timeout=timeout_s), self.address, sent_at_s, timeout_s)

    def abort(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """End a live request by the client's or the server's id. Raises RequestNotFound when none is live under it."""
        self._unary(self._stub.Abort, router_pb2.AbortRequest(request_id=request_id), timeout_s)

    def model_info(self, *, timeout_s: float | None = 10.0) -> ServedModel:
        """The model served."""
        return served_model(self._unary(self._stub.GetModelInfo, router_pb2.GetModelInfoRequest(), timeout_s))

    def server_info(self, *, timeout_s: float | None = 10.0) -> ServerInfo:
        """The router, its instances and its counters."""
        return server_info(self._unary(self._stub.GetServerInfo, router_pb2.GetServerInfoRequest(), timeout_s))

    def close(self) -> None:
        """Close the connection; requests still running on it are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise failure(error, self.address, timeout_s=timeout_s) from None
