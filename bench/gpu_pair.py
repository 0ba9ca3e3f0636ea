"""One GPU, two processes: what a decode instance gets from a prefill instance is what it would have computed itself.

    python bench/gpu_pair.py [--model FILE] [--prompts N] [--json FILE] [--check] [--smoke]

A prefill process computes prompts one at a time and hands their KV over (gRPC); this process pulls it, and computes the
same prompts itself. Compared bit for bit: the first token's logits, the KV bytes, and the logits of the step after. Both
run the same kernels on the same shapes, so there is nothing to differ; with batches of other sizes there would be, and
tokens of random bfloat16 weights are never compared. The pull's payload rate is printed with them.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import report
import torch
from engine_gpu import DEFAULT_MODEL, shrunk
from smoke import enter_smoke

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.gpu.engine import GpuEngine
from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.server import KvServer
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import KvTicket, Sampling

LENGTHS = (1, 63, 64, 65, 512, 1999, 4096)
SMOKE_LENGTHS = (1, 16, 37)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="config.json of the model whose shape is used")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--kv-memory-gib", type=float, default=4.0, help="of each process")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, anywhere: tests this program")
    parser.add_argument("--source", action="store_true", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    return parser.parse_args()


def config_of(arguments: argparse.Namespace, folder: str) -> EngineConfig:
    small = {"num_kv_blocks": 16, "block_size": 16, "max_step_tokens": 64, "max_step_seqs": 2, "max_model_len": 128}
    large = {
        "kv_memory_bytes": int(arguments.kv_memory_gib * 2**30),
        "max_step_tokens": 8192,
        "max_step_seqs": 2,
        "max_model_len": 8192,
    }
    return EngineConfig(model=folder, load_format="dummy", **(small if arguments.smoke else large))


def signature(name: str, engine: Engine) -> KvSignatureValue:
    return KvSignatureValue.of(
        engine.layout,
        instance=name,
        incarnation=1,
        model_hash=engine.model_info.model_hash,
        rope=engine.rope_signature,
        digest=engine.kv_memory.content_digest,
    )


class Held:
    """The owner of blocks for as long as the process lives."""

    def hold(self, blocks: Sequence[BlockId]) -> None:
        pass

    def release(self, blocks: Sequence[BlockId]) -> None:
        pass


def blocks_of(engine: Engine, num_tokens: int, seed: int) -> list[BlockId]:
    """Shuffled ones, so that nothing is right by accident."""
    every = list(range(engine.num_blocks))
    random.Random(seed).shuffle(every)
    return [BlockId(block) for block in every[: engine.layout.blocks_for(num_tokens + 1)]]


def prompt_of(engine: Engine, num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(engine.model_info.vocab_size) for _ in range(num_tokens)]


async def compute(
    thread: EngineThread, engine: Engine, tokens: Sequence[int], start: int, blocks: Sequence[BlockId]
) -> tuple[int, str]:
    """One step of one sequence: the token it draws and a digest of its logits."""
    seq = SeqStep(seq_id=SeqId(1), token_ids=tokens, start=start, blocks=blocks, sampling=Sampling())
    (token,) = (await thread.launch(StepPlan(seqs=(seq,)))).tokens
    assert token is not None and isinstance(engine, GpuEngine)
    logits = engine.last_logits(1).view(torch.uint8).numpy().tobytes()
    return token, hashlib.sha256(logits).hexdigest()


async def source(config: EngineConfig) -> None:
    """The prefill process: for every length that stdin names, a ticket and what was computed, as a line of JSON."""
    thread = EngineThread(config)
    engine = await thread.load(lambda detail, done: None)
    exports = ExportTable(Held(), lease_s=600.0)

    def ended(end: ExportEnded) -> None:
        pass

    server = KvServer(exports=exports, memory=engine.kv_memory, signature=signature("P", engine), on_ended=ended)
    port = await server.start("127.0.0.1", 0)
    print(json.dumps({"port": port}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        length = int(line)
        blocks = blocks_of(engine, length, seed=1)
        token, logits = await compute(thread, engine, prompt_of(engine, length), 0, blocks)
        ticket = TicketId(os.urandom(16))
        exports.open(ticket, blocks[: engine.layout.blocks_for(length)], length, time.monotonic())
        exports.finish(ticket, token, time.monotonic())
        print(json.dumps({"ticket": ticket.hex(), "token": token, "logits": logits}), flush=True)
    await server.stop()
    await thread.close()


@asynccontextmanager
async def prefill_process(arguments: list[str]) -> AsyncIterator[Any]:
    """Yields ``ask(line) -> dict``; the first answer, the port, is asked with an empty line unsent."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--source", *arguments, stdin=pipe, stdout=pipe, limit=1 << 20
    )
    assert process.stdin is not None and process.stdout is not None
    into, out_of = process.stdin, process.stdout

    async def ask(line: str = "") -> dict[str, Any]:
        if line:
            into.write(f"{line}\n".encode())
        answer = await out_of.readline()
        if not answer:
            raise RuntimeError(f"the prefill process ended with {await process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    try:
        yield ask
    finally:
        into.close()
        await process.wait()


async def compare(arguments: argparse.Namespace, config: EngineConfig, out: report.Report) -> None:
    thread = EngineThread(config)
    engine = await thread.load(lambda detail, done: None)
    puller = KvPuller(memory=engine.kv_memory, signature=signature("D", engine))
    passed_on = ["--model", arguments.model, "--kv-memory-gib", str(arguments.kv_memory_gib)]
    passed_on += ["--smoke"] if arguments.smoke else []
    passed_on += ["--num-layers", str(arguments.num_layers)] if arguments.num_layers else []
    async with prefill_process(passed_on) as ask:
        port = (await ask())["port"]
        for length in SMOKE_LENGTHS if arguments.smoke else LENGTHS:
            there = await ask(str(length))
            ticket = KvTicket(
                id=TicketId(bytes.fromhex(there["ticket"])),
                kv_address=f"127.0.0.1:{port}",
                instance=InstanceName("P"),
                incarnation=Incarnation(1),
                num_tokens=length,
            )
            pulled_into, own = blocks_of(engine, length, seed=2), blocks_of(engine, length, seed=3)
            pulled = await puller.pull(ticket, 1, pulled_into[: engine.layout.blocks_for(length)], timeout_s=120.0)
            handed_over = kv_bytes(engine, pulled_into, length)
            after_pull = await compute(thread, engine, [there["token"]], length, pulled_into)
            here = await compute(thread, engine, prompt_of(engine, length), 0, own)
            alone = kv_bytes(engine, own, length)
            after_own = await compute(thread, engine, [here[0]], length, own)
            same = {
                "first token": there["token"] == here[0] == pulled.first_token,
                "first logits": there["logits"] == here[1],
                "KV bytes": handed_over == alone,
                "next logits": after_pull == after_own,
            }
            wrong = [name for name, equal in same.items() if not equal]
            rate = pulled.bytes / max(pulled.ms, 1e-6) / 1e6
            out.row(length, pulled.bytes, round(pulled.ms, 2), rate, "equal" if not wrong else f"differ: {wrong}")
            out.goal(f"pair-{length}-differences", len(wrong), 0)
    await puller.close()
    await thread.close()


def kv_bytes(engine: Engine, blocks: Sequence[BlockId], num_tokens: int) -> bytes:
    layout = engine.layout
    box = KvBox(
        layer_start=0,
        layer_end=layout.num_layers,
        head_start=0,
        head_end=layout.num_kv_heads,
        token_start=0,
        token_end=num_tokens,
    )
    packed = bytearray(box.num_bytes(layout))
    engine.kv_memory.pack(blocks, box, packed)
    return bytes(packed)


def main() -> int:
    arguments = parse()
    if arguments.smoke:
        enter_smoke()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            arguments, shrunk(arguments.model, Path(folder), arguments.num_layers, smoke=arguments.smoke)
        )
        if arguments.source:
            asyncio.run(source(config))
            return 0
        columns = ("prompt tokens", "KV bytes", "pull ms", "GB/s", "beside colocated, bit for bit")
        out = report.Report(bench="gpu_pair", columns=columns)
        asyncio.run(compare(arguments, config, out))
        status = out.finish(arguments)
    return 1 if not all(goal.met for goal in out.goals) else status


if __name__ == "__main__":
    report.run(main)
