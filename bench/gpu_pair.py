"""One GPU, two processes: what a decode instance gets from a prefill instance is what it would have computed itself.

    python bench/gpu_pair.py [--model FILE] [--only bits tokens] [--json FILE] [--check] [--smoke]

A prefill process computes prompts one at a time and hands their KV over (gRPC); this process pulls it, and computes the
same prompts itself. ``bits``, on the model in bfloat16, one request at a time: the first token's logits, the KV bytes and
the logits of the step after are equal bit for bit. Both run the same kernels on the same shapes, so there is nothing to
differ; with batches of other sizes there would be, and tokens of random bfloat16 weights are never compared. ``tokens``,
on a small model in float32: all prompts handed over and decoded in one batch give the tokens that each gives alone where
nothing was handed over. Both processes have explicit KV budgets. The pull's payload rate is printed with them.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import report
import torch
from engine_gpu import DEFAULT_MODEL, shrunk
from gpu_report import GpuReport
from smoke import enter_smoke

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.gpu.engine import GpuEngine
from biphase.engine.step import SeqStep, StepPlan
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.puller import KvPuller, PullResult
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import KvTicket, Sampling

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""Sends the prefill process a line and reads one; without a line it only reads."""

LENGTHS = {"bits": (1, 63, 64, 65, 512, 1999, 4096), "tokens": (1, 16, 63, 64, 65, 200)}
SMOKE_LENGTHS = {"bits": (1, 21), "tokens": (1, 16)}
DECODE_STEPS, SMOKE_DECODE_STEPS = 24, 2
SMALL_MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What ``tokens`` makes of the model's configuration."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="config.json of the model whose shape is used")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--only", nargs="+", choices=[*LENGTHS], default=[*LENGTHS])
    parser.add_argument("--kv-memory-gib", type=float, default=4.0, help="of each process that has the large model")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, anywhere: tests this program")
    parser.add_argument("--source", choices=[*LENGTHS], help=argparse.SUPPRESS)
    report.add_arguments(parser)
    return parser.parse_args()


def config_of(arguments: argparse.Namespace, folder: Path, kind: str) -> EngineConfig:
    """Of either process: the same model for the same ``kind``."""
    folder = folder / kind
    folder.mkdir()
    model = shrunk(arguments.model, folder, arguments.num_layers, smoke=arguments.smoke)
    sizes: dict[str, Any] = {"max_step_tokens": 8192, "max_step_seqs": 2, "max_model_len": 8192}
    sizes["kv_memory_bytes"] = int(arguments.kv_memory_gib * 2**30)
    if arguments.smoke:
        sizes = {"num_kv_blocks": 16, "block_size": 16, "max_step_tokens": 21, "max_step_seqs": 2, "max_model_len": 32}
        sizes["dtype"] = "float32"
    elif kind == "tokens":
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | SMALL_MODEL))
        sizes = {"num_kv_blocks": 64, "max_step_tokens": 256, "max_step_seqs": 8, "max_model_len": 256}
        sizes["dtype"] = "float32"
    return EngineConfig(model=model, served_name=kind, load_format="dummy", **sizes)


def signature(name: str, engine: Engine) -> KvSignatureValue:
    return KvSignatureValue.of_engine(engine, instance=name, incarnation=1)


class Held:
    """The owner of blocks for as long as the process lives."""

    def hold(self, blocks: Sequence[BlockId]) -> None:
        pass

    def release(self, blocks: Sequence[BlockId]) -> None:
        pass


