"""A random Llama of 8 heads and 2 KV heads that any (tp 1, 2, 4) x (pp 1, 2) can hold, with what transformers makes of it.

Its greedy outputs differ from prompt to prompt and do not repeat themselves, so that a wrong byte of KV shows.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from support.random_models import random_model

VOCAB, MAX_LEN = 512, 1024
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 65, 100, 150, 200)
NUM_TOKENS = 16
LEAST_DISTINCT = 8
LEAST_MARGIN = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt, its greedy output by transformers, and the smallest margin between the two best logits on the way."""

    prompt: list[int]
    tokens: list[int]
    margin: float


def write_random_llama(folder: Path) -> list[Case]:
    """The model as a Hugging Face directory, and its cases: each with a margin and enough different tokens."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_LEN,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = random_model(config, seed=2, gain=6.0)
    model.save_pretrained(folder)
    chance = random.Random(5)
    cases = [_case(model, [chance.randrange(3, VOCAB) for _ in range(length)]) for length in LENGTHS]
    kept = [case for case in cases if len(set(case.tokens)) >= LEAST_DISTINCT and case.margin >= LEAST_MARGIN]
    assert len(kept) >= 8 and len({tuple(case.tokens) for case in kept}) == len(kept)
    return kept


@torch.inference_mode()
def _case(model: torch.nn.Module, prompt: list[int]) -> Case:
    ids, tokens, margin, past = torch.tensor([prompt]), [], float("inf"), None
    for _ in range(NUM_TOKENS):
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        best = out.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        ids, past = best.indices[:1].view(1, 1), out.past_key_values
    return Case(prompt=prompt, tokens=tokens, margin=margin)
