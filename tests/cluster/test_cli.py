"""The `biphase` command as a user meets it: one line for a mistake, exit code 2, nothing heavy imported."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import run_biphase

from biphase.cluster.cli import main, make_parser
from biphase.cluster.deployment import Deployment
from biphase.cluster.generate_command import options_of
from biphase.cluster.run_dir import CUT_SIGNAL, RunDir, ServeRecord, started_ticks
from biphase.cluster.status_command import STOP_PATIENCE_S, stop_patience_s
from biphase.cluster.supervisor import StopRequests
from biphase.protos import model_source

Environment = dict[str, str]


def one_line_and_2(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_version(environment: Environment) -> None:
    assert run_biphase(environment, "--version").stdout.startswith("biphase ")


@pytest.mark.parametrize("command", ["serve", "status", "stop", "generate", "bench"])
def test_every_command_has_help(environment: Environment, command: str) -> None:
    done = run_biphase(environment, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--name" in done.stdout


def test_help_imports_neither_torch_nor_ray(environment: Environment) -> None:
    code = (
        "import sys; from biphase.cluster.cli import make_parser; make_parser().format_help();"
        "print([name for name in ('torch', 'ray', 'triton', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status",), "no deployment is running"),
        (("stop",), "no deployment is running"),
        (("status", "--name", "other"), "no deployment other is running"),
        (("serve",), "give a deploy file or --model"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "hi", "--timeout", "0"), "--timeout is 0"),
        (("generate", "hi", "--raw", "--system", "Be brief"), "--system is for chat"),
        (("generate", "hi", "--address", "localhost"), "'localhost' is not HOST:PORT"),
        (("generate", "hi", "--address", "http://localhost:1"), "give it without http://, as in 'localhost:1'"),
        (("serve", "smollm2"), "did you mean --model smollm2?"),
        (("serve", "nowhere.yaml"), "cannot read deploy file nowhere.yaml"),
        (("serve", "--model", "nowhere.gguf"), "nowhere.gguf"),
        (("serve", "--model", "smollm2", "--kv-memory", "lots"), "biphase: --kv-memory is 'lots'"),
        (("serve", "--model", "smollm2", "--decode", "0"), "biphase: decode.replicas is 0"),
        (("serve", "--model", "smollm2", "--port", "99999"), "biphase: --port is 99999: the most is 65535"),
        (("serve", "--model", "smollm2", "--prefill", "-1"), "biphase: --prefill is -1: the least is 0"),
        (("serve", "--model", "smollm2", "--gpus", "2"), "biphase: --gpus is 2: the most is 1, of each rank"),
        (("serve", "--model", "smollm2", "--decode-tp", "0"), "biphase: --decode-tp is 0: the least is 1"),
        (
            ("serve", "--model", "smollm2", "--decode-tp", "2"),
            "biphase: decode: tensor_parallel_size 2 does not divide the model's 9 attention heads",
        ),
        (
            ("serve", "--model", "smollm2", "--prefill-pp", "31"),
            "biphase: prefill: pipeline_parallel_size 31 is more than the model's 30 layers",
        ),
        (
            ("serve", "--model", "smollm2", "--inject-faults", "drop"),
            "biphase: inject_faults: fault 'drop' has no chance",
        ),
        (("serve", "--model", "smollm2", "--gpus", "nan"), "biphase: --gpus is nan: it must be a finite number"),
        (("serve", "--model", "smollm2", "--name", "No Name"), "biphase: --name is 'No Name'"),
    ],
)
def test_a_mistake_is_one_line(environment: Environment, arguments: tuple[str, ...], words: str) -> None:
    assert words in one_line_and_2(run_biphase(environment, *arguments))


def test_a_typo_in_the_file_is_one_line(environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("model: smollm2\nprefil:\n  replicas: 1\n")
    line = one_line_and_2(run_biphase(environment, "serve", str(path)))
    assert line == f"biphase: {path}:2: unknown key prefil: did you mean prefill?\n"


@pytest.mark.model
def test_a_port_in_use_is_one_line(environment: Environment) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line_and_2(run_biphase(environment, "serve", "--model", "smollm2", "--port", str(port)))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


@pytest.mark.model
def test_a_host_of_another_machine_is_one_line(environment: Environment) -> None:
    line = one_line_and_2(run_biphase(environment, "serve", "--model", "smollm2", "--host", "203.0.113.1"))
    assert "cannot listen on 203.0.113.1:8700" in line
    assert "give another --host" in line


@pytest.mark.model
def test_a_truncated_model_is_one_line(environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_source.resolve("smollm2").path.read_bytes()[:50_000_000])
    real = {**environment, "PYTHONPATH": ""}
    done = run_biphase(real, "serve", "--model", str(path), "--backend", "process", "--port", "0")
    assert done.returncode == 2
    assert "cut.gguf" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_generate_without_a_server_is_one_line(environment: Environment, unused_port: Callable[[], int]) -> None:
    done = run_biphase(environment, "generate", "hello", "--raw", "--address", f"127.0.0.1:{unused_port()}")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nothing listens at 127.0.0.1:" in done.stderr


def test_generate_without_any_deployment_says_how_to_start_one(environment: Environment) -> None:
    """Whatever may listen at the default port of this machine is none of the test's business."""
    code = (
        "import sys; from biphase.client import requests; from biphase.cluster.cli import main;"
        "requests.DEFAULT_ADDRESS = '127.0.0.1:1'; sys.exit(main(['generate', 'hello']))"
    )
    bare = {name: value for name, value in environment.items() if name != "BIPHASE_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=bare, check=False, capture_output=True, text=True)
    assert one_line_and_2(done) == "biphase: no deployment is running; `biphase serve` starts one\n"


def test_unquoted_words_are_told_to_be_quoted(environment: Environment) -> None:
    done = run_biphase(environment, "generate", "why", "is", "the", "sky", "blue")
    told = "biphase generate: unrecognized arguments: is the sky blue; quote the prompt (see biphase generate --help)\n"
    assert one_line_and_2(done) == told


@pytest.mark.parametrize("flag, value", [("--kv-transport", "rdma"), ("--kv-codec", "int5"), ("--decode-tp", "1.5")])
def test_a_flag_that_cannot_be_taken_is_one_line(environment: Environment, flag: str, value: str) -> None:
    done = run_biphase(environment, "serve", "--model", "smollm2", flag, value)
    assert flag in one_line_and_2(done)
    assert value in done.stderr


def test_without_a_command_the_help_is_shown(environment: Environment) -> None:
    done = run_biphase(environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "start a deployment and keep it running" in done.stderr


def test_flags_are_not_shortened(environment: Environment) -> None:
    done = run_biphase(environment, "stop", "--no")
    assert done.returncode == 2
    assert "unrecognized arguments: --no" in done.stderr


@pytest.mark.parametrize(
    ("flags", "temperature"),
    [([], 0.0), (["--max-tokens", "8"], 0.0), (["--temperature", "0.7"], 0.7), (["--top-p", "0.9"], None)],
)
def test_generate_is_greedy_unless_told_how_to_sample(flags: list[str], temperature: float | None) -> None:
    options = options_of(make_parser().parse_args(["generate", "hello", *flags]))
    assert options.get("temperature") == temperature


@pytest.mark.model
def test_a_name_that_is_served_comes_before_its_port(environment: Environment) -> None:
    run_dir = RunDir(Path(environment["BIPHASE_RUN_DIR"]) / "mine")
    lock = run_dir.lock()
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            done = run_biphase(environment, "serve", "--model", "smollm2", "--name", "mine", "--port", port)
        line = one_line_and_2(done)
    finally:
        os.close(lock)
    assert "deployment mine is already served" in line


async def test_one_cut_signal_skips_the_drain() -> None:
    stops = StopRequests(foreground=False)
    os.kill(os.getpid(), CUT_SIGNAL)
    await asyncio.wait_for(stops.cut.wait(), 10.0)
    assert stops.drain.is_set()


def test_stop_now_sends_one_cut_signal(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of the supervisor: a process that ends when it is signalled."""
    monkeypatch.setenv("BIPHASE_RUN_DIR", environment["BIPHASE_RUN_DIR"])
    run_dir = RunDir.of("mine")
    lock = run_dir.lock()
    with subprocess.Popen(["sleep", "60"]) as supervisor:
        ticks = started_ticks(supervisor.pid)
        assert ticks is not None
        run_dir.write_record(ServeRecord(name="mine", pid=supervisor.pid, started_ticks=ticks, backend="process"))
        assert main(["stop", "--now"]) == 0
        assert supervisor.wait() == -CUT_SIGNAL
    os.close(lock)
    assert capsys.readouterr().out == "stopped mine\n"


def test_a_stop_waits_as_long_as_running_requests_may_take(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert stop_patience_s(run_dir) == STOP_PATIENCE_S, "nobody knows"
    run_dir.prepare(Deployment(model="m", drain_s=300.0))
    assert stop_patience_s(run_dir) == 300.0 + STOP_PATIENCE_S