class Blocks:
    """A pool's blocks, shuffled so that nothing is right by accident."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._free = [BlockId(block) for block in range(engine.num_blocks)]
        random.Random(seed).shuffle(self._free)

    def take(self, num_tokens: int) -> list[BlockId]:
        count = self._engine.layout.blocks_for(num_tokens)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count, f"{num_tokens} tokens need {count} blocks, {len(taken)} are left"
        return taken

    def give_back(self, blocks: Sequence[BlockId]) -> None:
        self._free += blocks


def prompt_of(engine: Engine, num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(engine.model_info.vocab_size) for _ in range(num_tokens)]


async def compute(
    thread: EngineThread, engine: Engine, tokens: Sequence[int], start: int, blocks: Sequence[BlockId]
) -> tuple[int, str]:
    """One greedy step of one sequence: the token it draws and a digest of its logits."""
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

    service = KvService(exports=exports, memory=engine.kv_memory, signature=signature("P", engine), on_ended=ended)
    service.start()
    server = GrpcKvServer(service)
    port = await server.start("127.0.0.1", 0)
    print(json.dumps({"port": port}), flush=True)
    free = Blocks(engine, seed=1)
    while line := await asyncio.to_thread(sys.stdin.readline):
        length = int(line)
        blocks = free.take(length)
        token, logits = await compute(thread, engine, prompt_of(engine, length), 0, blocks)
        ticket = TicketId(os.urandom(16))
        exports.open(ticket, blocks, length, time.monotonic())
        exports.finish(ticket, token, time.monotonic())
        print(json.dumps({"ticket": ticket.hex(), "token": token, "logits": logits}), flush=True)
    await server.stop()
    await service.stop()
    await thread.close()


@asynccontextmanager
async def prefill_process(arguments: argparse.Namespace, kind: str) -> AsyncIterator[Ask]:
    """Yields ``ask``; the first answer, the port, is asked for with no line sent."""
    pipe = asyncio.subprocess.PIPE
    options = ["--source", kind, "--model", arguments.model, "--kv-memory-gib", str(arguments.kv_memory_gib)]
    options += ["--smoke"] if arguments.smoke else []
    options += ["--num-layers", str(arguments.num_layers)] if arguments.num_layers else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *options, stdin=pipe, stdout=pipe, limit=1 << 20
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
        try:
            await asyncio.wait_for(process.wait(), 10.0)
        except TimeoutError:
            process.kill()
            await process.wait()


class Pair:
    """This process's engine, the decode side, and what asks the prefill process."""

    def __init__(self, thread: EngineThread, engine: Engine, ask: Ask, port: int) -> None:
        self.thread, self.engine, self.ask, self._port = thread, engine, ask, port
        self.free = Blocks(engine, seed=2)
        self._puller = KvPuller(memory=engine.kv_memory, signature=signature("D", engine))

    @staticmethod
    @asynccontextmanager
    async def open(arguments: argparse.Namespace, folder: Path, kind: str, ask: Ask) -> AsyncIterator["Pair"]:
        thread = EngineThread(config_of(arguments, folder, kind))
        try:
            engine = await thread.load(lambda detail, done: None)
            pair = Pair(thread, engine, ask, (await ask())["port"])
            yield pair
            await pair._puller.close()
        finally:
            await thread.close()

    async def hand_over(self, length: int, blocks: Sequence[BlockId]) -> tuple[dict[str, Any], PullResult]:
        """The prefill process computes a prompt; its KV is pulled into ``blocks``."""
        there = await self.ask(str(length))
        ticket = KvTicket(
            id=TicketId(bytes.fromhex(there["ticket"])),
            kv_address=f"127.0.0.1:{self._port}",
            instance=InstanceName("P"),
            incarnation=Incarnation(1),
            num_tokens=length,
        )
        own = blocks[: self.engine.layout.blocks_for(length)]
        return there, await self._puller.pull(ticket, 1, own, timeout_s=60.0)

    async def step(self, tokens: Sequence[int], start: int, blocks: Sequence[BlockId]) -> tuple[int, str]:
        return await compute(self.thread, self.engine, tokens, start, blocks)


async def compare_bits(pair: Pair, lengths: Sequence[int], out: GpuReport) -> None:
    engine = pair.engine
    for length in lengths:
        pulled_into, own = pair.free.take(length + 1), pair.free.take(length + 1)
        there, pulled = await pair.hand_over(length, pulled_into)
        handed_over = kv_bytes(engine, pulled_into, length)
        after_pull = await pair.step([there["token"]], length, pulled_into)
        here = await pair.step(prompt_of(engine, length), 0, own)
        alone = kv_bytes(engine, own, length)
        after_own = await pair.step([here[0]], length, own)
        same = {
            "first token": there["token"] == here[0] == pulled.first_token,
            "first logits": there["logits"] == here[1],
            "KV bytes": handed_over == alone,
            "next logits": after_pull == after_own,
        }
        wrong = [name for name, equal in same.items() if not equal]
        rate = pulled.bytes / max(pulled.ms, 1e-6) / 1e6
        out.row("bits", length, pulled.bytes, round(pulled.ms, 2), rate, f"differ: {wrong}" if wrong else "equal")
        out.goal(f"pair-bits-{length}-differences", len(wrong), 0)
        pair.free.give_back([*pulled_into, *own])


