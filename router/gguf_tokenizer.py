"""A tokenizer from a GGUF file's own tokens, merges, token types and pre-tokenizer kind."""

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from biphase.protos.errors import SetupError, one_line
from biphase.protos.gguf_file import GgufFile
from biphase.router.detokenizer import SPACE_PIECE

_CONTROL, _USER_DEFINED = 3, 4
"""ggml's token types that are matched in text before the merges see it."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _by_regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "gpt2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _by_regex(_LLAMA3),
    "llama3": lambda: _by_regex(_LLAMA3),
    "llama-v3": lambda: _by_regex(_LLAMA3),
    "qwen2": lambda: _by_regex(_QWEN2),
}
_LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")


def build(file: GgufFile) -> Tokenizer:
    """Raises SetupError, one line, for a tokenizer kind that is not supported or a broken vocabulary."""
    kind = file.require("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            return _byte_level(file)
        if kind == "llama":
            return _sentencepiece(file)
    except SetupError:
        raise
    except Exception as error:  # the library raises bare Exception for a merge of unknown tokens and the like
        raise SetupError(f"{file.path}: broken tokenizer ({one_line(error)[:200]})") from error
    raise SetupError(f"{file.path}: tokenizer {kind!r} is not supported (supported: gpt2, llama)")


def _byte_level(file: GgufFile) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise SetupError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported (supported: {', '.join(sorted(_PRE_TOKENIZERS))})"
        )
    tokens = file.require("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    # a merge's parts hold no space: byte-level pieces write it as another character
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in file.require("tokenizer.ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=pre in _LLAMA3_KINDS))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file, tokens)
    _add_ends(tokenizer, file, tokens, bos=pre in _LLAMA3_KINDS)
    return tokenizer


def _sentencepiece(file: GgufFile) -> Tokenizer:
    tokens, scores = file.require("tokenizer.ggml.tokens"), file.require("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise SetupError(f"{file.path}: {len(tokens)} tokens but {len(scores)} scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = file.get("tokenizer.ggml.unknown_token_id", 0)
    types = file.get("tokenizer.ggml.token_type", [])
    plain = [i for i in range(len(tokens)) if i >= len(types) or types[i] in (1, _USER_DEFINED)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges_of(vocab, {tokens[i]: scores[i] for i in plain}),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_PIECE)]
    strip: list[decoders.Decoder] = []
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE_PIECE))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(tokenizer, file, tokens)
    _add_ends(tokenizer, file, tokens, bos=True)
    return tokenizer


def merges_of(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that make SentencePiece's choices: the pair whose joined piece has the best score goes first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[piece], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, file: GgufFile, tokens: Sequence[str]) -> None:
    """Control tokens as special ones, user-defined tokens as plain added ones; both keep their ids."""
    types = file.get("tokenizer.ggml.token_type", [])
    of_type = {kind: [tokens[i] for i, t in enumerate(types) if t == kind] for kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in of_type[_CONTROL]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in of_type[_USER_DEFINED]])


def _add_ends(tokenizer: Tokenizer, file: GgufFile, tokens: Sequence[str], *, bos: bool) -> None:
    """The tokens put before and after a prompt; ``bos``: whether one comes first where the file does not say."""
    template, used = ["$A"], []
    for key, default, place in (("bos", bos, 0), ("eos", False, 1)):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None or not file.get(f"tokenizer.ggml.add_{key}_token", default):
            continue
        template.insert(place * len(template), tokens[token_id])
        used.append((tokens[token_id], token_id))
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
