"""The `biphase` command as a user meets it: one line for a mistake, exit code 2, nothing heavy imported."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import run_biphase

from biphase.protos import model_source

Environment = dict[str, str]


def one_line_and_2(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_version(environment: Environment) -> None:
    assert run_biphase(environment, "--version").stdout.startswith("biphase ")


@pytest.mark.parametrize("command", ["serve", "status", "stop", "generate"])
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
        (("serve", "nowhere.yaml"), "cannot read deploy file nowhere.yaml"),
        (("serve", "--model", "nowhere.gguf"), "nowhere.gguf"),
        (("serve", "--model", "smollm2", "--kv-memory", "lots"), "kv_memory is 'lots'"),
        (("serve", "--model", "smollm2", "--decode", "0"), "decode.replicas is 0"),
        (("serve", "--model", "smollm2", "--port", "99999"), "port is 99999: the most is 65535"),
        (("serve", "--model", "smollm2", "--name", "No Name"), "name is 'No Name'"),
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
    assert "cannot be reached" in done.stderr
