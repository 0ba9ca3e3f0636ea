"""What a codec costs in quality: prompts are prefilled, their KV is packed and unpacked, and a decode goes on from it.

    python bench/codec_quality.py [--prompts 16] [--tokens 64] [--threads 1] [--json FILE] [--check]

SmolLM2 in float32, the prompts of tests/reference. Per codec: bytes on the wire beside raw, error of K and V (root mean
square, of the values' own), largest and mean logit error, and how many of the next tokens are greedy's own: *free*, each
run continuing with its own tokens, so that one change is followed by others; and *forced*, each step given raw's tokens,
so that a change counts once (what kvtransfer/codec_choice.py calls a codec's quality). "int4 plain" is int4 without the
coarse values, four bits of the whole value, for comparison: no codec of ours.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

from biphase.engine.config import EngineConfig
from biphase.engine.cpu_engine import CpuEngine
from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kvtransfer.codec_times import measure
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

PROMPTS = Path(__file__).parent.parent / "tests" / "reference" / "smollm2_greedy.json"
PLAIN_INT4 = "int4 plain"
_CHUNK = 512
_LONGEST = 700
_GREEDY = Sampling(max_tokens=1 << 20, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """By sequence: the greedy tokens, and the logits that each was taken from."""

    tokens: list[list[int]]
    logits: list[list[np.ndarray[Any, Any]]]


class Decoder:
    """The prompts in an engine: their KV as prefilled, and any number of decodes from a changed copy of it."""

    def __init__(self, prompts: Sequence[Sequence[int]], num_tokens: int, threads: int) -> None:
        longest = max(map(len, prompts)) + num_tokens + 1
        config = EngineConfig(model="smollm2", max_model_len=longest, threads=threads).resolved(has_cuda=False)
        per_seq = -(-longest // (config.block_size or 1))
        self.engine = CpuEngine.load(
            EngineConfig(
                model="smollm2",
                block_size=config.block_size,
                max_model_len=longest,
                num_kv_blocks=per_seq * len(prompts),
                max_step_seqs=max(64, len(prompts)),
                threads=threads,
            ).resolved(has_cuda=False),
            lambda _detail, _done: None,
        )
        self.prompts = prompts
        self.num_tokens = num_tokens
        self.memory = self.engine.kv_memory
        self.tables = [[BlockId(seq * per_seq + at) for at in range(per_seq)] for seq in range(len(prompts))]
        self.first = [self._prefill(seq) for seq in range(len(prompts))]
        self.kept = [self.canonical(seq) for seq in range(len(prompts))]

    def canonical(self, seq: int) -> np.ndarray[Any, Any]:
        """A prompt's KV ``[layer, K/V, head, token, dim]``."""
        layout = self.memory.layout
        box = layout.box(len(self.prompts[seq]))
        data = bytearray(box.num_bytes(layout))
        self.memory.pack(self.tables[seq], box, data)
        shape = (layout.num_layers, 2, layout.num_kv_heads, box.num_tokens, layout.head_dim)
        return np.frombuffer(data, dtype=np.float32).reshape(shape)

    def restore(self) -> None:
        for seq, kept in enumerate(self.kept):
            self.memory.unpack(self.tables[seq], self.memory.layout.box(kept.shape[3]), kept)

    def through(self, codec: str) -> int:
        """Put every prompt's KV through a codec; returns the bytes on the wire."""
        self.restore()
        total = 0
        for seq, kept in enumerate(self.kept):
            box = self.memory.layout.box(kept.shape[3])
            if codec == PLAIN_INT4:
                changed = plain_int4(kept, self.memory.layout.block_size)
                self.memory.unpack(self.tables[seq], box, np.ascontiguousarray(changed))
                total += kept.size // 2
                continue
            data = bytearray(packed_bytes(self.memory.layout, box, codec))
            self.memory.pack(self.tables[seq], box, data, codec)
            self.memory.unpack(self.tables[seq], box, data, codec)
            total += len(data)
        return total

    def error(self) -> tuple[float, float]:
        """Of K and of V in the pool: root mean square of the difference, of the values' own."""
        found = []
        for k_or_v in (0, 1):
            wrong, size = 0.0, 0.0
            for seq, kept in enumerate(self.kept):
                wrong += float(np.square(self.canonical(seq)[:, k_or_v] - kept[:, k_or_v], dtype=np.float64).sum())
                size += float(np.square(kept[:, k_or_v], dtype=np.float64).sum())
            found.append((wrong / size) ** 0.5)
        return found[0], found[1]

    def decode(self, given: Sequence[Sequence[int]] | None = None) -> Decoded:
        """``num_tokens`` steps from the prompts' KV in the pool; with ``given``, each step's input comes from there."""
        tokens: list[list[int]] = [[] for _ in self.prompts]
        logits: list[list[np.ndarray[Any, Any]]] = [[] for _ in self.prompts]
        for step in range(self.num_tokens):
            source = tokens if given is None else given
            inputs = [self.first[seq] if step == 0 else source[seq][step - 1] for seq in range(len(self.prompts))]
            found = self._logits(
                [self._step(seq, len(self.prompts[seq]) + step, [token]) for seq, token in enumerate(inputs)]
            )
            for seq, row in enumerate(found):
                tokens[seq].append(int(row.argmax()))
                logits[seq].append(row)
        return Decoded(tokens=tokens, logits=logits)

    def _prefill(self, seq: int) -> int:
        """The first token."""
        prompt = self.prompts[seq]
        for start in range(0, len(prompt), _CHUNK):
            row = self._logits([self._step(seq, start, prompt[start : start + _CHUNK])])[0]
        return int(row.argmax())

    def _step(self, seq: int, start: int, token_ids: Sequence[int]) -> SeqStep:
        return SeqStep(seq_id=SeqId(seq), token_ids=token_ids, start=start, blocks=self.tables[seq], sampling=_GREEDY)

    def _logits(self, steps: Sequence[SeqStep]) -> list[np.ndarray[Any, Any]]:
        """By sequence, as the model gives them before the sampler."""
        with torch.inference_mode():
            batch = self.engine.prepare(StepPlan(seqs=tuple(steps)))
            rows = self.engine._model.forward(batch)
            assert rows is not None
            by_seq = dict(zip(batch.sampled_seqs, rows.clone().numpy(), strict=True))
        return [by_seq[seq] for seq in range(len(steps))]


