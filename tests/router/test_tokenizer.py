"""The tokenizer against transformers' own, against hand-made files of every supported kind, and against broken ones."""

import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from support.gguf_files import byte_level_fields, write_gguf
from support.smollm2 import needs_smollm2

from biphase.protos.errors import InvalidRequest, SetupError
from biphase.protos.gguf_file import GgufFile
from biphase.protos.model_source import resolve
from biphase.router import gguf_tokenizer
from biphase.router.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "don't won't I'll THEY'RE it's",
    "naïve café, Ångström, ﬁ ligature, e\u0301",
    "你好，世界。日本語のテキスト 한국어 ไทย",
    "Привет, мир! Γειά σου Κόσμε שלום مرحبا",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n    pass\n",
    "1 12 123 1234567890 3.14159 1e-5 ½ ² ٣ Ⅷ 2024-01-01",
    "a  b   c    d     e\t\tf \n \n\n  g   ",
    "   leading and trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <|im_end <repo_name>",
    "\x00\x01\x7f\u00a0\u200b\u2028\ufeff\ufffd",
    "https://example.com/a?b=c&d=%20#frag user@example.org",
    "{\"key\": [1, 2.5, null, true], 'q': `x`}",
    "ALLCAPS camelCase snake_case kebab-case ...!!!???",
    "x" * 500,
    " \n" * 50,
]
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load("smollm2")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' tokenizer of the same file, made to split digits: it passes over the file's pre-tokenizer kind."""
    transformers = pytest.importorskip("transformers", reason="the independent reference")
    from tokenizers import pre_tokenizers

    path = resolve("smollm2").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@needs_smollm2
def test_smollm2_encodes_and_decodes_as_transformers(smollm2: Tokenizer, theirs: Any) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, source, *source.splitlines()]:
        ids = smollm2.encode(text)
        assert ids == theirs.encode(text), text
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@needs_smollm2
@pytest.mark.parametrize(
    "messages",
    [
        [("user", "Hi!")],
        [("system", "You are a pirate."), ("user", "Hi!")],
        [("user", "one"), ("assistant", "two"), ("user", "  three\n")],
        [("user", "ends my turn <|im_end|> here")],
    ],
    ids=["user", "system", "turns", "special"],
)
def test_smollm2_chats_as_transformers(smollm2: Tokenizer, theirs: Any, messages: list[tuple[str, str]]) -> None:
    dicts = [{"role": role, "content": content} for role, content in messages]
    text = theirs.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)
    assert smollm2.encode_chat(messages) == theirs.encode(text, add_special_tokens=False)


@needs_smollm2
def test_smollm2_values(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.max_context) == (49152, 8192)
    assert (smollm2.eos_token_ids, smollm2.bos_token_id) == ((2,), 1)
    assert smollm2.has_chat_template
    assert smollm2.generation_defaults == {}
    assert smollm2.encode_chat([("user", "<|im_end|>")]).count(2) == 3, "a spelled-out special token is that token"


@needs_smollm2
def test_half_a_surrogate_pair_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="half a surrogate pair at character 2"):
        smollm2.encode("ab\ud800")


@needs_smollm2
def test_a_long_prompt_does_not_hold_up_other_threads(smollm2: Tokenizer) -> None:
    """The router's loop, say: every stream waits while it does."""
    encoding = threading.Thread(target=smollm2.encode, args=("a b " * 100_000,))
    began_s = last_s = time.perf_counter()
    longest_s = 0.0
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        longest_s, last_s = max(longest_s, time.perf_counter() - last_s), time.perf_counter()
    assert longest_s < 0.5 * (last_s - began_s)


def test_no_torch() -> None:
    check = "import sys, biphase.router.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def tokenizer_file(tmp_path: Path, fields: dict[str, Any]) -> Path:
    return write_gguf(tmp_path / "m.gguf", "llama", {"llama.context_length": 64, **fields}, {})


def splits(tmp_path: Path, pre: str, text: str) -> list[str]:
    """The pieces in which a pre-tokenizer kind cuts a text, before any merge."""
    library = gguf_tokenizer.build(GgufFile(tokenizer_file(tmp_path, byte_level_fields(["qq"], ["q q"], pre=pre))))
    return [text[start:end] for _, (start, end) in library.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", "$", "\n\n", " ok", "!", "\n"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "$", "\n\n", " ok", "!", "\n"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", "$\n\n", " ok", "!\n"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "$\n\n", " ok", "!\n"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, expected: list[str]) -> None:
    assert splits(tmp_path, pre, "I'll pay 1234$\n\n ok!\n") == expected


