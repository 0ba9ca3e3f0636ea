"""The files of a bench: phases and recorded tokens."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sources import ROOT

from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.lengths import fixed
from biphase.client.bench.phases_file import Defaults, read_phases
from biphase.client.bench.prompts import RandomPrompts, RecordedPrompts
from biphase.client.bench.tokens_file import Recorded, Recording, read_recording, write_recording
from biphase.protos.errors import SetupError

DEFAULTS = Defaults(rate=1.0, burstiness=1.0, input_tokens=fixed(128), output_tokens=fixed(64))
EXAMPLES = sorted((ROOT / "examples" / "load").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_taken_as_they_are(path: Path) -> None:
    phases = read_phases(path, DEFAULTS)
    assert len(phases) >= 2 and len({phase.name for phase in phases}) == len(phases)


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_phases_take_the_files_then_the_flags_values(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "input_len: uniform:2:4\nphases:\n- {seconds: 5}\n- {name: up, seconds: 9, rate: [1, 3], input_len: 7}\n"
    )
    first, second = read_phases(tmp_path / "p.yaml", DEFAULTS)
    assert (first.name, first.rate, first.rate_end, str(first.input_tokens)) == ("0", 1.0, 1.0, "uniform:2:4")
    assert (second.name, second.rate, second.rate_end, second.input_tokens) == ("up", 1.0, 3.0, fixed(7))
    assert second.output_tokens == fixed(64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("phases: []", "a list of at least one"),
        ("- 1", "a mapping with phases"),
        ("phases: [1]", r"phases\[0\] is 1: it must be a mapping"),
        ("phases: [{seconds: 1}]\nburst: 3", "unknown key burst: did you mean burstiness"),
        ("phases: [{seconds: 1, rat: 3}]", r"phases\[0\]: unknown key rat: did you mean rate"),
        ("phases: [{rate: 1}]", "key seconds is missing"),
        ("phases: [{seconds: 0}]", "seconds is 0: it must be above 0"),
        ("phases: [{seconds: .inf}]", "it must be a finite number"),
        ("phases: [{seconds: 1, rate: -1}]", "rate is -1: it must be at least 0"),
        ("phases: [{seconds: 1, rate: [1, 2, 3]}]", "or two for a ramp"),
        ("phases: [{seconds: 1, burstiness: 0}]", "burstiness is 0: it must be above 0"),
        ("phases: [{seconds: 1, output_len: true}]", "output_len is 'True'"),
        ("phases: [{seconds: 1, output_len: -4}]", "output_len is '-4'"),
        ("phases: {", "p.yaml:1: not valid YAML"),
    ],
)
def test_a_bad_phases_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SetupError, match=words) as caught:
        read_phases(tmp_path / "p.yaml", DEFAULTS)
    assert "\n" not in str(caught.value)


ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5).map(tuple)
recorded = st.builds(Recorded, prompt_ids=ids, tokens=ids, margin=st.one_of(st.none(), st.floats(0, 10))) | st.builds(
    Recorded,
    prompt_ids=ids,
    tokens=ids,
    margin=st.none(),
    temperature=st.floats(0.1, 2),
    seed=st.integers(0, 2**63 - 1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(recorded, max_size=4).map(tuple))
def test_a_recording_is_read_as_it_was_written(tmp_path: Path, prompts: tuple[Recorded, ...]) -> None:
    recording = Recording(model="m", model_hash="ab", prompts=prompts)
    write_recording(tmp_path / "r.jsonl", recording)
    assert read_recording(tmp_path / "r.jsonl") == recording


def test_unclear_prompts_are_not_used() -> None:
    prompts = tuple(Recorded(prompt_ids=(1,), tokens=(2,), margin=margin) for margin in (0.0009, 0.001, None))
    assert Recording(model="", model_hash="", prompts=prompts).usable == prompts[1:]
    with pytest.raises(SetupError, match="no prompt that can be used"):
        RecordedPrompts(prompts[:0], seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: not a JSON object"),
        ("{}", "no recording of tokens"),
        ('{"biphase_tokens": 1}\n[1]', ":2: not a JSON object"),
        ('{"biphase_tokens": 1}\n{"prompt_ids": [1], "tokens": []}', ":2: tokens is a list of token ids, at least one"),
        ('{"biphase_tokens": 1}\n{"prompt_ids": [-1], "tokens": [1]}', ":2: prompt_ids is a list of token ids"),
        ('{"biphase_tokens": 1}\n{"prompt_ids": [1], "tokens": [1], "margin": "x"}', "are numbers"),
    ],
)
def test_a_bad_recording_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(SetupError, match=words):
        read_recording(tmp_path / "r.jsonl")


def test_random_prompts_depend_on_seed_salt_and_index_alone_and_fit_the_model() -> None:
    def prompt(seed: int = 0, salt: int = 0, index: int = 0, tokens: int = 20, output: int = 9) -> tuple[int, ...]:
        source = RandomPrompts(vocab_size=500, max_model_len=64, seed=seed, salt=salt)
        made = source.of(Arrival(index=index, at_s=0.0, phase=0, input_tokens=tokens, output_tokens=output))
        assert len(made.token_ids) + made.max_tokens <= 64
        assert source.num_cut == (tokens + output > 64)
        return tuple(made.token_ids)

    assert prompt() == prompt() and len(prompt()) == 20
    assert len({prompt(), prompt(seed=1), prompt(salt=1), prompt(index=1)}) == 4
    assert all(100 <= token < 500 for token in prompt())
    assert len(prompt(tokens=60, output=60)) == 32
    assert len(prompt(tokens=60, output=9)) == 55


def test_recorded_prompts_keep_to_the_recorded_length() -> None:
    source = RecordedPrompts([Recorded(prompt_ids=(1, 2), tokens=(3, 4, 5), margin=1.0)], seed=0)
    for wanted, given_ in ((2, 2), (9, 3)):
        made = source.of(Arrival(index=0, at_s=0.0, phase=0, input_tokens=1, output_tokens=wanted))
        assert (made.max_tokens, made.answer) == (given_, (3, 4, 5))