def plain_int4(values: np.ndarray[Any, Any], block_size: int) -> np.ndarray[Any, Any]:
    """Values in steps of a seventh of their block's and head's largest."""
    changed = np.empty_like(values)
    for start in range(0, values.shape[3], block_size):
        group = values[:, :, :, start : start + block_size]
        scale = np.maximum(np.abs(group).max(axis=(-2, -1), keepdims=True), 2.0**-100) / 7
        changed[:, :, :, start : start + block_size] = np.rint(group / scale) * scale
    return changed


def unchanged(ours: Decoded, raw: Decoded) -> float:
    pairs = [
        (one, other)
        for left, right in zip(ours.tokens, raw.tokens, strict=True)
        for one, other in zip(left, right, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def logit_errors(ours: Decoded, raw: Decoded) -> list[float]:
    return [
        float(np.abs(one - other).max())
        for left, right in zip(ours.logits, raw.logits, strict=True)
        for one, other in zip(left, right, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="how many (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded from the packed KV (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.tokens < 1:
        parser.error("there must be at least one prompt and one token")
    rows = json.loads(PROMPTS.read_text())["prompts"]
    prompts = [row["prompt_ids"] for row in rows if 4 <= len(row["prompt_ids"]) <= _LONGEST][: arguments.prompts]
    decoder = Decoder(prompts, arguments.tokens, arguments.threads)
    result = report.Report(
        "codec_quality",
        [
            "codec",
            "bytes",
            "of raw",
            "K error",
            "V error",
            "max logit error",
            "mean",
            "free",
            "forced",
            "pack GB/s",
            "unpack",
        ],
    )
    raw_bytes = decoder.through("raw")
    raw = decoder.decode()
    errors = {}
    for codec in ("raw", *CODECS, PLAIN_INT4):
        num_bytes = decoder.through(codec)
        errors[codec] = decoder.error()
        free = unchanged(decoder.decode(), raw)
        decoder.through(codec)
        forced = decoder.decode(raw.tokens)
        wrong, share = logit_errors(forced, raw), unchanged(forced, raw)
        figures: Sequence[Any] = ("", "")
        if codec != PLAIN_INT4:
            times = measure(decoder.memory, [codec])[codec]
            figures = (1e-9 / times.pack, 1e-9 / times.unpack)
        result.row(
            codec,
            num_bytes,
            num_bytes / raw_bytes,
            *errors[codec],
            max(wrong),
            float(np.mean(wrong)),
            free,
            share,
            *figures,
        )
        print(*result.rows[-1], flush=True)
        if codec == "raw":
            result.goal("raw_max_logit_error", max(wrong), 0.0)
            result.goal("raw_tokens_unchanged", free, 1.0, at_least=True)
        if codec == "int4":
            result.goal("int4_bytes_of_raw", num_bytes / raw_bytes, 0.16)
    for name, index in (("k", 0), ("v", 1)):
        result.goal(f"int4_{name}_error_of_plain", errors["int4"][index] / errors[PLAIN_INT4][index], 0.5)
    result.extra["prompts"] = [len(prompt) for prompt in prompts]
    result.extra["tokens"] = arguments.tokens
    result.extra["block_size"] = decoder.memory.layout.block_size
    return result.finish(arguments)


if __name__ == "__main__":
    report.run(main)
