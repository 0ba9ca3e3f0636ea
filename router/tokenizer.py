"""A model's tokenizer: text and chat messages to token ids, token ids to text, and what else the files say of both.

Built on the ``tokenizers`` library; never imports torch. Methods are thread-safe; ``encode`` releases the GIL, which the
library does for batches only (its ``encode`` of one text held it for the whole of it: 1.6 s for 1.6 MB).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from biphase.protos.errors import InvalidRequest, SetupError, one_line
from biphase.protos.gguf_file import GgufFile
from biphase.protos.model_source import (
    ModelSource,
    directory_special_ids,
    gguf_special_ids,
    read_json,
    read_json_if_there,
    resolve,
)
from biphase.router import gguf_tokenizer
from biphase.router.chat_template import ChatTemplate
from biphase.router.detokenizer import Detokenizer, TokenBytes, bytes_of_decoder

# A batch of one gains nothing from the library's own pool of threads, which it would start at the first text.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """``vocab_size`` is the model's: ids below it are valid though the last may have no piece. ``max_context`` in tokens.

    ``longest_token``: no token stands for more characters. ``generation_defaults``: the sampling values of generation_config.json, by its names; empty where there is none.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_context: int
    longest_token: int
    name: str = ""
    generation_defaults: dict[str, float] = field(default_factory=dict)
    _library: tokenizers.Tokenizer
    _table: TokenBytes
    _template: ChatTemplate | None = None

    @staticmethod
    def load(model: str) -> "Tokenizer":
        """From a GGUF file, Hugging Face directory, hub or packaged name. Raises SetupError, one line."""
        source = resolve(model, weights=False)
        return _from_gguf(source) if source.kind == "gguf" else _from_directory(source)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the start token where the model wants one."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat of (role, content) messages, ready for the answer. Raises InvalidRequest, one line."""
        if self._template is None:
            raise InvalidRequest(f"model {self.name} has no chat template; send a prompt instead of messages")
        # the template writes the start token itself
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole output, special tokens left out."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """A new incremental one, for one output."""
        return Detokenizer(self._table)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text has half a surrogate pair at character {error.start}") from error
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids


def _from_gguf(source: ModelSource) -> Tokenizer:
    file = GgufFile(source.path)
    library = gguf_tokenizer.build(file)
    eos_token_ids, bos_token_id = gguf_special_ids(file)
    architecture = file.require("general.architecture")
    embed = file.tensors.get("token_embd.weight")
    names: dict[str, str] = {
        f"{key}_token": token
        for key, ggml in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token_id := file.get(f"tokenizer.ggml.{ggml}_token_id")) is not None
        and (token := library.id_to_token(token_id)) is not None
    }
    return _tokenizer(
        source,
        library,
        vocab_size=embed.shape[0] if embed is not None and embed.shape else library.get_vocab_size(),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        max_context=file.require(f"{architecture}.context_length"),
        template=file.get("tokenizer.chat_template"),
        special_tokens=names,
    )


def _from_directory(source: ModelSource) -> Tokenizer:
    path = source.path / "tokenizer.json"
    if not path.is_file():
        raise SetupError(f"{path}: no such file (a tokenizer.model alone is not read)")
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
        raise SetupError(f"{path}: broken tokenizer ({one_line(error)[:200]})") from error
    library.no_truncation()
    library.no_padding()
    config = read_json(source.path / "config.json")
    generation = read_json_if_there(source.path / "generation_config.json")
    texts = read_json_if_there(source.path / "tokenizer_config.json")
    eos_token_ids, bos_token_id = directory_special_ids(config, generation)
    max_context = config.get("max_position_embeddings")
    if not isinstance(max_context, int):
        raise SetupError(f"{source.path / 'config.json'}: max_position_embeddings is {max_context!r}, not a number")
    names = {key: _content(texts.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return _tokenizer(
        source,
        library,
        vocab_size=config.get("vocab_size", library.get_vocab_size()),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        max_context=max_context,
        template=_directory_template(source, texts),
        special_tokens={key: text for key, text in names.items() if text is not None},
        generation_defaults=_defaults(generation),
    )


def _tokenizer(
    source: ModelSource,
    library: tokenizers.Tokenizer,
    *,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    bos_token_id: int | None,
    max_context: int,
    template: str | None,
    special_tokens: dict[str, str],
    generation_defaults: dict[str, float] | None = None,
) -> Tokenizer:
    decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else None
    decoding = bytes_of_decoder(decoder)
    if decoding is None:
        kind = decoder["type"] if decoder else "none"
        raise SetupError(
            f"{source.path}: decoder {kind} of the tokenizer is not supported (supported: byte level, byte fallback)"
        )
    to_bytes, strip_left = decoding
    silent = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
    try:
        compiled = ChatTemplate(template, special_tokens) if template else None
    except SetupError as error:
        raise SetupError(f"{source.path}: {error}") from error
    return Tokenizer(
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        max_context=max_context,
        longest_token=max(map(len, library.get_vocab())),
        name=source.name,
        generation_defaults=generation_defaults or {},
        _library=library,
        _table=TokenBytes(piece_of=library.id_to_token, to_bytes=to_bytes, silent=silent, strip_left=strip_left),
        _template=compiled,
    )


def _directory_template(source: ModelSource, texts: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's, where a list of named ones holds a default."""
    path = source.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = texts.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """A special token's text, which files write as a string or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _defaults(generation: dict[str, Any]) -> dict[str, float]:
    """Sampling values worth taking over: numbers only, and none where the file says to decode greedily."""
    if generation.get("do_sample") is False:
        return {}
    found = {key: generation.get(key) for key in _GENERATION_DEFAULTS}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
