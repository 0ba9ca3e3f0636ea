"""A Router service whose answers are written down here: what the client's tests speak with."""

import threading
from collections.abc import Iterator

import grpc

from biphase.protos import common_pb2, router_pb2
from biphase.protos.router_pb2_grpc import RouterServicer

Reply = router_pb2.GenerateReply


def accepted(request: router_pb2.GenerateRequest) -> Reply:
    return Reply(
        accepted=router_pb2.Accepted(
            request_id="r-1",
            client_request_id=request.request_id,
            seed=request.sampling.seed,
            prompt_tokens=5,
            model="m",
        )
    )


def delta(text: str, token_ids: list[int], first_index: int) -> Reply:
    return Reply(delta=router_pb2.Delta(text=text, token_ids=token_ids, first_index=first_index))


def finished() -> Reply:
    return Reply(
        finished=router_pb2.Finished(
            finish_reason=common_pb2.FINISH_LENGTH,
            usage=router_pb2.Usage(prompt_tokens=5, output_tokens=3, cached_tokens=0),
            timeline=router_pb2.Timeline(transfer_ms=1.5, transfer_bytes=4096, preemptions=2),
            decision="disaggregated",
            decision_reason="prefill instance free",
            prefill_instance="prefill-0#1 (pid 11)",
            decode_instance="decode-0#1 (pid 12)",
            seed=7,
        )
    )


class ScriptedRouter(RouterServicer):
    """Answers Generate by the prompt's first word; ``requests`` keeps what came in."""

    def __init__(self) -> None:
        self.requests: list[router_pb2.GenerateRequest] = []
        self.aborted: list[str] = []
        self.call_ended = threading.Event()
        """Set when a "hang" call has ended on the server, by whatever cause."""

    def Generate(self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Reply]:
        self.requests.append(request)
        word = request.text.split(" ")[0]
        if word == "refuse":
            context.abort(grpc.StatusCode[request.text.split(" ")[1]], " ".join(request.text.split(" ")[2:]))
        yield accepted(request)
        if word == "hang":
            context.add_callback(self.call_ended.set)
            yield delta("first", [1], 0)
            self.call_ended.wait()
        elif word == "cut":
            yield delta("first", [1], 0)
        elif word == "gap":
            yield delta("first", [1], 0)
            yield delta("third", [3], 2)
        else:
            yield delta("Hello", [1], 0)
            yield delta(", wor", [2], 1)
            yield delta("ld", [3], 2)
            yield finished()

    def Abort(self, request: router_pb2.AbortRequest, context: grpc.ServicerContext) -> router_pb2.AbortReply:
        if request.request_id != "live":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no live request has the id {request.request_id!r}")
        self.aborted.append(request.request_id)
        return router_pb2.AbortReply()

    def GetModelInfo(
        self, request: router_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> router_pb2.ModelInfoReply:
        model = common_pb2.ModelInfo(
            name="m", vocab_size=100, max_model_len=64, eos_token_ids=[2], architecture="llama"
        )
        return router_pb2.ModelInfoReply(model=model, max_output_tokens=64, has_chat_template=True)

    def GetServerInfo(
        self, request: router_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> router_pb2.ServerInfoReply:
        instance = router_pb2.InstanceView(
            name="prefill-0",
            role=common_pb2.ROLE_PREFILL,
            incarnation=3,
            state="ready",
            pid=11,
            num_blocks=9,
            since_unix_s=5.5,
        )
        return router_pb2.ServerInfoReply(
            name="router-0", version="0.1.0", pid=10, mode="auto", instances=[instance], counters={"live": 2}
        )
