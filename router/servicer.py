"""The gRPC face of the front door: decode, ask the front, encode."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from biphase.protos import router_pb2
from biphase.protos.convert import model_to_proto, role_to_proto
from biphase.protos.errors import BiphaseError, one_line
from biphase.protos.values import ModelInfo
from biphase.router.front import Front
from biphase.router.links import Link
from biphase.router.output import Piece
from biphase.router.version import version
from biphase.router.wire import asked_from_proto, piece_to_proto, summary_to_proto


class RouterServicer:
    """One method per RPC of biphase.v1.Router; registered through ``grpc_setup.service_handler``."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def Generate(
        self, message: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.GenerateReply]:
        try:
            request = await self._front.admit(asked_from_proto(message), time_left_s=context.time_remaining())
            context.add_done_callback(lambda _: request.client_gone())
            request.replies.started_writing()
            yield router_pb2.GenerateReply(
                accepted=router_pb2.Accepted(
                    request_id=request.id,
                    client_request_id=request.client_request_id,
                    seed=request.asked.sampling.seed,
                    prompt_tokens=request.asked.num_prompt_tokens,
                    model=self._front.served_name,
                )
            )
            while isinstance(reply := await request.replies.take(), Piece):
                yield piece_to_proto(reply)
            yield summary_to_proto(reply)
        except BiphaseError as error:
            await context.abort(error.code, one_line(error))

    async def Abort(self, message: router_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> router_pb2.AbortReply:
        try:
            self._front.abort(message.request_id)
        except BiphaseError as error:
            await context.abort(error.code, one_line(error))
        return router_pb2.AbortReply()

    async def GetModelInfo(
        self, message: router_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ModelInfoReply:
        front = self._front
        capacity = front.capacity()
        info = front.fleet.any_info()
        model = ModelInfo(
            name=front.served_name,
            model_hash=info.model.model_hash if info else b"",
            vocab_size=capacity.vocab_size,
            max_model_len=capacity.max_model_len,
            eos_token_ids=info.model.eos_token_ids if info else tuple(front.tokenizer.eos_token_ids),
            architecture=info.model.architecture if info else "",
            dtype=info.model.dtype if info else "",
        )
        return router_pb2.ModelInfoReply(
            model=model_to_proto(model),
            max_output_tokens=capacity.max_output_tokens,
            has_chat_template=front.tokenizer.has_chat_template,
        )

    async def GetServerInfo(
        self, message: router_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ServerInfoReply:
        front = self._front
        now_s, unix_s = asyncio.get_running_loop().time(), time.time()
        return router_pb2.ServerInfoReply(
            name=front.config.name,
            version=version(),
            pid=os.getpid(),
            mode=front.config.mode,
            uptime_s=now_s - front.started_s,
            instances=[_instance(link, unix_s - now_s) for link in front.fleet.links.values()],
            counters=front.snapshot(),
        )


def _instance(link: Link, to_unix_s: float) -> router_pb2.InstanceView:
    """``to_unix_s``: what makes Unix time of the loop's."""
    view, info = link.view(), link.info
    known: dict[str, Any] = {}
    if info is not None:
        known = {"pid": info.pid, "threads": info.threads, "kv_bytes": info.kv_bytes}
    return router_pb2.InstanceView(
        name=info.name if info else link.member.key,
        role=role_to_proto(link.member.role),
        incarnation=info.incarnation if info else link.member.incarnation,
        address=link.member.address,
        state=link.shown.state,
        since_unix_s=link.shown.since_s + to_unix_s,
        queued_tokens=link.account.load.queued_tokens,
        running=link.account.load.running,
        free_blocks=link.account.load.free_blocks,
        num_blocks=view.num_blocks,
        block_size=view.block_size,
        legs=len(link.legs),
        **known,
    )