async def compare_tokens(pair: Pair, lengths: Sequence[int], steps: int, out: GpuReport) -> None:
    room = {length: pair.free.take(length + steps) for length in lengths}
    handed_over = {length: await pair.hand_over(length, room[length]) for length in lengths}
    batched = {length: [there["token"]] for length, (there, _) in handed_over.items()}
    for step in range(steps):
        drawn = await decode(pair, [(n, batched[n], n + step, room[n]) for n in lengths])
        for length, token in zip(lengths, drawn, strict=True):
            batched[length].append(token)
    for length in lengths:
        own = pair.free.take(length + steps)
        alone = [(await pair.step(prompt_of(pair.engine, length), 0, own))[0]]
        for step in range(steps):
            alone += await decode(pair, [(length, alone, length + step, own)])
        pulled = handed_over[length][1]
        rate = pulled.bytes / max(pulled.ms, 1e-6) / 1e6
        equal = sum(a == b for a, b in zip(batched[length], alone, strict=True))
        note = f"{equal} of {len(alone)} tokens equal, {len(set(alone))} different ones among them"
        out.row("tokens", length, pulled.bytes, round(pulled.ms, 2), rate, note)
        out.goal(f"pair-tokens-{length}-differences", len(alone) - equal, 0)


async def decode(pair: Pair, seqs: Sequence[tuple[int, list[int], int, Sequence[BlockId]]]) -> list[int]:
    """One step of (number, tokens so far, position, blocks): every second sequence draws by its seed, others greedily."""
    plan = StepPlan(
        seqs=tuple(
            SeqStep(
                seq_id=SeqId(number),
                token_ids=tokens[-1:],
                start=position,
                blocks=blocks,
                sampling=Sampling(temperature=0.9, top_p=0.95, seed=number) if number % 2 else Sampling(),
                output_index=len(tokens),
            )
            for number, tokens, position, blocks in seqs
        )
    )
    drawn = (await pair.thread.launch(plan)).tokens
    return [token for token in drawn if token is not None]


async def compare(arguments: argparse.Namespace, folder: Path, out: GpuReport) -> None:
    """Prefill processes are started together: the large model loads while the small one is compared."""
    lengths = SMOKE_LENGTHS if arguments.smoke else LENGTHS
    async with AsyncExitStack() as stack:
        sources = {kind: await stack.enter_async_context(prefill_process(arguments, kind)) for kind in arguments.only}
        for kind in sorted(arguments.only, reverse=True):  # tokens first
            async with Pair.open(arguments, folder, kind, sources[kind]) as pair:
                if kind == "bits":
                    await compare_bits(pair, lengths[kind], out)
                else:
                    steps = SMOKE_DECODE_STEPS if arguments.smoke else DECODE_STEPS
                    await compare_tokens(pair, lengths[kind], steps, out)
            out.write(arguments)


def kv_bytes(engine: Engine, blocks: Sequence[BlockId], num_tokens: int) -> bytes:
    layout = engine.layout
    box = layout.box(num_tokens)
    packed = bytearray(box.num_bytes(layout))
    engine.kv_memory.pack(blocks, box, packed)
    return bytes(packed)


def main() -> int:
    arguments = parse()
    if arguments.smoke:
        enter_smoke()
    if not arguments.smoke and not torch.cuda.is_available():
        print("bench/gpu_pair.py needs a GPU and torch finds none here (--smoke tests the program)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.source:
            asyncio.run(source(config_of(arguments, folder, arguments.source)))
            return 0
        columns = ("what", "prompt tokens", "KV bytes", "pull ms", "GB/s", "beside colocated")
        out = GpuReport(bench="gpu_pair", columns=columns)
        out.run_groups({"pair": lambda: asyncio.run(compare(arguments, folder, out))}, arguments)
        status = out.finish(arguments)
    return 1 if not all(goal.met for goal in out.goals) else status


if __name__ == "__main__":
    report.run(main)