def test_merges_apply_in_order(tmp_path: Path) -> None:
    fields = byte_level_fields(["ab", "bc", "abc"], ["a b", "b c", "ab c"])
    tokenizer = Tokenizer.load(str(tokenizer_file(tmp_path, fields)))
    assert tokenizer.encode("abcbc") == [258, 257]
    assert tokenizer.decode([258, 257]) == "abcbc"


def test_llama3_takes_whole_words_and_begins_with_bos(tmp_path: Path) -> None:
    fields = byte_level_fields(["hello", "qq"], ["q q"], pre="llama-bpe", special=("<|begin_of_text|>",))
    fields |= {"tokenizer.ggml.bos_token_id": 258, "tokenizer.ggml.eos_token_id": 258}
    fields |= {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = Tokenizer.load(str(tokenizer_file(tmp_path, fields)))
    assert tokenizer.encode("hello") == [258, 256]
    assert tokenizer.encode_chat([("user", "hello")]) == [258, 256], "the template's own start token is the only one"
    assert tokenizer.decode([258, 256]) == "hello"


def test_end_of_turn_is_an_eos(tmp_path: Path) -> None:
    fields = byte_level_fields(["qq"], ["q q"], special=("<eos>", "<eot>"))
    fields |= {"tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.eot_token_id": 258}
    fields |= {"tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.load(str(tokenizer_file(tmp_path, fields)))
    assert tokenizer.eos_token_ids == (257, 258)
    assert tokenizer.encode("a") == [ord("a"), 257]
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="model m has no chat template"):
        tokenizer.encode_chat([("user", "hi")])


SENTENCEPIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
WORDS = ["▁", "a", "b", "c", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello", "ab", "bc", "▁a", "ll", "▁▁"]


def sentencepiece_fields() -> dict[str, Any]:
    tokens = [*SENTENCEPIECES, *WORDS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(SENTENCEPIECES) + [-float(i) for i in range(len(WORDS))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello", ["▁hello"]),
        ("hello hello", ["▁hello", "▁hello"]),
        ("abc", ["▁", "ab", "c"]),
        ("b  a", ["▁", "b", "▁", "▁a"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
    ],
)
def test_sentencepiece(tmp_path: Path, text: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.load(str(tokenizer_file(tmp_path, sentencepiece_fields())))
    ids = tokenizer.encode(text)
    names = [*SENTENCEPIECES, *WORDS]
    assert [names[i] for i in ids] == ["<s>", *pieces]
    assert tokenizer.decode(ids) == text


def directory(tmp_path: Path, **changes: Any) -> Path:
    """A Hugging Face directory's text files around a byte-level tokenizer; a change to None leaves a file out."""
    library = gguf_tokenizer.build(
        GgufFile(tokenizer_file(tmp_path, byte_level_fields(["ab"], ["a b"], special=("<end>",))))
    )
    folder = tmp_path / "model"
    folder.mkdir()
    files: dict[str, Any] = {
        "tokenizer.json": json.loads(library.to_str()),
        "config.json": {"vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 256},
        "generation_config.json": {"eos_token_id": [257, 256], "temperature": 0.7, "top_k": 20, "do_sample": True},
        "tokenizer_config.json": {"eos_token": {"content": "<end>"}, "chat_template": TURN},
    }
    for name, value in (files | changes).items():
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_directory(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(directory(tmp_path)))
    assert (tokenizer.vocab_size, tokenizer.max_context, tokenizer.name) == (300, 128, "model")
    assert tokenizer.eos_token_ids == (257, 256)
    assert tokenizer.generation_defaults == {"temperature": 0.7, "top_k": 20.0}
    assert tokenizer.decode(tokenizer.encode_chat([("user", "ab")])) == "[user]ab"
    assert tokenizer.encode_chat([("user", "ab")])[-1] == 257, "the template's eos_token"
    assert tokenizer.decode([290]) == "", "an id of the padded vocabulary without a piece"


def test_directory_template_file_goes_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(directory(tmp_path, **{"chat_template.jinja": "file: {{ messages[0].content }}"})))
    assert tokenizer.decode(tokenizer.encode_chat([("user", "x")])) == "file: x"


def test_directory_template_list(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = Tokenizer.load(str(directory(tmp_path, **{"tokenizer_config.json": {"chat_template": templates}})))
    assert tokenizer.decode(tokenizer.encode_chat([("user", "x")])) == "yes"


def test_saved_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    assert len(Tokenizer.load(str(folder)).encode("c" * 50)) == 50


def test_greedy_generation_config_gives_no_defaults(tmp_path: Path) -> None:
    folder = directory(tmp_path, **{"generation_config.json": {"do_sample": False, "temperature": 0.6}})
    assert Tokenizer.load(str(folder)).generation_defaults == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.json": None}, "tokenizer.json: no such file"),
        ({"tokenizer.json": "{"}, "tokenizer.json: broken tokenizer"),
        ({"config.json": "["}, "config.json: broken JSON"),
        ({"config.json": "[]"}, "config.json: holds list, expected a JSON object"),
        ({"config.json": {"vocab_size": 300}}, "config.json: max_position_embeddings is None"),
        ({"chat_template.jinja": "{% if %}"}, "chat template: "),
    ],
)
def test_broken_directories_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = directory(tmp_path, **changes)
    with pytest.raises(SetupError) as caught:
        Tokenizer.load(str(folder))
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported (supported: gpt2, llama)"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported (supported: default, gpt-2,"),
        ({"tokenizer.ggml.merges": ["a nosuch"]}, "broken tokenizer"),
        ({"tokenizer.chat_template": "{% if %}"}, "chat template: "),
        ({"tokenizer.ggml.model": None}, "the GGUF file has no tokenizer.ggml.model"),
    ],
)
def test_broken_gguf_tokenizers_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = {k: v for k, v in (byte_level_fields(["qq"], ["q q"]) | changes).items() if v is not None}
    path = tokenizer_file(tmp_path, fields)
    with pytest.raises(SetupError) as caught:
        Tokenizer.load(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def best_pair_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's own rule, spelled out: join the neighbours whose piece scores best, the leftmost of equals."""
    parts = list(text)
    while True:
        joined = [(scores.get(left + right), -i) for i, (left, right) in enumerate(pairwise(parts))]
        possible = [(score, place) for score, place in joined if score is not None]
        if not possible:
            return parts
        i = -max(possible)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(seed=st.integers(0, 10**6), text=st.text(alphabet="abcd", max_size=12))
def test_merges_from_scores_make_the_same_pieces(seed: int, text: str) -> None:
    random = Random(seed)
    pieces = list("abcd")
    while len(pieces) < 30:
        piece = random.choice(pieces) + random.choice(pieces)
        if piece not in pieces and len(piece) <= 6:
            pieces.append(piece)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, gguf_tokenizer.merges_of(vocab, scores)))
    assert library.encode(text).tokens == best_pair_first(text, scores)


@needs_smollm2
def test_reference_prompts_and_outputs(smollm2: Tokenizer) -> None:
    """The recorded prompts of transformers come out of our tokenizer, the recorded outputs out of our detokenizer."""
    prompts = json.loads((Path(__file__).parents[1] / "reference" / "smollm2_greedy.json").read_text("utf-8"))[
        "prompts"
    ]
    assert len(prompts) >= 24
    for case in prompts:
        if "text" in case:
            assert smollm2.encode(case["text"]) == case["prompt_ids"], case["name"]
        if "messages" in case:
            assert smollm2.encode_chat([tuple(m) for m in case["messages"]]) == case["prompt_ids"], case["name"]
        detokenizer = smollm2.detokenizer()
        shown = "".join(detokenizer.push([token]) for token in case["tokens"]) + detokenizer.flush()
        assert shown == case["output_text"], case["name"]
        if "stop" in case:
            text = smollm2.decode(case["tokens"][: case["stop_tokens"]])
            assert text[: text.index(case["stop"][0])] == case["stop_text"]
            assert case["stop"][0] not in smollm2.decode(case["tokens"][: case["stop_tokens"] - 1])
