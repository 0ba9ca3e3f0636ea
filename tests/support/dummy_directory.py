"""A model directory without weights: a configuration and a byte-level tokenizer, to be served with load_format dummy."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from support.tiny_models import VOCAB, tiny_config


def write_dummy_directory(folder: Path, **changes: Any) -> Path:
    """8 heads, 2 KV heads and 4 layers unless ``changes`` of the config say otherwise: any of tp 1, 2, 4 x pp 1 to 4."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**sizes | changes)))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """A token per byte, and three special ones; the rest of ``vocab_size`` are words of digits that no text becomes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    assert len(vocab) <= vocab_size
    if vocab_size != VOCAB:
        vocab |= {f"{index:05}": index for index in range(len(vocab), vocab_size)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
