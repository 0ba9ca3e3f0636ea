"""Records greedy answers and how clear each choice was, for `biphase bench --check-tokens` and the benches that kill things.

    python bench/record_tokens.py --out FILE [--model smollm2] [--prompts 48] [--input-len uniform:16:192]
                                  [--output-len 256] [--seed 0] [--threads 1] [--batch 16]

The model runs in this process, on the CPU in float32: several sequences to a step, each prompt in chunks. A prompt whose
margin between the two best logits falls under the bound anywhere is written all the same, with its margin, and left out by
whoever reads the file.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.lengths import parse_lengths
from biphase.client.bench.phases_file import read_lengths
from biphase.client.bench.prompts import RandomPrompts
from biphase.client.bench.tokens_file import Recorded, Recording, write_recording
from biphase.engine.config import EngineConfig
from biphase.engine.cpu_engine import CpuEngine
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import SetupError, one_line
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

_CHUNK = 256
_GREEDY = Sampling(max_tokens=1 << 20, ignore_eos=True)


class Recorder:
    """One engine and room for ``batch`` sequences of ``longest`` tokens."""

    def __init__(self, model: str, *, longest: int, batch: int, threads: int) -> None:
        config = EngineConfig(model=model, max_model_len=longest, threads=threads).resolved(has_cuda=False)
        per_seq = -(-longest // (config.block_size or 1))
        self.engine = CpuEngine.load(
            EngineConfig(
                model=model,
                block_size=config.block_size,
                max_model_len=longest,
                num_kv_blocks=per_seq * batch,
                max_step_seqs=max(64, batch),
                threads=threads,
            ).resolved(has_cuda=False),
            lambda _detail, _done: None,
        )
        self.batch = batch
        self._tables = [[BlockId(row * per_seq + at) for at in range(per_seq)] for row in range(batch)]

    def answers(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Recorded]:
        """At most ``batch`` prompts, decoded together."""
        last, margins = [], []
        for row, prompt in enumerate(prompts):
            for start in range(0, len(prompt), _CHUNK):
                ((token, margin),) = self._step([(row, start, prompt[start : start + _CHUNK])])
            last.append(token)
            margins.append(margin)
        tokens = [[token] for token in last]
        for step in range(num_tokens - 1):
            found = self._step([(row, len(prompt) + step, [tokens[row][-1]]) for row, prompt in enumerate(prompts)])
            for row, (token, margin) in enumerate(found):
                tokens[row].append(token)
                margins[row] = min(margins[row], margin)
        return [
            Recorded(prompt_ids=tuple(prompt), tokens=tuple(tokens[row]), margin=round(margins[row], 6))
            for row, prompt in enumerate(prompts)
        ]

    def _step(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> list[tuple[int, float]]:
        """(sequence, first position, tokens) each: the best next token, and its lead over the second."""
        seqs = tuple(
            SeqStep(seq_id=SeqId(row), token_ids=token_ids, start=start, blocks=self._tables[row], sampling=_GREEDY)
            for row, start, token_ids in parts
        )
        with torch.inference_mode():
            batch = self.engine.prepare(StepPlan(seqs=seqs))
            logits_RV = self.engine._model.forward(batch)
            assert logits_RV is not None
            values, ids = logits_RV.topk(2)
        by_seq = {
            seq: (int(ids[row, 0]), float(values[row, 0] - values[row, 1]))
            for row, seq in enumerate(batch.sampled_seqs)
        }
        return [by_seq[at] for at in range(len(parts))]


def record(
    model: str, *, num_prompts: int, input_len: str, output_len: int, seed: int = 0, threads: int = 1, batch: int = 16
) -> Recording:
    """Random prompts of ``input_len`` (as the command's flag), ``output_len`` tokens each."""
    lengths, draws = parse_lengths(input_len, "--input-len", read_lengths), random.Random(seed)
    sizes = [lengths.draw(draws) for _ in range(num_prompts)]
    recorder = Recorder(model, longest=max(sizes) + output_len + 1, batch=min(batch, num_prompts), threads=threads)
    info = recorder.engine.model_info
    source = RandomPrompts(vocab_size=info.vocab_size, max_model_len=info.max_model_len, seed=seed)
    prompts = [
        source.of(Arrival(index=index, at_s=0.0, phase=0, input_tokens=size, output_tokens=output_len)).token_ids
        for index, size in enumerate(sizes)
    ]
    found: list[Recorded] = []
    for start in range(0, num_prompts, recorder.batch):
        found += recorder.answers(prompts[start : start + recorder.batch], output_len)
        print(f"{len(found)} of {num_prompts} recorded", file=sys.stderr, flush=True)
    return Recording(model=info.name, model_hash=info.model_hash.hex(), prompts=tuple(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=48, metavar="N")
    parser.add_argument("--input-len", default="uniform:16:192", metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=256, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    try:
        recording = record(
            given.model,
            num_prompts=given.prompts,
            input_len=given.input_len,
            output_len=given.output_len,
            seed=given.seed,
            threads=given.threads,
            batch=given.batch,
        )
        write_recording(given.out, recording)
    except SetupError as error:
        print(f"record_tokens: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"{len(recording.usable)} of {len(recording.prompts)} prompts are clear enough to be used: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
