"""`biphase bench` as a user runs it, on a deployment of real processes with a small random model."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.deployment import Deployment, deployed
from support.dummy_directory import write_tokenizer
from support.random_llama import VOCAB, Case, write_random_llama
from support.served import BIPHASE

from biphase.client.bench.tokens_file import Recorded, Recording, read_recording, write_recording
from biphase.cluster.cli import main

FAST = ("--request-rate", "50", "--num-prompts", "12", "--input-len", "uniform:5:40", "--output-len", "8")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def bench(*arguments: str) -> Done:
    """In this process: a new interpreter for each would take longer than the loads."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["bench", *arguments])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    found = write_random_llama(folder)
    write_tokenizer(folder, VOCAB)
    return found


@pytest.fixture(scope="module")
def served(folder: Path, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("served"), mode="strict", model=str(folder)) as deployment:
        yield deployment


@pytest.mark.slow
def test_a_load_gives_table_json_and_exit_code_0(served: Deployment, tmp_path: Path) -> None:
    goals = ("--goodput", "ttft:20000", "tpot:20000")
    flags = ("bench", "--address", served.address, *FAST, *goals, "--json", str(tmp_path / "out.json"))
    done = subprocess.run([*BIPHASE, *flags], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "requests       12 offered, 12 done, 0 not" in done.stdout
    assert "attainment     100.0 % of all requests (TTFT <= 20000 ms, TPOT <= 20000 ms)" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["all"]["output_tokens"] == 12 * 8 and found["all"]["attainment"] == 1.0
    assert found["all"]["ttft_ms"]["p50"] <= found["all"]["ttft_ms"]["p99"] <= found["all"]["e2e_ms"]["max"]
    assert found["all"]["itl_ms"]["count"] == 12 * 7
    assert [one["decision"] for one in found["requests"]] == ["disaggregated"] * 12


@pytest.mark.slow
def test_the_load_is_the_same_for_a_seed(served: Deployment, tmp_path: Path) -> None:
    runs = []
    for seed in ("1", "1", "2"):
        bench("--address", served.address, *FAST, "--seed", seed, "--json", str(tmp_path / "out.json"))
        requests = json.loads((tmp_path / "out.json").read_text())["requests"]
        runs.append([(one["due_s"], one["input_tokens"]) for one in requests])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_requests_that_are_cut_to_the_context_are_told_of(served: Deployment) -> None:
    done = bench("--address", served.address, "--num-prompts", "2", "--input-len", "100000", "--output-len", "2")
    assert done.returncode == 0
    assert "2 of 2 requests were longer than the context of" in done.stderr


@pytest.mark.slow
def test_phases_change_rate_and_lengths(served: Deployment, tmp_path: Path) -> None:
    phases = "phases:\n- {name: a, seconds: 1, rate: 10, input_len: 4, output_len: 2}\n"
    (tmp_path / "p.yaml").write_text(phases + "- {name: b, seconds: 1, rate: [10, 30], input_len: 9, output_len: 3}\n")
    flags = ("--phases", str(tmp_path / "p.yaml"), "--burstiness", "inf", "--json", str(tmp_path / "out.json"))
    done = bench("--address", served.address, *flags)
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [(row[0], row[2]) for row in rows] == [("a", "9/9"), ("b", "20/20")]
    assert 9.0 <= float(rows[0][1]) <= 11.0 and 18.0 <= float(rows[1][1]) <= 22.0
    found = json.loads((tmp_path / "out.json").read_text())
    first, second = found["phases"]
    assert (first["name"], first["offered"], first["input_tokens"]) == ("a", 9, 9 * 4)
    assert (second["name"], second["offered"], second["output_tokens"]) == ("b", 20, 20 * 3)


@pytest.mark.slow
def test_answers_are_recorded_and_then_checked(served: Deployment, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    assert bench("--address", served.address, *FAST, "--record-tokens", str(kept)).returncode == 0
    recording = read_recording(kept)
    assert len(recording.prompts) == 12 and all(len(one.tokens) == 8 for one in recording.prompts)
    checked = bench(
        "--address", served.address, "--request-rate", "50", "--num-prompts", "40", "--check-tokens", str(kept)
    )
    assert checked.returncode == 0, checked
    assert "tokens checked 40 answers, 0 wrong" in checked.stdout
    assert "12 of them with an unknown margin" in checked.stderr


@pytest.mark.slow
def test_a_wrong_answer_is_found_and_unclear_prompts_are_not_sent(
    served: Deployment, cases: list[Case], tmp_path: Path
) -> None:
    good = [Recorded(prompt_ids=tuple(case.prompt), tokens=tuple(case.tokens), margin=case.margin) for case in cases]
    bad = Recorded(prompt_ids=good[0].prompt_ids, tokens=(*good[0].tokens[:-1], 7), margin=1.0)
    unclear = Recorded(prompt_ids=good[1].prompt_ids, tokens=(7, 7), margin=1e-4)
    flags = ("--request-rate", "50", "--num-prompts", "40", "--check-tokens", str(tmp_path / "r.jsonl"))
    write_recording(tmp_path / "r.jsonl", Recording(model="m", model_hash="", prompts=(*good, unclear)))
    found = bench("--address", served.address, *flags)
    assert (found.returncode, "40 answers, 0 wrong" in found.stdout) == (0, True), found
    assert found.stderr == f"{len(good)} of {len(good) + 1} recorded prompts used (margin at least 0.001)\n"
    write_recording(tmp_path / "r.jsonl", Recording(model="m", model_hash="", prompts=(bad,)))
    found = bench("--address", served.address, *flags)
    assert (found.returncode, "40 answers, 40 wrong" in found.stdout) == (1, True), found
    write_recording(tmp_path / "r.jsonl", Recording(model="m", model_hash="00", prompts=tuple(good)))
    found = bench("--address", served.address, *flags)
    assert (found.returncode, "recorded with other weights" in found.stderr) == (2, True), found


@pytest.mark.slow
def test_the_recorder_gives_what_the_deployment_answers(served: Deployment, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    program = Path(__file__).parents[3] / "bench" / "record_tokens.py"
    flags = ("--model", str(folder), "--prompts", "8", "--input-len", "uniform:1:60", "--output-len", "24")
    subprocess.run([sys.executable, str(program), "--out", str(out), *flags], check=True, capture_output=True)
    recording = read_recording(out)
    assert len(recording.usable) >= 4 and all(one.margin is not None for one in recording.prompts)
    checked = bench(
        "--address", served.address, "--request-rate", "50", "--num-prompts", "40", "--check-tokens", str(out)
    )
    assert (checked.returncode, "40 answers, 0 wrong" in checked.stdout) == (0, True), checked


@pytest.mark.slow
def test_several_addresses_are_taken_in_turn_and_a_dead_one_costs_nothing(served: Deployment, tmp_path: Path) -> None:
    where = ("--address", served.address, "--address", "127.0.0.1:1", "--json", str(tmp_path / "out.json"))
    done = bench(*where, *FAST)
    assert done.returncode == 0, done
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["all"]["done"], found["all"]["errors"]) == (12, {})
    assert found["addresses"] == [served.address, "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--request-rate", "0"), "--request-rate is 0"),
        (("--request-rate", "-1"), "--request-rate is -1"),
        (("--request-rate", "inf", "--duration", "3"), "give --num-prompts"),
        (("--burstiness", "0"), "--burstiness is 0: it must be above 0"),
        (("--input-len", "uniform:5"), "--input-len is 'uniform:5': it must be uniform:LEAST:MOST"),
        (("--goodput", "tft:5"), "did you mean ttft?"),
        (("--duration", "0"), "--duration is 0"),
        (("--num-prompts", "0"), "--num-prompts is 0: the least is 1"),
        (("--phases", "nowhere.yaml"), "cannot read phases file nowhere.yaml"),
        (("--phases", "x.yaml", "--duration", "3"), "give one of them"),
        (("--check-tokens", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--check-tokens", "x", "--respect-eos"), "give one of them"),
        (("--json", "/nowhere/x.json"), "there is no folder /nowhere"),
        (("--address", "localhost"), "'localhost' is not HOST:PORT"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = bench(*(("--address", "127.0.0.1:1") if "--address" not in arguments else ()), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_nobody_listens_is_one_line_and_exit_code_1() -> None:
    done = bench("--address", "127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "biphase: nothing listens at 127.0.0.1:1\n")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_it_with_the_figures_of_what_was_sent(served: Deployment, tmp_path: Path, times: int) -> None:
    """Once: what runs is waited for; twice: it is cut short, and told as cancelled."""
    shape = ("--request-rate", "20", "--num-prompts", "100000", "--input-len", "20", "--output-len", "200")

    def interrupt() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # two that come at once may be one

    timer = threading.Timer(2.0, interrupt)
    timer.start()
    done = bench("--address", served.address, *shape, "--no-progress", "--json", str(tmp_path / "out.json"))
    timer.join()
    assert done.returncode == 130, done.stderr
    assert "no more is sent; waiting for " in done.stderr
    requests = json.loads((tmp_path / "out.json").read_text())["requests"]
    kinds = {request["kind"] for request in requests}
    assert len(requests) > 10
    if times == 1:
        assert kinds == {"DONE"}
    else:  # a busy machine may have done none of them by then
        assert kinds <= {"DONE", "CANCELLED"} and "CANCELLED" in kinds
